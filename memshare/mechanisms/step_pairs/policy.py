"""``paper``: aligned blocks of lexically similar steps (arXiv 2507.21433, section on collaborative
filtering), to be compared by normalised Euclidean distance."""

from __future__ import annotations

from collections.abc import Iterator

from memshare.config import PaperParams
from memshare.core.token_map import TokenMap
from memshare.mechanisms.remap.policy import BlockRef, PairProposal, StagedPolicy
from memshare.search.evaluate import Span


class PaperPolicy(StagedPolicy):
    """Pairs the k-th block of one step with the k-th block of the other."""

    def __init__(self, params: PaperParams) -> None:
        self._keep_newest = params.survivor == "newest"

    def propose(self, later: Span, earlier: Span, token_map: TokenMap) -> Iterator[PairProposal]:
        """See :meth:`StagedPolicy.propose`. Blocks that a step only touches are included: at the
        sizes that engines use, few steps hold a whole block, and stage two judges anyway."""
        new = token_map.touched(later.start, later.end)
        old = token_map.touched(earlier.start, earlier.end)
        for i, j in zip(new, old, strict=False):
            if i == j and later.request_id == earlier.request_id:
                continue  # two short steps in one block
            newer, older = BlockRef(later, i), BlockRef(earlier, j)
            if self._keep_newest:
                yield PairProposal(target=older, donor=newer)
            else:
                yield PairProposal(target=newer, donor=older)
