"""The bridge: the engine never waits, whatever the evaluators do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from memshare.config import load_config
from memshare.search import bridge as bridge_module
from memshare.search.bridge import EvaluatorBridge
from memshare.search.evaluate import (
    EvaluatorAnswer,
    EvaluatorError,
    InProcessSource,
    NewSteps,
    StepMatch,
)

PATIENCE_S = 30.0  # a loaded machine is slow, not wrong


def steps(request: str = "r", position: int = 0, history: str | None = None) -> NewSteps:
    """One step of eight equal tokens."""
    return NewSteps(request, 0, history or request, position, [5] * 8, (0, 8), 0.9, 1.0)


def until(happened: Callable[[], bool]) -> None:
    """Wait for the bridge thread."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "the bridge did not get there"
        time.sleep(0.001)


class Source:
    """A candidate source that does what it is told and records each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[Any] = []
        self.faults: dict[str, list[Exception]] = {}
        self.go = threading.Event()
        self.go.set()
        self.closed = 0

    def _enter(self, name: str) -> None:
        assert threading.current_thread().name == "memshare-bridge"
        self.go.wait(PATIENCE_S)
        if self.faults.get(name):
            raise self.faults[name].pop(0)

    @property
    def pending(self) -> int:
        return len(self.answers)

    def submit(self, batch: Sequence[NewSteps]) -> None:
        self.calls.append(("submit", *(s.position for s in batch)))
        self._enter("submit")
        self.answers.append(EvaluatorAnswer((), float(len(batch))))

    def collect(self) -> list[Any]:
        self._enter("collect")
        answers, self.answers = self.answers, []
        return answers

    def forget_histories(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        self.calls.append(("forget_histories", list(histories), list(request_ids)))
        self._enter("forget_histories")

    def close(self) -> None:
        self.closed += 1
        self._enter("close")

    @property
    def submitted(self) -> list[int]:
        return [position for name, *what in self.calls if name == "submit" for position in what]


@contextmanager
def running(source: Any, queue_size: int = 1000) -> Iterator[EvaluatorBridge]:
    bridge = EvaluatorBridge(lambda: source, queue_size)
    try:
        yield bridge
    finally:
        if isinstance(source, Source):
            source.go.set()
        bridge.close()
        assert not bridge._thread.is_alive()


def gather(bridge: EvaluatorBridge, count: int) -> list[EvaluatorAnswer | EvaluatorError]:
    items: list[EvaluatorAnswer | EvaluatorError] = []

    def enough() -> bool:
        items.extend(bridge.drain())
        return len(items) >= count

    until(enough)
    return items


def reasons(items: list[EvaluatorAnswer | EvaluatorError]) -> list[str]:
    return [item.reason if isinstance(item, EvaluatorError) else "answer" for item in items]


def test_steps_go_in_and_matches_come_out() -> None:
    with running(InProcessSource(load_config({"policy": {"name": "paper"}}, {}))) as bridge:
        for position in range(0, 40, 8):
            assert bridge.submit([steps(position=position)])
        matches: list[StepMatch] = []

        def enough() -> bool:
            for answer in bridge.drain():
                assert isinstance(answer, EvaluatorAnswer)
                matches.extend(answer.matches)
            return len(matches) >= 7

        until(enough)
    # Two at most for each: the newest two before it.
    pairs = [(m.later.start, m.earlier.start) for m in matches]
    assert pairs == [(8, 0), (16, 8), (16, 0), (24, 16), (24, 8), (32, 24), (32, 16)]


def test_a_full_queue_drops_and_says_so_and_nothing_taken_is_lost() -> None:
    source = Source()
    source.go.clear()
    with running(source, queue_size=3) as bridge:
        assert bridge.submit([steps(position=0)])
        until(lambda: source.submitted == [0])  # the thread stands in this call
        taken = [i for i in range(1, 20) if bridge.submit([steps(position=i)])]
        assert taken == [1, 2, 3]
        assert bridge.backlog == 3
        assert bridge.drain() == []
        source.go.set()
        until(lambda: source.submitted == [0, *taken])
        until(lambda: bridge.backlog == 0)
        assert bridge.submit([steps(position=99)]), "there is room again"
        until(lambda: source.submitted[-1] == 99)


def test_forgetting_is_never_dropped_and_keeps_its_place() -> None:
    source = Source()
    source.go.clear()
    with running(source, queue_size=6) as bridge:
        bridge.submit([steps(position=0)])
        until(lambda: source.submitted == [0])
        bridge.submit([steps(position=1)])
        bridge.forget_request("r", "r")
        bridge.submit([steps(position=2)])
        bridge.forget_request("tenant", "a")
        bridge.forget_request("b", "b")
        bridge.submit([steps(position=3)])
        assert not bridge.submit([steps(position=4)]), "negative control: the queue is full"
        bridge.forget_request("tenant", "c")
        source.go.set()
        until(lambda: len(source.calls) == 7)
    assert source.calls == [
        ("submit", 0),
        ("submit", 1),
        ("forget_histories", ["r"], []),
        ("submit", 2),
        (
            "forget_histories",
            ["b"],
            ["a"],
        ),  # a private history as a whole, else the request in a shared one
        ("submit", 3),
        ("forget_histories", [], ["c"]),
    ]


def test_waiting_batches_are_folded_but_not_without_end() -> None:
    source = Source()
    source.go.clear()
    with running(source) as bridge:
        bridge.submit([steps(position=0)])
        until(lambda: source.submitted == [0])
        for i in range(1, 201):
            bridge.submit([steps(position=i)])
        source.go.set()
        until(lambda: len(source.submitted) == 201)
    sizes = [len(call) - 1 for call in source.calls]
    assert source.submitted == list(range(201))
    assert max(sizes) == bridge_module._MAX_BATCH
    assert len(sizes) == 1 + -(-200 // bridge_module._MAX_BATCH)


@pytest.mark.parametrize("where", ["submit", "collect", "forget_histories"])
def test_faults_are_reported_and_the_thread_lives_on(where: str) -> None:
    source = Source()
    source.faults[where] = [EvaluatorError("busy"), RuntimeError("broken"), SystemError("worse")]
    with running(source) as bridge:
        items: list[EvaluatorAnswer | EvaluatorError] = []
        for i in range(5):
            bridge.submit([steps(position=i)])
            bridge.forget_request("r", "r")
            until(lambda n=i: source.submitted[-1:] == [n])
        until(lambda: items.extend(bridge.drain()) or (reasons(items).count("error") == 2))
        bridge.submit([steps(position=5)])
        until(lambda: items.extend(bridge.drain()) or ("answer" in reasons(items)))
        assert bridge._thread.is_alive()
    assert [reason for reason in reasons(items) if reason != "answer"] == ["busy", "error", "error"]


def test_an_error_carries_what_happened() -> None:
    source = Source()
    source.faults["submit"] = [KeyError("the cause" * 100)]
    with running(source) as bridge:
        bridge.submit([steps()])
        (error,) = gather(bridge, 1)
    assert isinstance(error, EvaluatorError)
    assert "KeyError('the causethe cause" in str(error)
    assert len(str(error)) < 250


@pytest.mark.parametrize(
    "garbage", [None, "answer", EvaluatorAnswer([], 0.0), EvaluatorAnswer(((1, 2, 3),), 0.0), 7]
)
def test_garbage_is_reported_and_never_passed_on(garbage: object) -> None:
    source = Source()
    source.answers = [garbage, EvaluatorAnswer((), 3.0)]
    with running(source) as bridge:
        first, second = gather(bridge, 2)
        assert isinstance(first, EvaluatorError)
        assert first.reason == "garbage"
        assert second == EvaluatorAnswer((), 3.0)
        bridge.submit([steps()])
        assert reasons(gather(bridge, 1)) == ["answer"]


def test_an_answer_is_noticed_though_nothing_comes_in() -> None:
    class Late(Source):
        """Answers when it is looked at for the third time."""

        looks = 0

        @property
        def pending(self) -> int:
            return 1 if self.looks < 3 else 0

        def collect(self) -> list[Any]:
            self.looks += 1
            return [EvaluatorAnswer((), 1.0)] if self.looks == 3 else []

    with running(Late()) as bridge:
        assert gather(bridge, 1) == [EvaluatorAnswer((), 1.0)]


def test_complaints_are_logged_but_not_at_every_fault(caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    source.faults["submit"] = [
        RuntimeError("a"),
        RuntimeError("b"),
        KeyError("c"),
        RuntimeError("d"),
    ]
    with caplog.at_level(logging.WARNING, "memshare.search.bridge"), running(source) as bridge:
        for i in range(4):
            bridge.submit([steps(position=i)])
            until(lambda n=i: source.submitted[-1:] == [n])
        assert len(gather(bridge, 4)) == 4
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert logged == [RuntimeError, KeyError], "one line for each kind"


# ---- the ends of its life ----


def test_a_source_that_cannot_open_is_tried_again() -> None:
    source = Source()
    attempts: list[float] = []

    def open_source() -> Any:
        attempts.append(time.monotonic())
        if len(attempts) == 1:
            raise ConnectionError("no cluster")
        return source

    bridge = EvaluatorBridge(open_source, queue_size=2)
    try:
        assert reasons(gather(bridge, 1)) == ["error"]
        taken = [bridge.submit([steps(position=i)]) for i in range(5)]
        assert taken == [True, True, False, False, False], "they pile up, and are then dropped"
        until(lambda: source.submitted == [0, 1])
        assert attempts[1] - attempts[0] >= 0.9, "it is not hammered"
    finally:
        bridge.close()
    assert source.closed == 1


def test_nothing_piles_up_before_a_source_is_open() -> None:
    source = Source()
    may_open = threading.Event()

    def open_source() -> Any:
        may_open.wait(PATIENCE_S)
        return source

    bridge = EvaluatorBridge(open_source, queue_size=2)
    try:
        for i in range(100):
            bridge.submit([steps(str(i))])
            bridge.forget_request(str(i), str(i))
        assert bridge.backlog == 2
        may_open.set()
        until(lambda: len(source.submitted) == 2)
        bridge.forget_request("r", "r")  # negative control: now it counts
        until(lambda: source.calls[-1] == ("forget_histories", ["r"], []))
    finally:
        bridge.close()


def test_close_does_not_wait_for_a_source_that_cannot_open() -> None:
    def open_source() -> Any:
        raise ConnectionError("no cluster")

    bridge = EvaluatorBridge(open_source, queue_size=2)
    gather(bridge, 1)
    bridge.close()
    assert not bridge._thread.is_alive()


def test_starting_and_submitting_do_not_wait_for_the_source_to_open() -> None:
    opened = threading.Event()

    def open_source() -> Any:
        opened.wait(PATIENCE_S)
        return Source()

    bridge = EvaluatorBridge(open_source, queue_size=2)  # returns though it is not open
    assert bridge.submit([steps()])
    assert bridge.drain() == []
    opened.set()
    bridge.close()
    assert not bridge._thread.is_alive()


def test_close_releases_the_source_once_and_may_be_called_again() -> None:
    source = Source()
    with running(source) as bridge:
        bridge.submit([steps()])
        gather(bridge, 1)
        for _ in range(3):
            bridge.close()
            assert not bridge._thread.is_alive()
        assert source.closed == 1
        bridge.submit([steps()])  # harmless
        bridge.forget_request("r", "r")
        assert bridge.drain() == []


def test_a_fault_while_closing_ends_the_thread_all_the_same() -> None:
    source = Source()
    source.faults["close"] = [RuntimeError("stuck")]
    with running(source) as bridge:
        pass
    assert reasons(bridge.drain()) == ["error"]


def test_close_gives_up_on_a_source_that_hangs() -> None:
    source = Source()
    source.go.clear()
    with running(source) as bridge:
        bridge.submit([steps()])
        until(lambda: source.submitted == [0])
        before = time.monotonic()
        bridge.close(timeout_s=0.05)
        assert time.monotonic() - before < PATIENCE_S / 2
        assert bridge._thread.daemon, "it must not keep the process alive"


class Broken(Source):
    """Everything that can fail fails, always."""

    @property
    def pending(self) -> int:
        raise RuntimeError("pending")


class Uncollectable(Source):
    def collect(self) -> list[Any]:
        raise RuntimeError("collect")


@pytest.mark.parametrize("source", [Broken, Uncollectable])
def test_a_lasting_fault_does_not_flood_the_engine(source: type[Source]) -> None:
    with running(source()) as bridge:
        bridge.submit([steps()])
        time.sleep(0.5)
        assert 1 <= len(bridge.drain()) <= 8
        assert bridge._thread.is_alive()


def test_faults_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memshare.search.bridge._AFTER_FAULT_S", 0.0)
    monkeypatch.setattr("memshare.search.bridge._MAX_FAULTS", 5)
    with running(Uncollectable()) as bridge:
        bridge.submit([steps()])
        until(lambda: bridge._outbox.qsize() == 5)
        time.sleep(0.05)
        assert len(bridge.drain()) == 5
