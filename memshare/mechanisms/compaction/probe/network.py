"""The network: a perceptron for each layer and KV head, all evaluated at once."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812 - as torch calls it
from torch import Tensor


class ProbeNetwork:
    """Maps what the cache holds of consecutive tokens to what each is worth.

    A token's features are its upright key and its value, and the average of both over the tokens
    around it. Averaging and a linear layer commute, and so do scaling and a linear layer: features
    are never written down.
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
        self._own, self._around = weight.chunk(2, dim=-2)  # each [layers, heads, 2 C, hidden]
        self._out = named["out.weight"]
        self._offset = named["out.bias"]
        self._neighbours = neighbours

    @staticmethod
    def names_and_shapes(
        layers: int, heads: int, channels: int, hidden: int
    ) -> dict[str, tuple[int, ...]]:
        """The tensors of a file; ``channels`` are those of one head."""
        features = 4 * channels
        return {
            "shift": (layers, heads, features),
            "scale": (layers, heads, features),
            "hidden.weight": (layers, heads, features, hidden),
            "hidden.bias": (layers, heads, hidden),
            "out.weight": (layers, heads, hidden),
            "out.bias": (layers, heads),
        }

    def part(self, first: int, heads: int, device: torch.device) -> Self:
        """The network of some consecutive heads, on their device."""
        part = object.__new__(type(self))
        part._neighbours = self._neighbours
        for name in ("_bias", "_own", "_around", "_out", "_offset"):
            setattr(part, name, getattr(self, name)[:, first : first + heads].to(device))
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
        held = torch.cat((upright, values), dim=-1)
        around = average(held @ self._around, self._neighbours)
        hidden = F.gelu(held @ self._own + around + self._bias[:, :, None])
        return (hidden @ self._out[..., None])[..., 0] + self._offset[..., None]


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
