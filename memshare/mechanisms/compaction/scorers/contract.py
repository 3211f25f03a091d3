"""What a scorer is, and how tokens are chosen by what it says."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

POSITION_WEIGHT = 0.7
"""How much a token's age counts beside its worth."""


class TokenScorer(Protocol):
    """Tells what tokens are worth, once each, from what the cache holds of them."""

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """What each token is worth to each layer and KV head.

        Args:
            keys: ``[layers, heads, tokens, channels]`` float32, as cached (rotated), of this rank's
                heads and of consecutive tokens.
            values: like ``keys``.
            positions: ``[tokens]`` int32.

        Returns:
            ``[layers, heads, tokens]`` float32: larger is worth more.
        """
        ...


def choose(worth: Tensor, positions: Tensor, keep: int) -> Tensor:
    """The tokens that stay: those with the largest max(rank of worth, weighted rank of position).

    Args:
        worth: ``[layers, heads, candidates]`` float32.
        positions: like ``worth``, int32.
        keep: how many stay in each layer and head.

    Returns:
        ``[layers, heads, candidates]`` bool, exactly ``keep`` true in each layer and head.
    """
    value = torch.maximum(_ranks(worth), POSITION_WEIGHT * _ranks(positions))
    best = value.topk(keep, dim=-1).indices
    return torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True)


def _ranks(values: Tensor) -> Tensor:
    """Ranks in 0..1 among the candidates."""
    order = values.argsort(-1)
    steps = torch.linspace(0, 1, values.shape[-1], device=values.device).expand(values.shape)
    return torch.zeros(values.shape, device=values.device).scatter_(-1, order, steps)
