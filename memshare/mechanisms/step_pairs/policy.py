"""Aligned blocks of lexically similar steps (arXiv 2507.21433, section on collaborative filtering),
to be compared by normalised Euclidean distance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from memshare.core.token_map import TokenMap
from memshare.mechanisms.step_pairs.params import PaperParams
from memshare.search.evaluate import Span


@dataclass(frozen=True, slots=True)
class BlockRef:
    """The ``index``-th block of the request that wrote ``span``'s step."""

    span: Span
    index: int


class PairProposal(NamedTuple):
    """Re-point ``target`` at ``donor``."""

    target: BlockRef
    donor: BlockRef


class PairProposer:
    """Pairs the k-th block of one step with the k-th block of the other."""

    def __init__(self, params: PaperParams) -> None:
        self._keep_newest = params.survivor == "newest"

    def propose(self, later: Span, earlier: Span, token_map: TokenMap) -> Iterator[PairProposal]:
        """Block pairs of two similar steps that are worth comparing in stage two.

        Blocks that a step only touches are included: at the sizes that engines use, few steps hold
        a whole block, and stage two judges anyway.
        """
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

    def damage(self, similarity: float) -> float:
        """How much a verified pair is expected to hurt; the reclaim queue takes the least first."""
        return 1.0 - similarity
