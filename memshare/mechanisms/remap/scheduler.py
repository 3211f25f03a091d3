"""The scheduler part of every mechanism that remaps: both stages, the books, the commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from memshare.core.rank_reducer import JobResult
from memshare.core.requests import RequestState
from memshare.mechanisms.contract import SchedulerContext, SchedulerPart
from memshare.mechanisms.remap.messages import Batch, RemapCommands, RemapResults
from memshare.mechanisms.remap.pairs import Candidate, PairRecorder
from memshare.mechanisms.remap.remapper import Remapper
from memshare.mechanisms.remap.view import TableView
from memshare.search.evaluate import EvaluatorAnswer
from memshare.search.step_feeder import StepFeeder
from memshare.telemetry.explain import Cause
from memshare.telemetry.stats import DropReason


class PairVerifier(Protocol):
    """Turns stage one's answers into stage two's jobs for the workers, and learns from their
    results. Every job is answered by all ranks or discarded, once."""

    def __len__(self) -> int:
        """Pairs that wait for stage two."""
        ...

    @property
    def running(self) -> int:
        """Pairs that the workers have not answered yet."""
        ...

    def propose(self, answer: EvaluatorAnswer) -> None:
        """Take candidate pairs from an evaluator. It is not trusted."""
        ...

    def take_batches(self) -> tuple[Batch, ...]:
        """This step's jobs."""
        ...

    def receive(self, results: dict[int, JobResult]) -> None:
        """Take what some ranks have found."""
        ...

    def on_tokens(self, state: RequestState) -> None:
        """The request has filled a block."""
        ...

    def forget_request(self, state: RequestState) -> None:
        """The request's blocks are gone, or about to go."""
        ...


@dataclass(frozen=True, slots=True)
class Stages:
    """Stage one and stage two of a mechanism that compares before it remaps."""

    feeder: StepFeeder
    verifier: PairVerifier


class RemapPart(SchedulerPart):
    """Base of scheduler parts that remap. A subclass says which pairs are applied, and when.

    Attributes:
        remapper: applies pairs, and counts what is shared.
        stages: None for a mechanism that compares nothing.
    """

    def __init__(self, context: SchedulerContext, stages: Stages | None = None) -> None:
        self.pairs = PairRecorder(context.recorder)
        self.remapper = Remapper(context.tables, context.tracker, self.pairs)
        self.stages = stages
        self._context = context
        self._tables = context.tables
        self._tracker = context.tracker

    def __len__(self) -> int:
        """Verified pairs that wait to be applied."""
        return 0

    def begin_step(self) -> None:
        """Take what the evaluators have answered."""
        if self.stages is not None:
            for answer in self.stages.feeder.answers():
                self.stages.verifier.propose(answer)

    def on_tokens(self, state: RequestState) -> None:
        """Feed the evaluators with what the request has written."""
        if self.stages is not None:
            self.stages.feeder.feed(state, self._tables.token_map.first_position(state.full))
            self.stages.verifier.on_tokens(state)

    def on_results(self, results: RemapResults) -> None:
        """Learn what was compared; a remap that a worker missed is a fault."""
        if self.stages is not None:
            self.stages.verifier.receive(results.results)
        if results.misses:
            self._context.recorder.counters.add("remap_misses", results.misses)
            # The block is free, and a worker may still read it.
            self._context.report_faults(
                [f"workers did not know {results.misses} remapped requests"]
            )

    def commands(self) -> RemapCommands | None:
        """This step's remaps and comparisons."""
        remaps = self.remapper.take_remaps()
        batches: tuple[Batch, ...] = ()
        if self.stages is not None:
            self.stages.feeder.send()
            batches = self.stages.verifier.take_batches()
        return RemapCommands(remaps, batches) if remaps or batches else None

    def on_gone(self, state: RequestState, reason: DropReason) -> None:
        """See :meth:`SchedulerPart.on_gone`."""
        self.remapper.forget_request(state)
        if self.stages is not None:
            self.stages.feeder.forget_request(state)
            self.stages.verifier.forget_request(state)

    def close(self) -> None:
        """Stop the bridge to the evaluators."""
        if self.stages is not None:
            self.stages.feeder.close()

    def gauges(self) -> Mapping[str, float]:
        """See :meth:`SchedulerPart.gauges`."""
        return {
            "queue_length": float(len(self)),
            "pairs_waiting": float(len(self.stages.verifier)) if self.stages is not None else 0.0,
            "shared_entries": float(self.remapper.shared_entries),
        }

    def faults(self) -> Iterator[str]:
        """See :meth:`SchedulerPart.faults`."""
        return self.remapper.faults()

    def view(self, state: RequestState) -> TableView:
        """The request's blocks as a policy sees them; it must hold some."""
        return TableView(self._tracker, self._tables, state)

    def objection(self, state: RequestState, view: TableView, index: int) -> str | None:
        """Why a block that may go is not given up, in words; None if nothing stands against it."""
        del state, view, index
        return None

    def apply(self, pair: Candidate, cause: Cause) -> int:
        """Do a remap; returns how many blocks it has freed."""
        return self.remapper.apply(pair, cause)
