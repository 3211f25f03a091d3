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
    layers, heads, tokens, channels = keys.shape
    by_token = keys.permute(2, 0, 1, 3).reshape(tokens, layers * heads, 1, channels)
    turned = rotation.turn(by_token, -positions.long())
    return turned.view(tokens, layers, heads, channels).permute(1, 2, 0, 3)
