"""``recency``: the newest tokens are worth most, whatever they are. Needs nothing of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from memshare.mechanisms.compaction.scorers.registry import ScorerChoice
    from memshare.mechanisms.contract import WorkerContext


class Recency:
    """A :class:`~memshare.mechanisms.compaction.scorers.contract.TokenScorer`."""

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See :meth:`TokenScorer.score`."""
        return positions.float().expand(keys.shape[:3]).contiguous()


def build(choice: ScorerChoice, context: WorkerContext) -> Recency:
    """See :func:`~memshare.mechanisms.compaction.scorers.registry.build_scorer`."""
    return Recency()
