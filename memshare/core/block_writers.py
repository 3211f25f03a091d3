"""Which adapter wrote each block of the cache, and what adapters find of each other's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memshare.core.interfaces import BlockGrowth
from memshare.core.token_map import TokenMap


class Found(NamedTuple):
    """What a request found in the cache when it was admitted, in tokens.

    Attributes:
        adapter: whose request it is.
        found: that it need not compute.
        shared: of these, in blocks that another adapter wrote.
    """

    adapter: str
    found: int
    shared: int


@dataclass(slots=True)
class _Reader:
    adapter: str | None
    shared: int = 0


class BlockWriters:
    """Follows who wrote each block, from what the engine schedules.

    A request writes every block that it is given and has not found. What it finds was written by
    whoever was given that block last: the engine gives a block to nobody else while it can be
    found. Costs a list entry for each block of the cache, and a step's new blocks.
    """

    def __init__(self, blocks: int, token_map: TokenMap) -> None:
        """Nobody has written anything.

        Args:
            blocks: of the cache.
            token_map: by which tokens lie in them.
        """
        self._writers: list[str | None] = [None] * blocks
        self._map = token_map
        self._live: dict[str, _Reader] = {}

    def take(self, growth: BlockGrowth) -> list[Found]:
        """Take what a step has been scheduled to write.

        Returns:
            What requests with an adapter found that were admitted in it, or resumed.
        """
        found = []
        for admitted in growth.admitted:
            reader = self._live.setdefault(admitted.request_id, _Reader(admitted.adapter))
            whole = self._map.full(admitted.found)
            shared = self._others(admitted.block_ids[:whole], reader.adapter)
            self._write(admitted.block_ids[whole:], reader.adapter)
            if reader.adapter is not None:
                reader.shared += shared
                found.append(Found(reader.adapter, admitted.found, shared))
        for request_id, block_ids in growth.grown:
            grower = self._live.get(request_id)
            self._write(block_ids, None if grower is None else grower.adapter)
        return found

    def finish(self, request_id: str) -> int:
        """Forget a request.

        Returns:
            Tokens that it found in blocks of other adapters, in its life.
        """
        reader = self._live.pop(request_id, None)
        return 0 if reader is None else reader.shared

    def _others(self, block_ids: Sequence[int], adapter: str | None) -> int:
        theirs = sum(self._writers[block] not in (None, adapter) for block in block_ids)
        return self._map.first_position(theirs)

    def _write(self, block_ids: Sequence[int], adapter: str | None) -> None:
        for block in block_ids:
            self._writers[block] = adapter
