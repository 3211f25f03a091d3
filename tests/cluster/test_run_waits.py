"""How long a server that is told to end waits for its requests (cluster/run.py). No Ray: the
handles are stand-ins; with Ray it is tests/cluster/test_run.py."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster import run


class Handle:
    """Of one deployment: answers like two replicas with ``running`` requests each."""

    deployment_name = "Engine"

    def __init__(self, grace: float, running: list[int], fault: Exception | None = None) -> None:
        self.calls: list[str] = []
        self._grace = grace
        self._running = running
        self._fault = fault

    def broadcast(self, method: str) -> Handle:
        self.calls.append(method)
        return self

    def results(self, timeout_s: float) -> list[Any]:
        if self._fault is not None:
            raise self._fault
        if self.calls[-1] == "close":
            return [self._grace, self._grace]
        now = self._running.pop(0) if len(self._running) > 1 else self._running[0]
        return [now, 0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_POLL_S", 0.01)
    monkeypatch.setattr(run, "_FLUSH_S", 0.0)


def drained(*handles: Handle) -> float:
    began = time.monotonic()
    run.drain(list(handles))  # type: ignore[arg-type]
    return time.monotonic() - began


def test_it_ends_with_the_last_request() -> None:
    handle = Handle(60.0, [3, 2, 1, 0])
    assert drained(handle) < 5
    assert handle.calls == ["close", *["under_way"] * 4], "closed first, and once"


def test_nobody_is_waited_for_longer_than_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    assert 0.3 <= drained(Handle(0.3, [2])) < 5
    assert "2 requests have not finished" in caplog.text


def test_the_longest_grace_counts_and_a_dead_replica_is_passed_over() -> None:
    dead = Handle(0.0, [1], RayActorError())
    foreign = Handle(0.0, [1], AttributeError("no method close"))
    busy = Handle(60.0, [1, 1, 0])
    assert drained(dead, foreign, Handle(0.0, [0]), busy) < 5
    assert busy.calls.count("under_way") == 3


def test_without_applications_nothing_is_waited_for() -> None:
    assert drained() < 1
