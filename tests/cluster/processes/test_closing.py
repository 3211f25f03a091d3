"""How long a server that is told to end waits for its requests (cluster/processes/closing.py). No
Ray: the handles are stand-ins; with Ray it is tests/cluster/test_run.py."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster.processes import closing
from cluster.processes.closing import Closed


class Handle:
    """Of one deployment, which answers each call by the next of ``answers``, and by the last from
    then on: a list has an entry for each replica, an exception is raised."""

    deployment_name = "Engine"

    def __init__(self, *answers: list[Any] | Exception) -> None:
        self.calls = 0
        self._answers = answers

    def broadcast(self, method: str) -> Handle:
        assert method == "close"
        self.calls += 1
        return self

    def results(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions, "one replica's fault is not another's"
        answer = self._answers[min(self.calls, len(self._answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer


def replicas(grace: float, *under_way: int) -> list[Any]:
    return [Closed(grace, number) for number in under_way]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "_POLL_S", 0.01)
    monkeypatch.setattr(closing, "_FLUSH_S", 0.0)


def drained(*handles: Handle) -> float:
    began = time.monotonic()
    closing.drain(list(handles))  # type: ignore[arg-type]
    return time.monotonic() - began


def test_it_ends_with_the_last_request() -> None:
    handle = Handle(*(replicas(60.0, number, 0) for number in (3, 2, 1, 0)))
    assert drained(handle) < 30
    assert handle.calls == 4


def test_a_replica_that_was_starting_is_closed_and_waited_for() -> None:
    handle = Handle(replicas(60.0, 1), replicas(60.0, 0, 2), replicas(60.0, 0, 0))
    assert drained(handle) < 30
    assert handle.calls == 3


def test_nobody_is_waited_for_longer_than_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    assert 0.3 <= drained(Handle(replicas(0.3, 2))) < 30
    assert "2 requests have not finished" in caplog.text


def test_the_longest_grace_counts_and_a_dead_deployment_is_passed_over() -> None:
    dead = Handle(RayActorError())
    foreign = Handle([AttributeError("no method close")])
    busy = Handle(replicas(60.0, 1), replicas(60.0, 1), replicas(60.0, 0))
    assert drained(dead, foreign, Handle(replicas(0.0, 0)), busy) < 30
    assert busy.calls == 3


def test_a_dead_replica_hides_no_other_of_its_deployment() -> None:
    handle = Handle([RayActorError(), Closed(60.0, 1)], [RayActorError(), Closed(60.0, 0)])
    assert drained(handle) < 30
    assert handle.calls == 2


def test_streams_of_replicas_that_answer_late_are_not_cut() -> None:
    handle = Handle(
        TimeoutError(), [TimeoutError(), Closed(0.0, 0)], replicas(60.0, 1), replicas(60.0, 0, 0)
    )
    assert drained(handle) < 30
    assert handle.calls == 4


def test_a_late_answer_shortens_no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "_LATE", Closed(grace_s=0.0, under_way=1))
    handle = Handle(replicas(60.0, 1), TimeoutError(), replicas(60.0, 1), replicas(60.0, 0))
    assert drained(handle) < 30
    assert handle.calls == 4


def test_replicas_that_never_answer_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "_LATE", Closed(grace_s=0.1, under_way=1))
    assert drained(Handle(TimeoutError())) < 30


def test_without_applications_nothing_is_waited_for() -> None:
    assert drained() < 30
