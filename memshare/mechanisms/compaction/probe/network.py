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

    def __init__(self, tensors: dict[str, Tensor], neighbours: int) -> None:
        """Build it from what a file holds.

        Args:
            tensors: as :meth:`names_and_shapes` says, of any float type.
            neighbours: tokens on each side that are averaged over.
        """
        named = {name: tensor.float() for name, tensor in tensors.items()}
        weight = named["hidden.weight"] * named["scale"][..., None]
        self._bias = named["hidden.bias"] - (named["shift"][..., None] * weight).sum(-2)
        self._own, self._around = weight.chunk(2, dim=-2)
        self._out = named["out.weight"]
        self._offset = named["out.bias"]
        self._neighbours = neighbours

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

    def part(self, first: int, heads: int, device: torch.device) -> Self:
        """The network of some consecutive heads, whole groups of them, on their device."""
        together = self._offset.shape[-1]
        groups = slice(first // together, (first + heads) // together)
        part = object.__new__(type(self))
        part._neighbours = self._neighbours
        for name in ("_bias", "_own", "_around", "_out", "_offset"):
            setattr(part, name, getattr(self, name)[:, groups].to(device))
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
        held = held_together(upright, values, self._offset.shape[-1])
        around = average(held @ self._around, self._neighbours)
        hidden = F.gelu(held @ self._own + around + self._bias[:, :, None])
        worth = hidden @ self._out + self._offset[:, :, None]  # [layers, groups, tokens, together]
        return worth.transpose(-1, -2).flatten(1, 2)


def held_together(upright: Tensor, values: Tensor, together: int) -> Tensor:
    """What the cache holds of each token: ``[layers, groups, tokens, 2 * together * channels]``.

    Args:
        upright: ``[layers, heads, tokens, channels]``.
        values: the same of V.
        together: heads of a group.
    """
    both = torch.cat((upright, values), dim=-1)
    layers, heads, tokens, width = both.shape
    grouped = both.view(layers, heads // together, together, tokens, width)
    return grouped.transpose(2, 3).reshape(layers, -1, tokens, together * width)


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
