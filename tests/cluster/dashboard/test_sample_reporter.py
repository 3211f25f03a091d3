"""The replica's side of the page when things go wrong. Stand-in: a board that fails on demand."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve.handle import DeploymentHandle

from cluster.config import PageConfig
from cluster.dashboard.engine_sampler import EngineSampler
from cluster.dashboard.hub import DashboardHub
from cluster.dashboard.sample_reporter import SampleReporter
from cluster.telemetry.step_sample import StepSample
from cluster.telemetry.step_stats import StepFeed
from tests.cluster.dashboard.page.serving import LocalBoard

pytestmark = pytest.mark.engine  # vLLM is loaded; no engine starts

STEP = StepSample(usage=0.5, running=1, waiting=0, tokens=1, preempted=0, payload=None)


def make_watch() -> EngineSampler:
    requests = {"a": SimpleNamespace(prompt=[1, 2], output=[3])}
    return EngineSampler("r", "node", 50, 2, cast(Any, requests.get), lambda: 1, None)


async def samples(board: DashboardHub) -> int:
    replicas = cast(list[dict[str, Any]], (await board.state("", 0))["replicas"])
    return sum(len(replica["samples"]) for replica in replicas)


async def test_samples_and_traces_reach_the_board_and_a_board_that_is_away_costs_none() -> None:
    board, watch, faults = DashboardHub(PageConfig()), make_watch(), Counter[str]()
    handle = LocalBoard(board)
    agent = SampleReporter(
        watch, cast("DeploymentHandle[Any]", handle), 0.02, lambda part: faults.update([part])
    )
    agent.start()
    try:
        watch.record(STEP)
        while (trace := await board.trace("r", "a")) is None:
            await asyncio.sleep(0.01)
        assert trace.tokens == 3
        handle.broken = True
        while faults["report"] <= 2:
            await asyncio.sleep(0.01)
        known = await samples(board)
        handle.broken = False
        while await samples(board) <= known + faults["report"]:  # what it missed comes later
            await asyncio.sleep(0.01)
    finally:
        agent.stop()
    assert set(faults) == {"report"}


def test_a_listener_that_fails_stops_neither_the_engine_nor_other_listeners(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("ERROR", "cluster.telemetry.step_stats")
    faults: list[str] = []
    heard: list[StepSample] = []

    def fail(step: StepSample) -> None:
        raise ZeroDivisionError

    feed = StepFeed(faults.append)
    feed.listeners += [fail, heard.append]
    for _ in range(3):
        feed.publish(STEP)
    assert heard == [STEP] * 3
    assert faults == ["record"] * 3
    assert len(caplog.records) == 1, "logged once"
