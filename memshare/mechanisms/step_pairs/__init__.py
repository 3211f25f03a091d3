"""``paper``: aligned blocks of lexically similar steps (policy ``paper``).

Does: stage one finds earlier steps with a similar bag of tokens; the k-th blocks of the two steps
are compared in the KV cache (stage two), and verified pairs wait until blocks are short, cheapest
first. Costs: the evaluators and stage two run all the time; finds little at the block sizes that
engines use. From: MemShare / ReasonCache, arXiv 2507.21433, section on collaborative filtering.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memshare.mechanisms.contract import Mechanism
from memshare.mechanisms.step_pairs.params import PaperParams

if TYPE_CHECKING:
    from memshare.config import MemShareConfig, Setup
    from memshare.mechanisms.contract import SchedulerContext, WorkerContext
    from memshare.mechanisms.remap.worker import RemapWorkerPart
    from memshare.mechanisms.step_pairs.scheduler import StepPairsPart
    from memshare.search.evaluate import LexicalEvaluator


class StepPairs(Mechanism[PaperParams]):
    """See module docstring."""

    params = PaperParams
    searches = True

    def refusals(self, setup: Setup) -> Iterator[str]:
        """See :meth:`Mechanism.refusals`."""
        from memshare.search.steps import tokenizer_refusals

        return tokenizer_refusals(setup)

    def usually_freed(self, config: MemShareConfig) -> float:
        """See :meth:`Mechanism.usually_freed`: hardly anything, at the block sizes of engines."""
        return 0.0

    def scheduler_part(self, context: SchedulerContext) -> StepPairsPart:
        """See :meth:`Mechanism.scheduler_part`."""
        from memshare.mechanisms.step_pairs.policy import PairProposer
        from memshare.mechanisms.step_pairs.scheduler import StepPairsPart

        return StepPairsPart(context, PairProposer(self._params))

    def worker_part(self, context: WorkerContext) -> RemapWorkerPart:
        """See :meth:`Mechanism.worker_part`."""
        from memshare.kv.comparer import KVComparer
        from memshare.mechanisms.remap.worker import RemapWorkerPart
        from memshare.mechanisms.step_pairs.worker import BlockPairComparer

        kv = KVComparer(context.config.distance, context.layers, context.caches)
        return RemapWorkerPart(context.tables, BlockPairComparer(kv))

    def stage_one(self, config: MemShareConfig) -> LexicalEvaluator:
        """See :meth:`Mechanism.stage_one`."""
        from memshare.search.evaluate import LexicalEvaluator

        return LexicalEvaluator(config.steps, config.evaluator.max_requests)
