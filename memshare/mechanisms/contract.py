"""What a mechanism is: its parameters, what it refuses, and its two halves.

One engine step, as a mechanism sees it. The scheduler calls ``begin_step``, then ``on_tokens`` for
each request that has filled a block, then ``reclaim`` if blocks are short, then ``commands``; these
go to the workers with the step. Each worker calls ``before_step`` with them, runs the model, and
calls ``after_step``; what all ranks return is added up and comes back as ``on_results``, in this
step or in a later one. Every hook does nothing by default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from memshare.config.fields import PolicyParams, Section

if TYPE_CHECKING:
    from torch import Tensor

    from memshare.config import MemShareConfig, Setup
    from memshare.core.interfaces import (
        AttentionView,
        BlockTables,
        PageSelector,
        WorkerTables,
    )
    from memshare.core.rank_reducer import Reducible
    from memshare.core.request_tracker import RequestTracker
    from memshare.core.requests import RequestState
    from memshare.core.token_map import TokenMap
    from memshare.kv.layout import CachedLayer
    from memshare.search.bridge import EvaluatorBridge
    from memshare.search.evaluate import StageOne
    from memshare.search.steps import DelimiterAutomaton
    from memshare.telemetry.explain import Cause
    from memshare.telemetry.recorder import Recorder
    from memshare.telemetry.stats import DropReason


@dataclass(frozen=True, slots=True)
class SchedulerContext:
    """What a scheduler part works with.

    Attributes:
        config: all of MemShare's options.
        tables: the scheduler's block tables.
        tracker: the requests that are followed, and the limits of each.
        recorder: counters, explanations, event log.
        world_size: ranks whose partial results make a whole one.
        report_faults: tells of differences between our books and the workers'; sharing stops.
        compile_steps: compiles the step delimiters against the model's tokenizer.
        open_bridge: starts the bridge to the evaluators.
    """

    config: MemShareConfig
    tables: BlockTables
    tracker: RequestTracker
    recorder: Recorder
    world_size: int
    report_faults: Callable[[Sequence[str]], None]
    compile_steps: Callable[[], DelimiterAutomaton]
    open_bridge: Callable[[], EvaluatorBridge]


class SchedulerPart:
    """The half of a mechanism in the scheduler's process. Called on the engine's thread alone."""

    def begin_step(self) -> None:
        """A step has been scheduled: take what has come in from elsewhere since the last one."""

    def on_tokens(self, state: RequestState) -> None:
        """The request has filled a block; ``state.full`` counts it."""

    def on_results(self, results: Any) -> None:
        """What workers have found: what their ``after_step`` returned, added up over ranks."""

    def reclaim(self, wanted: int, cause: Cause) -> int:
        """Free up to ``wanted`` blocks of running requests in this very step; returns how many."""
        return 0

    def commands(self) -> object | None:
        """What goes to the workers with this step; None if nothing does. It must pickle."""
        return None

    def on_gone(self, state: RequestState, reason: DropReason) -> None:
        """The request's blocks are gone, or about to go: finished, aborted or preempted."""

    def close(self) -> None:
        """The engine shuts down. Idempotent."""

    # ---- what others ask of it ----

    @property
    def reclaimable(self) -> int:
        """Blocks that :meth:`reclaim` can free beyond the expected savings of all requests;
        negative where some of those have been had already."""
        return 0

    def expected_savings(self, state: RequestState, tokens: int) -> int:
        """Blocks that a request of so many tokens is expected to do without. Admission counts on
        them."""
        return 0

    def obstacle(self) -> str:
        """Why :meth:`reclaim` frees nothing now, in words."""
        return "the mechanism reclaims nothing"

    def gauges(self) -> Mapping[str, float]:
        """Values now, by name in ``memshare.telemetry.metrics.GAUGES``."""
        return {}

    def faults(self) -> Iterator[str]:
        """Differences between its books and the block tables; none if all is well."""
        yield from ()


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker part works with, on one rank.

    Attributes:
        config: all of MemShare's options.
        tables: the worker's block tables.
        token_map: where tokens lie under their entries.
        layers: the attention layers whose entries those are, by name.
        caches: the KV cache of each, ``[blocks, heads, slots, 2 * channels]``.
        view: what attention sees of the tables; None unless a mechanism edits it.
        selector: what chooses the pages that attention reads; None unless that is on.
        model: folder or hub id of the model.
        tensor_rank: which of the ranks that share the heads this one is.
        tensor_ranks: how many these are.
    """

    config: MemShareConfig
    tables: WorkerTables
    token_map: TokenMap
    layers: Mapping[str, CachedLayer]
    caches: Mapping[str, Tensor]
    view: AttentionView | None = None
    selector: PageSelector | None = None
    model: str = ""
    tensor_rank: int = 0
    tensor_ranks: int = 1


class WorkerPart:
    """The half of a mechanism on each worker."""

    def before_step(self, commands: Any) -> None:
        """Do what :meth:`SchedulerPart.commands` asks, before the model runner reads its tables."""

    def after_step(self) -> Reducible | None:
        """Behind the forward pass: what this rank has to report; None if nothing. Must not wait for
        the device."""
        return None


Params = TypeVar("Params", bound=Section)


class Mechanism(ABC, Generic[Params]):
    """One way to need less KV memory.

    Attributes:
        params: the section ``policy`` of the configuration, when its ``name`` chooses this. What
            has a section of its own needs none.
        searches: whether it needs the evaluators, and with them steps and a tokenizer.
        drops_tokens: whether what it gives up is dropped, so that ``budget.max_dropped_fraction``
            bounds it; else ``budget.max_shared_fraction`` does.
        edits_view: whether it leaves null entries in tables, which attention must not see. Costs
            an extension of the attention backend, so only where it is needed.
    """

    params: ClassVar[type[PolicyParams]]
    searches: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = False
    edits_view: ClassVar[bool] = False

    def __init__(self, params: Params) -> None:
        self._params = params

    @property
    def chosen(self) -> Params:
        """Its parameters."""
        return self._params

    def shortcoming(self, setup: Setup) -> str | None:
        """Why it should not be preferred in an engine, though it may be asked for: what the policy
        ``auto`` asks. None if it has all that it needs there."""
        return next(self.refusals(setup), None)

    def refusals(self, setup: Setup) -> Iterator[str]:
        """What it cannot work with, each with the way out. Asked before anything loads: when the
        configuration is read, and again when the engine is known."""
        yield from ()

    def usually_freed(self, config: MemShareConfig) -> float:
        """Fraction of a request's full blocks that it gives up under pressure, 0..1: what
        ``memshare check`` counts on. Where texts decide, what they were seen to allow."""
        return config.max_given_up

    @abstractmethod
    def scheduler_part(self, context: SchedulerContext) -> SchedulerPart:
        """Build the scheduler's half."""

    @abstractmethod
    def worker_part(self, context: WorkerContext) -> WorkerPart:
        """Build one worker's half."""

    def stage_one(self, config: MemShareConfig) -> StageOne:
        """Build what an evaluator computes for it, if it ``searches``."""
        raise NotImplementedError(f"{type(self).__name__} searches nothing")
