"""Stage one as a service: what goes to an evaluator, what comes back, and who may be one.

An evaluator remembers the reasoning steps of each request and finds, for a new step, earlier steps
with a similar bag of tokens. It sees token ids only. The engine talks to it through
:class:`memshare.bridge.EvaluatorBridge`, so nothing here runs on the engine's critical path.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from typing import NamedTuple, Protocol, cast

from memshare.config import MemShareConfig, StepConfig
from memshare.lexical import StepIndex


class NewSteps(NamedTuple):
    """Steps that one request has just finished, back to back.

    Attributes:
        request_id: the request that wrote them.
        generation: its generation; a preemption starts a new one.
        history: key of the steps to compare with: the request itself, or its tenant.
        position: index of ``tokens[0]`` among the request's tokens.
        tokens: ``[T]`` token ids of all steps.
        bounds: ``[S + 1]`` offsets into ``tokens``; step s is ``tokens[bounds[s]:bounds[s+1]]``.
        threshold: cosine at or above which an earlier step is a match.
        sent_at: ``time.monotonic()`` of the engine, echoed in the answer to measure lag. Seconds.
    """

    request_id: str
    generation: int
    history: str
    position: int
    tokens: Sequence[int]
    bounds: tuple[int, ...]
    threshold: float
    sent_at: float


class Span(NamedTuple):
    """One step of one request: token positions ``[start, end)``."""

    request_id: str
    generation: int
    start: int
    end: int


class StepMatch(NamedTuple):
    """Two similar steps; ``later`` has just been written."""

    later: Span
    earlier: Span
    similarity: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An evaluator's answer to one batch of :class:`NewSteps`."""

    matches: tuple[StepMatch, ...]
    sent_at: float

    @staticmethod
    def is_sound(thing: object) -> bool:
        """Whether ``thing`` has this shape. Answers cross processes: they are not trusted."""
        return (
            isinstance(thing, Answer)
            and _fits((thing.matches, thing.sent_at), (tuple, float))
            and isfinite(thing.sent_at)
            and all(_is_sound_match(match) for match in thing.matches)
        )


def _is_sound_match(match: object) -> bool:
    return (
        isinstance(match, StepMatch)
        and _fits(match, (Span, Span, float))
        and isfinite(match.similarity)
        and all(
            _fits(span, (str, int, int, int)) and 0 <= span.start < span.end
            for span in (match.later, match.earlier)
        )
    )


def _fits(values: Iterable[object], types: Iterable[type]) -> bool:
    return all(isinstance(value, kind) for value, kind in zip(values, types, strict=True))


class EvaluatorError(RuntimeError):
    """An evaluator could not take or answer a batch. Its steps are dropped; serving goes on.

    ``reason`` is a metric label: ``busy``, ``dead``, ``timeout``, ``garbage`` or ``error``.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class CandidateSource(Protocol):
    """Where candidate pairs come from. Every method is called by the bridge thread only."""

    @property
    def pending(self) -> int:
        """Batches that were submitted and not yet collected."""
        ...

    def submit(self, batch: Sequence[NewSteps]) -> None:
        """Start evaluating. Must not block on the evaluation.

        Raises:
            EvaluatorError: the batch was not taken.
        """
        ...

    def collect(self) -> list[Answer | EvaluatorError]:
        """Return, without blocking, what has been answered since the last call."""
        ...

    def forget(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """Drop whole histories, and the steps of finished requests within shared histories."""
        ...

    def close(self) -> None:
        """Release what the source holds."""
        ...


class LexicalEvaluator:
    """Stage one itself: one :class:`~memshare.lexical.StepIndex` per history, LRU-bounded."""

    def __init__(self, steps: StepConfig, max_requests: int) -> None:
        self._steps = steps
        self._max_requests = max_requests
        self._histories: OrderedDict[str, StepIndex[Span]] = OrderedDict()

    def evaluate(self, batch: Sequence[NewSteps]) -> Answer:
        """Match every new step against its history, then add it to the history."""
        matches: list[StepMatch] = []
        for new in batch:
            index = self._history(new.history)
            for first, last in zip(new.bounds, new.bounds[1:], strict=False):
                span = Span(
                    new.request_id, new.generation, new.position + first, new.position + last
                )
                found = index.match_and_add(
                    new.tokens[first:last], span, new.threshold, self._steps.max_matches
                )
                matches.extend(StepMatch(span, earlier, score) for earlier, score in found)
        return Answer(tuple(matches), min((new.sent_at for new in batch), default=0.0))

    def forget(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """See :meth:`CandidateSource.forget`."""
        for key in histories:
            self._histories.pop(key, None)
        gone = set(request_ids)
        if gone:
            for index in self._histories.values():
                index.discard(lambda span: span.request_id in gone)

    def _history(self, key: str) -> StepIndex[Span]:
        index = self._histories.get(key)
        if index is None:
            index = self._histories[key] = StepIndex(self._steps.max_history)
            if len(self._histories) > self._max_requests:
                self._histories.popitem(last=False)
        else:
            self._histories.move_to_end(key)
        return index


class InProcessSource:
    """Evaluates at once, on the calling (bridge) thread."""

    def __init__(self, config: MemShareConfig) -> None:
        self._evaluator = LexicalEvaluator(config.steps, config.evaluator.max_requests)
        self._answers: deque[Answer | EvaluatorError] = deque()

    @property
    def pending(self) -> int:
        """See :attr:`CandidateSource.pending`."""
        return len(self._answers)

    def submit(self, batch: Sequence[NewSteps]) -> None:
        """See :meth:`CandidateSource.submit`."""
        self._answers.append(self._evaluator.evaluate(batch))

    def collect(self) -> list[Answer | EvaluatorError]:
        """See :meth:`CandidateSource.collect`."""
        answers = list(self._answers)
        self._answers.clear()
        return answers

    def forget(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """See :meth:`CandidateSource.forget`."""
        self._evaluator.forget(histories, request_ids)

    def close(self) -> None:
        """See :meth:`CandidateSource.close`."""


# Sources by name, imported only when chosen: the library itself never imports Ray.
_SOURCES = {
    "in_process": "memshare.evaluate:InProcessSource",
    "ray": "cluster.evaluators:RayCandidateSource",
}


def open_source(config: MemShareConfig) -> CandidateSource:
    """Build the candidate source that ``config.evaluator.source`` names."""
    module, _, name = _SOURCES[config.evaluator.source].partition(":")
    return cast(CandidateSource, getattr(import_module(module), name)(config))
