"""The mechanism ``compaction``. Light: a configuration imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memshare.mechanisms.compaction.params import CompactionParams
from memshare.mechanisms.contract import Mechanism

if TYPE_CHECKING:
    from memshare.config import Setup
    from memshare.mechanisms.compaction.scheduler import CompactionPart
    from memshare.mechanisms.contract import SchedulerContext, WorkerContext, WorkerPart


class Compaction(Mechanism[CompactionParams]):
    """See the package's docstring."""

    params = CompactionParams
    drops_tokens = True
    edits_view = True

    def refusals(self, setup: Setup) -> Iterator[str]:
        """See :meth:`Mechanism.refusals`."""
        from memshare.mechanisms.compaction.scorers.refusals import scorer_refusals

        yield from scorer_refusals(self._params, setup)
        if setup.config.scope != "request":
            yield (
                f"scope = {setup.config.scope!r}: policy.name 'compaction' works within one "
                "request\n    fix: set scope to 'request', or policy.name to 'paper'"
            )

    def shortcoming(self, setup: Setup) -> str | None:
        """See :meth:`Mechanism.shortcoming`. It should have a probe, and something to do."""
        if setup.config.mode == "observe":
            return "it observes nothing"
        refusal = super().shortcoming(setup)
        if refusal is None:
            from memshare.mechanisms.compaction.scorers.refusals import without_probe

            refusal = without_probe(setup)
        return refusal

    def scheduler_part(self, context: SchedulerContext) -> CompactionPart:
        """See :meth:`Mechanism.scheduler_part`."""
        from memshare.mechanisms.compaction.scheduler import CompactionPart

        return CompactionPart(context, self._params)

    def worker_part(self, context: WorkerContext) -> WorkerPart:
        """See :meth:`Mechanism.worker_part`."""
        from memshare.mechanisms.compaction.worker import CompactionWorkerPart

        return CompactionWorkerPart(context, self._params)
