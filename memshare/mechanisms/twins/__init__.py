"""``twins``: blocks go first whose tokens appear elsewhere in the request too, at whatever offset.

Does: stage one links tokens that are written again in the same passage (``index``, ``finder``);
stage two compares their KV (``verifier``, ``worker``), and ``copies`` keeps what is known of each.
When blocks are short, ``policy`` gives up the best covered ones, never the last copy of anything.
Costs: stage one on an evaluator, a comparison per repeated token, about 60 bytes per token; what it
may give up ends at what the text repeats. From: the idea of MemShare (arXiv 2507.21433) token by
token; the rest is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memshare.mechanisms.remap.mechanism import OnDemandRemap
from memshare.mechanisms.twins.params import TwinsParams

if TYPE_CHECKING:
    from memshare.config import MemShareConfig, Setup
    from memshare.mechanisms.contract import SchedulerContext, WorkerContext
    from memshare.mechanisms.remap.worker import RemapWorkerPart
    from memshare.mechanisms.twins.finder import TwinFinder
    from memshare.mechanisms.twins.policy import TwinsPolicy
    from memshare.mechanisms.twins.scheduler import TwinsPart

_USUALLY_FREED = 0.25  # before nothing was left that stands elsewhere, see docs/benchmarks.md


class Twins(OnDemandRemap[TwinsParams]):
    """See module docstring."""

    params = TwinsParams
    searches = True

    def policy(self) -> TwinsPolicy:
        """See :meth:`OnDemandRemap.policy`."""
        from memshare.mechanisms.twins.policy import TwinsPolicy

        return TwinsPolicy(self._params)

    def refusals(self, setup: Setup) -> Iterator[str]:
        """See :meth:`Mechanism.refusals`."""
        from memshare.search.steps import tokenizer_refusals

        config = setup.config
        if config.scope != "request":
            yield (
                f"scope = {config.scope!r}: policy.name 'twins' works within one request\n"
                "    fix: set scope to 'request', or policy.name to 'paper'"
            )
        if config.distance.norm != "relative":
            yield (
                f"distance.norm = {config.distance.norm!r}: policy.name 'twins' compares tokens "
                "by the norm 'relative'\n"
                "    fix: set distance.norm to 'relative', or policy.name to 'paper'"
            )
        yield from tokenizer_refusals(setup)

    def usually_freed(self, config: MemShareConfig) -> float:
        """See :meth:`Mechanism.usually_freed`."""
        return _USUALLY_FREED

    def scheduler_part(self, context: SchedulerContext) -> TwinsPart:
        """See :meth:`Mechanism.scheduler_part`."""
        from memshare.mechanisms.twins.scheduler import TwinsPart

        return TwinsPart(context, self.policy())

    def worker_part(self, context: WorkerContext) -> RemapWorkerPart:
        """See :meth:`Mechanism.worker_part`."""
        from memshare.kv.comparer import KVComparer
        from memshare.mechanisms.remap.worker import RemapWorkerPart
        from memshare.mechanisms.twins.worker import TokenPairComparer

        kv = KVComparer(context.config.distance, context.layers, context.caches)
        return RemapWorkerPart(context.tables, TokenPairComparer(kv, context.token_map))

    def stage_one(self, config: MemShareConfig) -> TwinFinder:
        """See :meth:`Mechanism.stage_one`."""
        from memshare.mechanisms.twins.finder import TwinFinder

        return TwinFinder(self._params.shortest_run, config.evaluator.max_requests)
