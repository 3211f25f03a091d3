"""One thread between the engine and the evaluators, so that the engine never waits.

The engine thread only puts to and takes from two queues (about 1 us each). Everything that may
block or fail happens on the bridge thread. Work that cannot be accepted is dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Protocol, cast

from memshare.search.evaluate import CandidateSource, EvaluatorAnswer, EvaluatorError, NewSteps

logger = logging.getLogger(__name__)

_AFTER_FAULT_S = 0.1  # a source that fails all the time must not keep a core busy
_MAX_FAULTS = 1024
_POLL_S = 0.002  # how long an answer may lie unnoticed while batches are under way,
_MAX_POLL_S = 0.05  # and how long if none has come for a while
_MAX_BATCH = 64  # batches folded into one submit: one slow call must not starve the queue


class _Forget:
    __slots__ = ("history", "request_id")

    def __init__(self, history: str, request_id: str) -> None:
        self.history = history
        self.request_id = request_id


class Bridge(Protocol):
    """What takes finished steps to the evaluators, and brings their answers back."""

    def submit(self, batch: list[NewSteps]) -> bool:
        """Hand over finished steps; False if they were dropped. Does not block."""
        ...

    def forget_request(self, history: str, request_id: str) -> None:
        """Tell the evaluators that a request is gone."""
        ...

    def drain(self) -> list[EvaluatorAnswer | EvaluatorError]:
        """Take the answers and faults that have come in. Does not block."""
        ...

    def close(self) -> None:
        """Release what it holds. Idempotent."""
        ...


class EvaluatorBridge:
    """Feeds a candidate source from a bounded queue and brings its answers back.

    ``submit``, ``forget_request`` and ``drain`` belong to the engine thread; everything else to the
    bridge.
    """

    def __init__(self, open_source: Callable[[], CandidateSource], queue_size: int) -> None:
        """Start the thread. ``open_source`` runs on it: connecting must not delay the engine."""
        self._open_source = open_source
        self._queue_size = queue_size
        self._inbox: SimpleQueue[list[NewSteps] | _Forget | None] = SimpleQueue()
        self._is_open = False
        self._poll_s = _POLL_S
        self._outbox: SimpleQueue[EvaluatorAnswer | EvaluatorError] = SimpleQueue()
        self._complaints = _RateLimitedLog(every_s=30.0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memshare-bridge", daemon=True)
        self._thread.start()

    def submit(self, batch: list[NewSteps]) -> bool:
        """Hand over finished steps; False if the queue is full and they were dropped."""
        if self._inbox.qsize() >= self._queue_size:
            return False
        self._inbox.put(batch)
        return True

    def forget_request(self, history: str, request_id: str) -> None:
        """Tell the evaluators that a request is gone.

        Never dropped, because it is what bounds their memory; but as long as no evaluator could be
        reached there is nothing to forget, and nothing may pile up.
        """
        if self._is_open:
            self._inbox.put(_Forget(history, request_id))

    def drain(self) -> list[EvaluatorAnswer | EvaluatorError]:
        """Take the answers and faults that have come in. Does not block."""
        items: list[EvaluatorAnswer | EvaluatorError] = []
        while not self._outbox.empty():
            items.append(self._outbox.get_nowait())
        return items

    @property
    def backlog(self) -> int:
        """Batches waiting for the bridge thread."""
        return self._inbox.qsize()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the thread and release the source. Idempotent."""
        self._stopping.set()
        self._inbox.put(None)
        self._thread.join(timeout_s)

    # ---- bridge thread ----

    def _run(self) -> None:
        source = self._connect()
        if source is None:
            return
        try:
            while not self._stopping.is_set():
                if not self._guard(lambda: self._step(source, self._take(source.pending > 0))):
                    self._stopping.wait(_AFTER_FAULT_S)
        finally:
            self._guard(source.close)

    def _connect(self) -> CandidateSource | None:
        """Open the source, for as long as it takes; meanwhile steps pile up and are dropped."""
        pause_s = 1.0
        while not self._stopping.is_set():
            source: list[CandidateSource] = []
            self._guard(lambda: source.append(self._open_source()))  # noqa: B023 - runs at once
            if source:
                self._is_open = True
                return source[0]
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, 30.0)
        return None

    def _take(self, expecting: bool) -> list[list[NewSteps] | _Forget]:
        """Wait for work; no longer than until it is time to look for answers, if any are due."""
        items: list[list[NewSteps] | _Forget] = []
        try:
            item = self._inbox.get(timeout=self._poll_s if expecting else None)
            while item is not None:
                items.append(item)
                if len(items) >= _MAX_BATCH:
                    break
                item = self._inbox.get_nowait()
        except Empty:
            pass
        return items

    def _step(self, source: CandidateSource, items: list[list[NewSteps] | _Forget]) -> None:
        # In order: a preempted request is forgotten before its steps arrive again.
        for are_steps, group in groupby(items, lambda item: isinstance(item, list)):
            if are_steps:
                batch = [new for news in cast("list[list[NewSteps]]", list(group)) for new in news]
                self._guard(lambda: source.submit(batch))  # noqa: B023 - runs at once
            else:
                gone = cast("list[_Forget]", list(group))
                private = [g.history for g in gone if g.history == g.request_id]
                shared = [g.request_id for g in gone if g.history != g.request_id]
                drop = partial(source.forget_histories, private, shared)
                self._guard(drop)
        answers = source.collect()
        # An evaluator that is slow is asked less often: each look takes the interpreter.
        self._poll_s = _POLL_S if answers or items else min(2 * self._poll_s, _MAX_POLL_S)
        for item in answers:
            sound = isinstance(item, EvaluatorError) or EvaluatorAnswer.is_sound(item)
            self._outbox.put(item if sound else EvaluatorError("garbage", repr(item)[:200]))

    def _guard(self, action: Callable[[], None]) -> bool:
        """Run ``action``; a fault in an optional part is reported, and never ends the thread.

        Returns:
            Whether it ran without a fault.
        """
        try:
            action()
            return True
        except EvaluatorError as error:
            fault = error
        except Exception as error:
            self._complaints.report(error)
            fault = EvaluatorError("error", repr(error)[:200])
        if self._outbox.qsize() < _MAX_FAULTS:  # an idle engine takes nothing out
            self._outbox.put(fault)
        return False


class _RateLimitedLog:
    """Logs a kind of error at most once in ``every_s`` seconds, with how often it occurred."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._seen: Counter[str] = Counter()
        self._last: dict[str, float] = {}

    def report(self, error: Exception) -> None:
        kind = type(error).__name__
        self._seen[kind] += 1
        now = time.monotonic()
        if now - self._last.get(kind, -self._every_s) >= self._every_s:
            self._last[kind] = now
            logger.warning(
                "evaluator fault (%d so far), serving goes on", self._seen[kind], exc_info=error
            )
