"""Any token is worth what a generator says: a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memshare.mechanisms.compaction.scorers import ScorerParams
    from memshare.mechanisms.contract import WorkerContext


class Random:
    """A :class:`~memshare.mechanisms.compaction.scorers.contract.TokenScorer`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def score(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See :meth:`TokenScorer.score`."""
        device = keys.device
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(self._seed)
            self._generators[device] = generator
        return torch.rand(keys.shape[:3], generator=generator, device=device)


def build(params: ScorerParams, context: WorkerContext) -> Random:
    """See :func:`memshare.mechanisms.compaction.scorers.build_scorer`."""
    return Random(params.seed)
