"""What a scorer is, and how tokens are chosen by what it says."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from memshare.kv.ranking import stable_order


class TokenScorer(Protocol):
    """Tells what tokens are worth, once each, from what the cache holds of them."""

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Score consecutive tokens of one request.

        Args:
            keys: ``[layers, heads, tokens, channels]`` float32 as cached (rotated), this rank's
                heads; not modified.
            values: the same of V.
            positions: ``[tokens]`` int32, ascending.

        Returns:
            ``[layers, heads, tokens]`` float32: larger is worth more. Compared within a layer and
            head alone.
        """
        ...


def choose(worth: Tensor, positions: Tensor, keep: int, position_weight: float = 0.7) -> Tensor:
    """Choose the tokens that stay, anew for each layer and head.

    A token counts by its worth or by its place, whichever says more: the larger of its rank by
    worth and ``position_weight`` times its rank by position, both 0..1 among the candidates. Old
    facts that will be needed stay for their worth, and the recent text for its place.

    Args:
        worth: ``[layers, heads, candidates]``; not a number is worth most.
        positions: the same shape; no position twice within a layer and head.
        keep: tokens, 0 to candidates.
        position_weight: 0..1; 0 looks at worth alone.

    Returns:
        Bool mask of the same shape, with exactly ``keep`` True per layer and head.
    """
    by_worth = _ranks(worth)
    by_place = _ranks(positions)
    # Whole numbers below 2**24 are exact in float32: equal ranks tie, and a tie goes to the first.
    value = torch.maximum(by_worth.float(), position_weight * by_place.float())
    order = stable_order(-value)
    chosen = torch.zeros_like(worth, dtype=torch.bool)
    return chosen.scatter_(-1, order[..., :keep], True)


def _ranks(values: Tensor) -> Tensor:
    """Place of each value among those of its row, from 0 up; of equals, the first has the least."""
    order = stable_order(values)
    places = torch.arange(values.shape[-1], device=values.device)
    return torch.empty_like(order).scatter_(-1, order, places.expand_as(order))
