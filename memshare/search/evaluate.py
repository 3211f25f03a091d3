"""Stage one as a service: the requests, the answers, and the interface of an evaluator.

An evaluator remembers the reasoning steps of each request. For a new step it finds earlier steps
with a similar bag of tokens, or, for the policy ``twins``, earlier tokens that occur in it again.
It sees token ids only. The engine talks to it through a bridge
(:class:`memshare.search.bridge.EvaluatorBridge`), so nothing here runs on the engine's critical
path.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import pairwise
from math import isfinite
from typing import Generic, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from memshare.config import MemShareConfig, StepConfig, registry
from memshare.search.lexical import StepIndex

Positions = npt.NDArray[np.int32]


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


class TwinLinks(NamedTuple):
    """Tokens of one request that have been written again.

    Attributes:
        request_id: the request.
        generation: its generation when the steps were sent.
        earlier: ``[N]`` int32 token positions, each at most once.
        later: ``[N]`` int32 positions of their twins, rising, ``later > earlier``.
    """

    request_id: str
    generation: int
    earlier: Positions
    later: Positions


@dataclass(frozen=True, slots=True)
class EvaluatorAnswer:
    """An evaluator's answer to one batch of :class:`NewSteps`."""

    matches: tuple[StepMatch, ...]
    sent_at: float
    links: tuple[TwinLinks, ...] = ()

    @classmethod
    def to(
        cls,
        batch: Sequence[NewSteps],
        matches: tuple[StepMatch, ...] = (),
        links: tuple[TwinLinks, ...] = (),
    ) -> EvaluatorAnswer:
        """What was found in a batch; its lag is that of the oldest steps in it."""
        return cls(matches, min((new.sent_at for new in batch), default=0.0), links)

    @staticmethod
    def is_sound(thing: object) -> bool:
        """Whether ``thing`` has this shape. Answers cross processes: they are not trusted."""
        return (
            isinstance(thing, EvaluatorAnswer)
            and _fits((thing.matches, thing.sent_at, thing.links), (tuple, float, tuple))
            and isfinite(thing.sent_at)
            and all(_is_sound_match(match) for match in thing.matches)
            and all(_are_sound_links(links) for links in thing.links)
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


def _are_sound_links(links: object) -> bool:
    return (
        isinstance(links, TwinLinks)
        and _fits(links, (str, int, np.ndarray, np.ndarray))
        and all(array.dtype == np.int32 and array.ndim == 1 for array in links[2:])
        and len(links.earlier) == len(links.later)
        and bool((links.earlier >= 0).all())
        and bool((links.later[1:] > links.later[:-1]).all())
        and bool((links.later > links.earlier).all())
        and len(np.unique(links.earlier)) == len(links.earlier)
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

    def collect(self) -> list[EvaluatorAnswer | EvaluatorError]:
        """Return, without blocking, what has been answered since the last call."""
        ...

    def forget_histories(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """Drop whole histories, and the steps of finished requests within shared histories."""
        ...

    def close(self) -> None:
        """Release what the source holds."""
        ...


class StageOne(Protocol):
    """What an evaluator computes."""

    def evaluate(self, batch: Sequence[NewSteps]) -> EvaluatorAnswer:
        """Compare every new step with its history, then add it to the history."""
        ...

    def forget_histories(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """See :meth:`CandidateSource.forget_histories`."""
        ...


def open_stage_one(config: MemShareConfig) -> StageOne:
    """Build what the configuration's policy needs."""
    mechanism = next(each for each in registry.candidates(config.policy) if each.searches)
    return mechanism.stage_one(config)


Index = TypeVar("Index")


class Histories(Generic[Index]):
    """One index per history; the least recently used go first."""

    def __init__(self, make: Callable[[], Index], limit: int) -> None:
        self._make = make
        self._limit = limit
        self._indexes: OrderedDict[str, Index] = OrderedDict()

    def __iter__(self) -> Iterator[Index]:
        return iter(self._indexes.values())

    def of(self, key: str) -> Index:
        """The history's index, made if there is none."""
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = self._make()
            if len(self._indexes) > self._limit:
                self._indexes.popitem(last=False)
        else:
            self._indexes.move_to_end(key)
        return index

    def drop(self, keys: Sequence[str]) -> None:
        """Forget whole histories."""
        for key in keys:
            self._indexes.pop(key, None)


class LexicalEvaluator:
    """Similar steps: one :class:`~memshare.search.lexical.StepIndex` per history."""

    def __init__(self, steps: StepConfig, max_requests: int) -> None:
        self._steps = steps
        self._histories: Histories[StepIndex[Span]] = Histories(
            lambda: StepIndex(steps.max_history), max_requests
        )

    def evaluate(self, batch: Sequence[NewSteps]) -> EvaluatorAnswer:
        """See :meth:`StageOne.evaluate`."""
        matches: list[StepMatch] = []
        for new in batch:
            index = self._histories.of(new.history)
            for first, last in pairwise(new.bounds):
                span = Span(
                    new.request_id, new.generation, new.position + first, new.position + last
                )
                found = index.match_and_add(
                    new.tokens[first:last], span, new.threshold, self._steps.max_matches
                )
                matches.extend(StepMatch(span, earlier, score) for earlier, score in found)
        return EvaluatorAnswer.to(batch, matches=tuple(matches))

    def forget_histories(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """See :meth:`CandidateSource.forget_histories`."""
        self._histories.drop(histories)
        gone = set(request_ids)
        if gone:
            for index in self._histories:
                index.discard(lambda span: span.request_id in gone)


class InProcessSource:
    """Evaluates at once, on the calling (bridge) thread."""

    def __init__(self, config: MemShareConfig) -> None:
        self._evaluator = open_stage_one(config)
        self._answers: deque[EvaluatorAnswer | EvaluatorError] = deque()

    @property
    def pending(self) -> int:
        """See :attr:`CandidateSource.pending`."""
        return len(self._answers)

    def submit(self, batch: Sequence[NewSteps]) -> None:
        """See :meth:`CandidateSource.submit`."""
        self._answers.append(self._evaluator.evaluate(batch))

    def collect(self) -> list[EvaluatorAnswer | EvaluatorError]:
        """See :meth:`CandidateSource.collect`."""
        answers = list(self._answers)
        self._answers.clear()
        return answers

    def forget_histories(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """See :meth:`CandidateSource.forget_histories`."""
        self._evaluator.forget_histories(histories, request_ids)

    def close(self) -> None:
        """See :meth:`CandidateSource.close`."""


SOURCES = "memshare.candidate_sources"
"""The entry point group of sources outside the library, which never imports Ray itself; an entry's
name is the value of ``evaluator.source``, its object is called with the configuration."""


def open_source(config: MemShareConfig) -> CandidateSource:
    """Build the candidate source that ``config.evaluator.source`` names.

    Raises:
        LookupError: no installed package has it.
    """
    name = config.evaluator.source
    if name == "in_process":
        return InProcessSource(config)
    for entry in entry_points(group=SOURCES, name=name):
        return cast(CandidateSource, entry.load()(config))
    raise LookupError(
        f"no installed package has the candidate source {name!r}; install memshare again, or set "
        "evaluator.source to 'in_process'"
    )
