"""Reclaims and preemptions in words."""

from __future__ import annotations

import logging

import pytest

from memshare.config import LogConfig
from memshare.telemetry.explain import Explainer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def explainer(clock: Clock, caplog: pytest.LogCaptureFixture) -> Explainer:
    caplog.set_level(logging.INFO, "memshare.telemetry.explain")
    return Explainer(LogConfig(explain_every_s=10.0), clock)


def test_says_who_why_and_how_many_blocks(
    explainer: Explainer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.now += 10
    for request, blocks in [("a", 2), ("b", 1), ("a", 1)]:
        explainer.reclaimed(request, blocks, "watermark")
    explainer.reclaimed("a", 1, "allocation")
    explainer.in_vain("nobody gave anything")
    explainer.preempted("c", 7)
    explainer.tell(free=3, total=50)
    preempted, reclaimed = caplog.records
    assert preempted.levelname == "WARNING"
    assert preempted.getMessage() == (
        "preempted: 7 blocks; requests: 1 (c: 7); why: reclaiming freed nothing: nobody gave "
        "anything (1x); free now: 3 of 50 blocks"
    )
    assert reclaimed.getMessage().startswith("reclaimed: 5 blocks; requests: 2 (a: 4, b: 1); why: ")
    assert "fewer blocks are free than the low watermark (3x)" in reclaimed.getMessage()
    assert vars(reclaimed)["event"] == "reclaimed"
    assert vars(reclaimed)["requests"] == {"a": 4, "b": 1}
    assert vars(reclaimed)["blocks"] == 5


def test_the_rate_is_bounded_and_nothing_is_lost(
    explainer: Explainer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(400):  # 0.1 s each
        clock.now += 0.1
        explainer.reclaimed(f"r{step % 9}", 1, "demand")
        explainer.tell(free=0, total=9)
    assert 3 <= len(caplog.records) <= 4
    clock.now += 10
    explainer.tell(free=0, total=9)
    assert sum(vars(record)["blocks"] for record in caplog.records) == 400
    assert "4 more" in caplog.records[0].getMessage()


def test_an_obstacle_is_one_of_its_own_step(
    explainer: Explainer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    explainer.in_vain("earlier")
    explainer.tell(free=0, total=9)
    explainer.preempted("a", 1)
    clock.now += 10
    explainer.tell(free=0, total=9)
    assert "earlier" not in caplog.text
    assert "it was not asked" in caplog.text


def test_zero_writes_and_keeps_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "memshare.telemetry.explain")
    explainer = Explainer(LogConfig(explain_every_s=0.0), clock)
    for step in range(100):
        clock.now += 10
        explainer.reclaimed(f"r{step}", 1, "eager")
        explainer.preempted(f"r{step}", 1)
        explainer.tell(free=0, total=9)
    assert caplog.records == []
    assert not explainer._reclaims
    assert not explainer._preemptions
