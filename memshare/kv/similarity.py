"""Stage two: how similar the KV of a target block and a donor block is.

Everything here is plain torch on ``[blocks, heads, slots, channels]`` tensors of one layer, batched
over pairs. A rank sees only its own KV heads: results are sums and counts, added over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from memshare.kv.rotary import Rotation

Norm = Literal["paper", "relative"]
Layer = TypeVar("Layer")


def spread_layers(layers: Sequence[Layer], wanted: int | str) -> list[Layer]:
    """Return ``wanted`` of the layers, evenly spread over the depth, ends included.

    Args:
        layers: all of them, in order.
        wanted: how many, or ``all``; one alone is the middle one.
    """
    if wanted == "all" or int(wanted) >= len(layers):
        return list(layers)
    count = int(wanted)
    if count == 1:
        return [layers[len(layers) // 2]]
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


@dataclass(frozen=True, slots=True)
class LayerBlocks:
    """K and V of some blocks in one layer, on one rank.

    Attributes:
        keys: ``[blocks, heads, slots, channels]`` of any floating type, as cached (rotated); None
            if keys are not compared.
        values: the same of V; None if values are not compared.
        rotation: undoes the keys' positions; None if that is impossible or not wanted.
    """

    keys: Tensor | None
    values: Tensor | None
    rotation: Rotation | None


@dataclass(frozen=True, slots=True)
class PairSums:
    """Similarities of P pairs, added up over layers, heads and tensors of one rank.

    Attributes:
        total: ``[P]`` float32 sum of similarities.
        count: how many similarities each sum holds. ``total / count`` is the pair's similarity.
    """

    total: Tensor
    count: int


def similarity_sums(
    layers: Iterable[tuple[LayerBlocks, LayerBlocks, LayerBlocks]],
    target_positions: Tensor,
    donor_positions: Tensor,
    sample_positions: Tensor,
    norm: Norm,
) -> PairSums:
    """Similarity of P (target, donor) pairs, summed over layers.

    ``paper`` (arXiv 2507.21433): ``1 - |A - B| / (|A| + |B|)`` on K and V as cached.
    ``relative``: ``1 - |A - B| / r`` where ``r`` is the RMS distance of two random blocks of
    the same request in that layer and head, estimated from ``sample``; keys are first moved to the
    target's position. 1 is identical, 0 is as unlike as random blocks, and it may be negative.

    Args:
        layers: per layer (targets, donors, sample): P, P and S blocks. S >= 2 for ``relative``;
            ``paper`` does not look at the sample.
        target_positions: ``[P]`` int64 token position of each target's first slot.
        donor_positions: ``[P]`` int64, of each donor's first slot.
        sample_positions: ``[S]`` int64, of each sampled block's first slot.
        norm: which of the two.
    """
    total = torch.zeros(len(target_positions), dtype=torch.float32, device=target_positions.device)
    count = 0
    for target, donor, sample in layers:
        for name in ("keys", "values"):
            a, b, s = getattr(target, name), getattr(donor, name), getattr(sample, name)
            if a is None:
                continue
            a, b = a.float(), b.float()
            if norm == "paper":
                scores = _paper(a, b)
            else:
                s = s.float()
                if name == "keys" and target.rotation is not None:
                    b = target.rotation.turn(b, target_positions - donor_positions)
                    s = target.rotation.turn(s, -sample_positions)
                scores = 1.0 - _norms(a - b) / _random_distance(s)
            total += scores.sum(1)
            count += scores.shape[1]
    return PairSums(total, count)


class TokenScale:
    """How far apart random tokens are, per head, in one tensor of one layer: a running estimate.

    Batches are small and many, so the moments are kept over all of them, the newest
    ``_MEMORY`` tokens or so counting most.
    """

    _MEMORY = 65536

    def __init__(self) -> None:
        self._count = 0.0
        self._mean: Tensor | None = None
        self._spread: Tensor | None = None  # [heads], sum of squared distances from the mean

    def update(self, tokens: Tensor) -> None:
        """Add ``[N, heads, channels]`` float32 tokens, keys moved to position 0 before."""
        fresh, mean = float(len(tokens)), tokens.mean(0)
        spread = (tokens - mean).square().sum((0, 2))
        if self._mean is None or self._spread is None:
            self._count, self._mean, self._spread = fresh, mean, spread
            return
        old = min(self._count, self._MEMORY)
        self._spread = self._spread * (old / self._count)
        between = (mean - self._mean).square().sum(1) * (old * fresh / (old + fresh))
        self._spread = self._spread + spread + between
        self._mean = self._mean + (mean - self._mean) * (fresh / (old + fresh))
        self._count = old + fresh

    def distance(self) -> Tensor:
        """``[heads]``: RMS distance of two random tokens (see :func:`_random_distance`)."""
        assert self._spread is not None, "update comes first"
        return torch.sqrt(2.0 * self._spread / max(self._count - 1.0, 1.0)).clamp_min(1e-6)


def token_similarity_sums(tensors: Iterable[tuple[Tensor, Tensor, TokenScale]]) -> PairSums:
    """Similarity of N pairs of tokens, summed over heads, tensors and layers.

    ``1 - |a - b| / r``, where ``r`` is the RMS distance of two random tokens in that tensor and
    head. 1 is identical, 0 is as unlike as random tokens, and it may be negative.

    Args:
        tensors: per layer and tensor, ``[N, heads, channels]`` float32 of the tokens, of their
            twins, and the scale, which already knows them. Keys have been moved to position 0.
    """
    total, count = torch.zeros(0), 0
    for a, b, scale in tensors:
        scores = 1.0 - torch.linalg.vector_norm(a - b, dim=2) / scale.distance()
        total = scores.sum(1) if count == 0 else total + scores.sum(1)
        count += scores.shape[1]
    return PairSums(total, count)


def _paper(a: Tensor, b: Tensor) -> Tensor:
    """``[P, heads]`` similarity in 0..1; two zero blocks are identical."""
    return 1.0 - _norms(a - b) / (_norms(a) + _norms(b)).clamp_min(1e-30)


def _norms(blocks: Tensor) -> Tensor:
    """Euclidean norm over slots and channels: ``[B, H, S, C]`` -> ``[B, H]``."""
    norms: Tensor = torch.linalg.vector_norm(blocks.flatten(2), dim=2)
    return norms


def _random_distance(sample: Tensor) -> Tensor:
    """RMS distance of two random blocks: ``[S, H, slots, C]`` -> ``[H]``.

    For independent draws E|A-B|^2 = 2 E|A - mean|^2, so S blocks give what S^2 pairs would.
    """
    spread = sample - sample.mean(0, keepdim=True)
    variance = spread.flatten(2).square().sum((0, 2)) / max(len(sample) - 1, 1)
    # A head that is constant (a zero-padded one, or a sample of one) must not divide 0 by 0.
    return torch.sqrt(2.0 * variance).clamp_min(1e-6)
