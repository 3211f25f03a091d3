"""The newer a token, the more it is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from memshare.mechanisms.compaction.scorers import ScorerParams
    from memshare.mechanisms.contract import WorkerContext


class Recency:
    """A :class:`~memshare.mechanisms.compaction.scorers.contract.TokenScorer`."""

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See :meth:`TokenScorer.score`."""
        return positions.float().expand(keys.shape[:3])


def build(params: ScorerParams, context: WorkerContext) -> Recency:
    """See :func:`memshare.mechanisms.compaction.scorers.build_scorer`."""
    return Recency()
