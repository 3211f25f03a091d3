"""Where a request's tokens lie: position in the request, entry of its block table, slot of a block.

The one place that divides by the block size. Today a token's place follows from its position alone;
once tokens may move, this map is what changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Places = TypeVar("Places", int, npt.NDArray[np.int32], npt.NDArray[np.int64])
"""One position, entry or slot, or an array of them."""


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Places of the tokens of any request.

    Attributes:
        block_size: token slots in a block.
    """

    block_size: int

    def entry(self, position: Places) -> Places:
        """The entry of the block table under which a token lies."""
        return position // self.block_size

    def slot(self, position: Places) -> Places:
        """The slot of its block in which a token lies."""
        return position % self.block_size

    def first_position(self, entry: Places) -> Places:
        """The position of the token in slot 0 of an entry's block."""
        return entry * self.block_size

    def positions(self, entry: int) -> slice:
        """The positions of the tokens under an entry."""
        return slice(entry * self.block_size, (entry + 1) * self.block_size)

    def touched(self, start: int, end: int) -> range:
        """The entries that hold a token of ``[start, end)``."""
        return range(start // self.block_size, self.entries(end))

    def full(self, tokens: int) -> int:
        """How many entries the first ``tokens`` tokens fill."""
        return tokens // self.block_size

    def entries(self, tokens: Places) -> Places:
        """How many entries the first ``tokens`` tokens need; the last may be partly filled."""
        return -(-tokens // self.block_size)

    def full_and_left(self, tokens: int) -> tuple[int, int]:
        """How many entries the first ``tokens`` tokens fill, and how many tokens more fill the
        entry that the next one goes to, 1..block_size. In one call, for the step hook."""
        size = self.block_size
        return tokens // size, size - tokens % size
