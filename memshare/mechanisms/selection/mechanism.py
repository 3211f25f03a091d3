"""Page selection as a mechanism beside the policy. Light: a configuration imports it."""

from __future__ import annotations

from memshare.config import SelectionConfig
from memshare.mechanisms.contract import (
    Mechanism,
    SchedulerContext,
    SchedulerPart,
    WorkerContext,
    WorkerPart,
)
from memshare.mechanisms.selection.messages import SelectionCommands, SelectionReport


class PageSelection(Mechanism[SelectionConfig]):
    """See the package's docstring. The section ``selection`` switches it on, not ``policy.name``.

    Why an engine cannot select pages depends on its attention, which its adapter knows
    (:meth:`~memshare.engine.adapter.Adapter.selection_refusals`).
    """

    def scheduler_part(self, context: SchedulerContext) -> SelectionPart:
        """See :meth:`Mechanism.scheduler_part`."""
        return SelectionPart(context)

    def worker_part(self, context: WorkerContext) -> SelectionWorkerPart:
        """See :meth:`Mechanism.worker_part`."""
        return SelectionWorkerPart(context)


class SelectionPart(SchedulerPart):
    """Says which requests read everything, and counts what the others read."""

    def __init__(self, context: SchedulerContext) -> None:
        self._tracker = context.tracker
        self._counters = context.recorder.counters

    def commands(self) -> SelectionCommands | None:
        """See :meth:`SchedulerPart.commands`."""
        exact = self._tracker.exact
        return SelectionCommands(frozenset(exact)) if exact else None

    def on_results(self, results: SelectionReport) -> None:
        """See :meth:`SchedulerPart.on_results`."""
        self._counters.add("pages_read", results.read)
        self._counters.add("pages_there", results.there)


class SelectionWorkerPart(WorkerPart):
    """Hands on to attention which requests read everything, and reports what was read."""

    def __init__(self, context: WorkerContext) -> None:
        assert context.selector is not None, "the engine was started without page selection"
        self._selector = context.selector

    def before_step(self, commands: SelectionCommands) -> None:
        """See :meth:`WorkerPart.before_step`."""
        self._selector.read_all(commands.exact)

    def after_step(self) -> SelectionReport | None:
        """See :meth:`WorkerPart.after_step`."""
        read, there = self._selector.take_counts()
        return SelectionReport(read, there) if there else None
