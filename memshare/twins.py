"""Stage one of the policy ``twins``: where a request's tokens occur again, at any offset.

A *twin* of a token is a later token of the same request with the same id. Causal attention makes
a token's KV a function of what stands before it, so a twin is the likelier to have similar KV, and
to mean the same, the longer the text before the two is the same. The index therefore remembers,
for runs of 8, 4, 2 and 1 tokens, where each occurred last, and links that occurrence to the new one
by the longest run. Runs that are too short are chance: the 5 in another sum is no copy of this one.

Everything is NumPy on one step's tokens at a time: O(1) a token, no Python object per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int32]

_ORDERS = (1, 2, 4, 8)  # tokens; each run's hash is made of two of the order before
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, bits well spread (Fibonacci hashing)
_FIRST_SIZE = 1024  # tokens


class TwinIndex:
    """The tokens of one request, and the search for the twins that new ones are.

    About 120 bytes a token: 4 MB for a request of 32,768.
    """

    def __init__(self, shortest_run: int = 1) -> None:
        """Start with no tokens.

        Args:
            shortest_run: tokens of the shortest run that makes a twin, 8 at most.
        """
        self._searched = [i for i, order in enumerate(_ORDERS) if order >= shortest_run]
        self._clear()

    def _clear(self) -> None:
        self._count = 0
        self._positions: Positions = np.empty(_FIRST_SIZE, np.int32)
        # Longest run, in tokens, by which a token has been linked to its twin; 0: it has none.
        self._quality = np.zeros(_FIRST_SIZE, np.uint8)
        self._hashes = np.empty((len(_ORDERS), _FIRST_SIZE), np.uint64)
        self._make_tables()

    def __len__(self) -> int:
        """Tokens that are remembered."""
        return self._count

    def add(self, tokens: Sequence[int], position: int) -> tuple[Positions, Positions]:
        """Add one step's tokens and find whose twins they are.

        Args:
            tokens: ``[T]`` token ids, T >= 1.
            position: of ``tokens[0]``. If it is not later than every position added before, the
                request has begun again (a preemption), and what was known is forgotten.

        Returns:
            Positions ``[N]`` of earlier tokens, each at most once and in rising order, and ``[N]``
            of their twins among ``tokens``. A token that had a twin gets another only if as long a
            run before it is the same: the newest of the best stays.
        """
        if self._count and position <= self._positions[self._count - 1]:
            self._clear()
        start, end = self._count, self._count + len(tokens)
        self._make_room(end)
        self._positions[start:end] = np.arange(position, position + len(tokens))
        self._count = end
        self._hash(np.asarray(tokens, np.uint64), start, end)
        earlier, quality = self._look_up(start, end)
        found = np.flatnonzero(quality >= np.maximum(self._quality[earlier], 1))
        # Of several twins for one token the last in this order stays: best run, then newest.
        rank = found + (quality[found].astype(np.int64) << 32)
        order = found[np.lexsort((rank, earlier[found]))]
        is_best = np.append(earlier[order][1:] != earlier[order][:-1], len(order) > 0)[: len(order)]
        chosen = order[is_best]
        linked = earlier[chosen]
        self._quality[linked] = quality[chosen]
        self._remember(start, end)
        return self._positions[linked], self._positions[start + chosen]

    def _hash(self, tokens: npt.NDArray[np.uint64], start: int, end: int) -> None:
        """Hash the run that ends in each new token, for every order."""
        self._hashes[0, start:end] = (tokens + np.uint64(1)) * _MIX
        for level in range(1, len(_ORDERS)):
            half = _ORDERS[level - 1]
            runs = self._hashes[level - 1]
            mixed = runs[start:end] ^ (runs[start:end] >> np.uint64(29))
            # The first tokens of all have no run of that length: their own place stands for it.
            begin = min(max(start, half), end)
            mixed[begin - start :] += runs[begin - half : end - half] * _MIX
            mixed[: begin - start] += np.arange(start, begin, dtype=np.uint64)
            self._hashes[level, start:end] = mixed * _MIX

    def _look_up(self, start: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """For each new token the earlier one with the longest common run, and its length."""
        earlier = np.zeros(end - start, np.int64)
        quality = np.zeros(end - start, np.uint8)
        for table, level in zip(self._tables, self._searched, strict=True):
            hashes = self._hashes[level]
            last = table[hashes[start:end] >> self._shift]
            same = (last >= 0) & (hashes[last] == hashes[start:end])
            earlier[same] = last[same]
            quality[same] = _ORDERS[level]
        return earlier, quality

    def _remember(self, start: int, end: int) -> None:
        places = np.arange(start, end, dtype=np.int32)
        for table, level in zip(self._tables, self._searched, strict=True):
            # Repeated places: the last stays.
            table[self._hashes[level, start:end] >> self._shift] = places

    def _make_room(self, needed: int) -> None:
        if needed <= len(self._positions):
            return
        size = len(self._positions)
        while size < needed:
            size *= 2
        self._positions = _grown(self._positions, size)
        self._quality = _grown(self._quality, size)
        self._hashes = np.stack([_grown(hashes, size) for hashes in self._hashes])
        self._make_tables()
        self._remember(0, self._count)

    def _make_tables(self) -> None:
        # Direct-mapped, twice as many places as tokens: what shares a place forgets the older one.
        bits = (2 * len(self._positions) - 1).bit_length()
        self._shift = np.uint64(64 - bits)
        self._tables = np.full((len(self._searched), 1 << bits), -1, np.int32)


_Array = TypeVar("_Array", Positions, npt.NDArray[np.uint8], npt.NDArray[np.uint64])


def _grown(array: _Array, size: int) -> _Array:
    larger = np.zeros(size, array.dtype)
    larger[: len(array)] = array
    return larger
