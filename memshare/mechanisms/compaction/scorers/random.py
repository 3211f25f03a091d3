"""``random``: a control. Its worth is drawn from seed, position, layer and head alone.

So it is the same in every run, however the heads are spread over ranks and a text is cut into runs.
A fair control asks for ``position_weight: 0`` as well, or the recent text stays for its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memshare.mechanisms.compaction.scorers.registry import ScorerChoice
    from memshare.mechanisms.contract import WorkerContext

_BITS = 24  # of a draw: every one is exact in float32
# A hash of 32-bit numbers by shifts and products, which stay below 2**63.
_WORD = (1 << 32) - 1
_ROUNDS = ((16, 0x45D9F3B), (16, 0x45D9F3B))


class RandomScorer:
    """A :class:`~memshare.mechanisms.compaction.scorers.contract.TokenScorer`."""

    def __init__(self, seed: int, first_head: int) -> None:
        """Draw by ``seed``; ``first_head`` of this rank's heads is that number of the model's."""
        self._seed = seed
        self._first_head = first_head

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See :meth:`TokenScorer.score`."""
        layers, heads, _, _ = keys.shape
        device = keys.device
        mixed = torch.full((1, 1, 1), self._seed & _WORD, dtype=torch.int64, device=device)
        of_heads = torch.arange(self._first_head, self._first_head + heads, device=device)
        for number in (
            torch.arange(layers, device=device)[:, None, None],
            of_heads[None, :, None],
            positions.to(device, torch.int64)[None, None, :],
        ):
            mixed = _mix(mixed ^ (number + 0x9E3779B9))
        return (mixed >> (32 - _BITS)).float() / (1 << _BITS)


def _mix(words: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        words = ((words ^ (words >> shift)) * factor) & _WORD
    return words ^ (words >> 16)


def build(choice: ScorerChoice, context: WorkerContext) -> RandomScorer:
    """See :func:`~memshare.mechanisms.compaction.scorers.registry.build_scorer`."""
    heads = next(iter(context.caches.values())).shape[1]
    return RandomScorer(choice.seed, context.tensor_rank * heads)
