"""How many KV blocks a request takes: of layers whose table mechanisms edit, and of those beside.

A hybrid model keeps several tables for a request, which draw on one pool of blocks. One is that of
the layers with full attention. The others belong to layers that forget by themselves: sliding
windows, and linear attention, which keeps one state. What such a layer no longer reads goes back to
the pool without anybody's doing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memshare.core.token_map import TokenMap


@dataclass(frozen=True, slots=True)
class SideGroup:
    """Layers with a table of their own, of which only the end is kept.

    Attributes:
        block_size: tokens to a block; those of the longest request where one block is all there is.
        window: tokens behind which the next one still has to be read, itself included.
    """

    block_size: int
    window: int

    def blocks(self, tokens: int) -> int:
        """Blocks that a request holds when its last one is begun, which is when it holds most.

        Args:
            tokens: of the request, computed one by one; a prompt computed in one go takes more.
        """
        if tokens <= 0:
            return 0
        token_map = TokenMap(self.block_size)
        entries = token_map.entries(tokens)
        begun = token_map.first_position(entries - 1)
        return entries - token_map.full(max(0, begun + 1 - self.window))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Blocks of one request, in all tables.

    Attributes:
        token_map: of the table that mechanisms edit.
        beside: the other ones.
    """

    token_map: TokenMap
    beside: Sequence[SideGroup] = ()

    def blocks(self, tokens: int) -> int:
        """At most so many blocks hold the first ``tokens`` tokens, if none is given up."""
        entries: int = self.token_map.entries(tokens)
        if not self.beside:
            return entries
        return entries + sum(group.blocks(tokens) for group in self.beside)

    @property
    def begun_together(self) -> int:
        """Free blocks that a request may take in the step in which it begins an entry: one in each
        table. What a window lets go for it has been freed by then, or is freed later."""
        return 1 + len(self.beside)

    def most_growth(self, tokens: int) -> int:
        """At most so many blocks are added by that many tokens."""
        maps = [self.token_map, *(TokenMap(group.block_size) for group in self.beside)]
        return sum(each.entries(tokens) + 1 for each in maps)
