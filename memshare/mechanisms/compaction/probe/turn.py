"""How a model's keys turn with their positions, and how that is undone."""

from __future__ import annotations

import torch
from torch import Tensor

from memshare.kv.rotary import Rotation

TURN_TOLERANCE = 2e-3
"""Radians: what a table in bfloat16 rounds away of the fastest pair's turn."""


def turn_of(rotation: Rotation) -> tuple[float, ...]:
    """Angle of each pair of channels from one position to the next, in radians."""
    return tuple(torch.atan2(rotation.sin[1], rotation.cos[1]).tolist())


def upright(keys: Tensor, positions: Tensor, rotation: Rotation) -> Tensor:
    """Undo the rotation of keys.

    Args:
        keys: ``[layers, heads, tokens, channels]`` float32; not modified.
        positions: ``[tokens]`` integers.
        rotation: that they went through.
    """
    half = rotation.cos.shape[1]
    at = positions.long()
    cos, sin = rotation.cos[at], rotation.sin[at]  # [tokens, half]: the same for all heads
    turned = torch.empty_like(keys)
    x, y = _pairs(keys, half, rotation.neox)
    a, b = _pairs(turned, half, rotation.neox)
    torch.mul(x, cos, out=a).addcmul_(y, sin)
    torch.mul(y, cos, out=b).addcmul_(x, sin, value=-1)
    turned[..., 2 * half :] = keys[..., 2 * half :]
    return turned


def _pairs(keys: Tensor, half: int, neox: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second channel of each pair that rotates."""
    if neox:
        return keys[..., :half], keys[..., half : 2 * half]
    return keys[..., : 2 * half : 2], keys[..., 1 : 2 * half : 2]
