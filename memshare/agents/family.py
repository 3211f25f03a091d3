"""Adapters that may read each other's blocks, and where each finds its low-rank part."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from memshare.agents.adapter import Adapter
from memshare.config import AgentsConfig

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLE = 8
"""Low-rank columns of a layer are a multiple of it: kernels load rows in pieces of 16 bytes."""


@dataclass(frozen=True)
class Family:
    """The adapters of a configuration, under its scheme.

    Attributes:
        scheme: what they share.
        adapters: its members.
        base: identity of the base model.
    """

    scheme: str
    adapters: tuple[Adapter, ...]
    base: str

    @cached_property
    def key(self) -> str:
        """What block hashes of this family begin with, and no other's.

        A block is written by one member and read by all, so the key changes with every member's
        contents: with another A, another B, another scheme or another base, old blocks are not
        found.
        """
        digest = hashlib.sha256(f"{self.scheme}\n{self.base}\n".encode())
        for adapter in sorted(self.adapters, key=lambda adapter: adapter.digest):
            digest.update(bytes.fromhex(adapter.digest))
            first = self.columns.get(adapter.name, range(0)).start
            digest.update(f" {first} {self.width}\n".encode())
        return digest.hexdigest()

    @cached_property
    def columns(self) -> Mapping[str, range]:
        """Low-rank columns that each adapter reads, by name; empty where none are cached."""
        if self.scheme == "base_lr_shared":
            return {adapter.name: range(adapter.value_rank) for adapter in self.adapters}
        found: dict[str, range] = {}
        if self.scheme == "stacked":
            first = 0
            for adapter in self.adapters:
                found[adapter.name] = range(first, first + adapter.value_rank)
                first += adapter.value_rank
        return found

    @cached_property
    def width(self) -> int:
        """Low-rank columns that each token has in each layer and KV head."""
        used = max((columns.stop for columns in self.columns.values()), default=0)
        return -(-used // MULTIPLE) * MULTIPLE

    def member(self, name: str) -> Adapter | None:
        """The adapter of that name."""
        return next((adapter for adapter in self.adapters if adapter.name == name), None)

    def number(self, name: str) -> int:
        """By which an engine knows a member, counted from 1, whatever requests say.

        Raises:
            KeyError: it is none.
        """
        return self._numbers[name]

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {adapter.name: number for number, adapter in enumerate(self.adapters, start=1)}

    def value_down(self, layers: int, hidden: int) -> Tensor:
        """What makes the low-rank columns of a token's input: ``[layers, width, hidden]``.

        Args:
            layers: of the base model.
            hidden: width of its residual stream.
        """
        import torch

        down = torch.zeros(layers, self.width, hidden)
        for adapter in self.adapters:
            columns = self.columns[adapter.name]
            for layer, matrix in adapter.value_down().items():
                first = columns.start
                down[layer, first : first + matrix.shape[0]] = matrix.to(down.dtype)
        return down


def family_of(config: AgentsConfig, adapters: Sequence[Adapter], base: str) -> Family | None:
    """The family that a configuration makes; None if its adapters share nothing.

    Args:
        config: the section ``agents``.
        adapters: what it names, read.
        base: identity of the base model.
    """
    return Family(config.scheme, tuple(adapters), base) if config.shares else None
