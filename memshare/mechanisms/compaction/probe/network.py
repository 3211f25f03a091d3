"""The network: a perceptron for each layer and group of KV heads, all evaluated at once."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812 - as torch calls it
from torch import Tensor


class ProbeNetwork:
    """Maps what the cache holds of consecutive tokens to what each is worth.

    The KV heads of a layer are read in groups: a group's features of a token are the upright keys
    and the values of its heads, and the averages of all these over the tokens around it.
    Averaging and a linear layer commute, and so do scaling and a linear layer: features are never
    written down.
    """

    def __init__(self, tensors: dict[str, Tensor], neighbours: int, smoothing: int = 0) -> None:
        """Build it from what a file holds.

        Args:
            tensors: as :meth:`names_and_shapes` says, of any float type.
            neighbours: tokens on each side that are averaged over.
            smoothing: tokens on each side over which what it tells is averaged.
        """
        named = {name: tensor.float() for name, tensor in tensors.items()}
        self._out = named["out.weight"]
        weight = named["hidden.weight"] * named["scale"][..., None]
        # Of a token's own K and V, and of those around it: [layers, groups, 2, heads, ..., hidden].
        parts = (2, self._out.shape[-1], -1)
        weight, shift = weight.unflatten(2, parts), named["shift"].unflatten(2, parts)
        # What each head of a group adds to the hidden units where its features are at their mean.
        self._shifted = (shift[..., None] * weight).sum((2, 4))
        self._bias = named["hidden.bias"] - self._shifted.sum(2)
        self._matrix = torch.cat(weight.unbind(2), dim=-1).flatten(2, 3)
        self._offset = named["out.bias"]
        self._neighbours = neighbours
        self._smoothing = smoothing

    @staticmethod
    def names_and_shapes(
        layers: int, heads: int, together: int, channels: int, hidden: int
    ) -> dict[str, tuple[int, ...]]:
        """The tensors of a file.

        Args:
            layers: attention layers.
            heads: KV heads of each.
            together: of these in a group.
            channels: of one head.
            hidden: units of each perceptron.
        """
        groups, features = heads // together, 4 * together * channels
        return {
            "shift": (layers, groups, features),
            "scale": (layers, groups, features),
            "hidden.weight": (layers, groups, features, hidden),
            "hidden.bias": (layers, groups, hidden),
            "out.weight": (layers, groups, hidden, together),
            "out.bias": (layers, groups, together),
        }

    def part(
        self, first: int, heads: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Self:
        """The network of some consecutive heads.

        Heads that are only a part of a group tell what they are worth without the others, whose
        features count as if they were always at their mean.

        Args:
            first: of the heads. They are whole groups, or a part of one.
            heads: how many.
            device: of the keys.
            dtype: that matrices are multiplied in; see :func:`fast_dtype`.
        """
        together = self._offset.shape[-1]
        groups = slice(first // together, -(-(first + heads) // together))
        inside = slice(0, together)
        if heads < together:
            inside = slice(first % together, first % together + heads)
        part = object.__new__(type(self))
        part._neighbours, part._smoothing = self._neighbours, self._smoothing
        by_head = self._matrix[:, groups].unflatten(2, (together, -1))
        part._matrix = by_head[:, :, inside].flatten(2, 3).to(device, dtype)
        part._shifted = self._shifted[:, groups, inside].to(device)
        absent = self._shifted[:, groups].sum(2).to(device) - part._shifted.sum(2)
        part._bias = self._bias[:, groups].to(device) + absent
        part._out = self._out[:, groups, :, inside].to(device)
        part._offset = self._offset[:, groups, inside].to(device)
        return part

    def worth(self, upright: Tensor, values: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            upright: ``[layers, heads, tokens, channels]`` float32 keys of consecutive tokens, their
                rotation undone.
            values: the same of V.

        Returns:
            ``[layers, heads, tokens]`` float32.
        """
        held = held_together(upright, values, self._offset.shape[-1], self._matrix.dtype)
        own, around = (held @ self._matrix).float().chunk(2, dim=-1)
        hidden = F.gelu(own + average(around, self._neighbours) + self._bias[:, :, None])
        worth = hidden @ self._out + self._offset[:, :, None]  # [layers, groups, tokens, together]
        worth = average(worth, self._smoothing)
        return worth.transpose(-1, -2).flatten(1, 2)


def fast_dtype(device: torch.device) -> torch.dtype:
    """What a device multiplies matrices in fastest. Ranks of tokens hardly notice its rounding."""
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return torch.bfloat16


def held_together(
    upright: Tensor, values: Tensor, together: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What the cache holds of each token: ``[layers, groups, tokens, 2 * together * channels]``.

    Args:
        upright: ``[layers, heads, tokens, channels]``.
        values: the same of V.
        together: heads of a group.
        dtype: of the result.
    """
    layers, heads, tokens, channels = upright.shape
    shape = (layers, heads // together, tokens, together, 2, channels)
    held = torch.empty(shape, dtype=dtype, device=upright.device)
    by_group = (layers, heads // together, together, tokens, channels)
    for i, tensor in enumerate((upright, values)):
        held[..., i, :] = tensor.reshape(by_group).transpose(2, 3)
    return held.view(layers, heads // together, tokens, -1)


def average(values: Tensor, neighbours: int) -> Tensor:
    """Average over the tokens around each one, and itself; at the ends over those that there are.

    Args:
        values: ``[..., tokens, numbers]``.
        neighbours: tokens on each side.
    """
    if neighbours == 0:
        return values
    width = 2 * neighbours + 1
    flat = values.flatten(0, -3).transpose(-1, -2)
    pooled = F.avg_pool1d(flat, width, stride=1, padding=neighbours, count_include_pad=False)
    return pooled.transpose(-1, -2).view(values.shape)
