"""Page selection as a mechanism beside the policy. Light: a configuration imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memshare.config import SelectionConfig
from memshare.mechanisms.contract import (
    Mechanism,
    SchedulerContext,
    SchedulerPart,
    WorkerContext,
    WorkerPart,
)
from memshare.mechanisms.selection.budget import chooses
from memshare.mechanisms.selection.messages import SelectionCommands, SelectionReport

if TYPE_CHECKING:
    from memshare.core.requests import RequestState


class PageSelection(Mechanism[SelectionConfig]):
    """See the package's docstring. The section ``selection`` switches it on, not ``policy.name``.

    Why an engine cannot select pages depends on its attention, which its adapter knows
    (:meth:`~memshare.engine.adapter.Adapter.selection_refusals`).
    """

    def scheduler_part(self, context: SchedulerContext) -> SelectionPart:
        """See :meth:`Mechanism.scheduler_part`."""
        return SelectionPart(context, self._params)

    def worker_part(self, context: WorkerContext) -> SelectionWorkerPart:
        """See :meth:`Mechanism.worker_part`."""
        return SelectionWorkerPart(context)


class SelectionPart(SchedulerPart):
    """Says which requests read everything, keeps what the others generate out of the prefix cache,
    and counts what they read."""

    def __init__(self, context: SchedulerContext, config: SelectionConfig) -> None:
        self._config = config
        self._tables = context.tables
        self._tracker = context.tracker
        self._counters = context.recorder.counters

    def begin_step(self) -> None:
        """See :meth:`SchedulerPart.begin_step`."""
        for state in self._tracker:
            if state.tainted_from is None:
                self._stop_publishing(state)

    def _stop_publishing(self, state: RequestState) -> None:
        """From the step on in which a request first chooses pages, what it writes is approximate,
        and requests that read everything must not find it."""
        request, token_map = state.request, self._tables.token_map
        computed = request.num_computed_tokens  # those of this step come behind
        if computed < request.num_prompt_tokens or self._tables.table(state.request_id) is None:
            return
        if not chooses(self._config, token_map.entries(computed + 1)):
            return
        # vLLM publishes a block when it schedules the step that completes it: this one, at worst.
        # Another request may have found it within that step; then the next step tries again.
        if self._tables.unpublish_step(request):
            self._tables.stop_publishing(state.request_id)
            state.tainted_from = token_map.full(computed)

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
