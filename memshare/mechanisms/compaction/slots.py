"""What a worker knows of the tokens under packed entries: each layer and KV head holds others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SlotFacts(NamedTuple):
    """What is known of the tokens in some slots of this rank's layers and heads.

    Attributes:
        positions: ``[layers, heads, slots]`` int32, of each token in its request.
        worths: ``[layers, heads, slots]`` float32, what each was worth when it was scored.
    """

    positions: Tensor
    worths: Tensor

    @classmethod
    def joined(cls, parts: Sequence[SlotFacts]) -> SlotFacts:
        """The parts' slots, one behind another."""
        if len(parts) == 1:
            return parts[0]
        positions, worths = zip(*parts, strict=True)
        return cls(torch.cat(positions, 2), torch.cat(worths, 2))


class SlotBook:
    """The facts of every packed entry, by request; of requests that have been packed alone."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._entries: dict[str, dict[int, SlotFacts]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def get(self, request_id: str, entry: int) -> SlotFacts | None:
        """Of an entry's block_size slots; None if it has not been packed: its tokens lie where
        their positions say."""
        return self._entries.get(request_id, {}).get(entry)

    def pack(
        self, request_id: str, kept: Sequence[int], gone: Sequence[int], facts: SlotFacts
    ) -> None:
        """Note that the tokens of some entries now lie in the first of them.

        Args:
            request_id: whose entries they are.
            kept: the first entries.
            gone: the others, which are holes now.
            facts: of the slots of ``kept``, in order.
        """
        entries = self._entries.setdefault(request_id, {})
        for entry in gone:
            entries.pop(entry, None)
        parts = zip(*(each.split(self._block_size, 2) for each in facts), strict=True)
        for entry, part in zip(kept, parts, strict=True):
            entries[entry] = SlotFacts(*part)

    def drop(self, request_id: str, gone: Sequence[int]) -> None:
        """Note that some entries are holes, and no token of theirs is kept."""
        entries = self._entries.setdefault(request_id, {})
        for entry in gone:
            entries.pop(entry, None)

    def forget(self, request_id: str) -> None:
        """The request has ended, or lost its blocks."""
        self._entries.pop(request_id, None)

    def entries(self, request_id: str) -> Iterator[int]:
        """The packed entries of a request, ascending."""
        yield from sorted(self._entries.get(request_id, {}))
