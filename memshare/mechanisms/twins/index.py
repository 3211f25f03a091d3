"""Stage one of the policy ``twins``: where a request's tokens have stood before, at any offset.

Two tokens of one request are *twins* if they stand at the same place of a passage that occurs
twice. Causal attention makes a token's KV a function of what stands before it, so twins are the
likelier to have similar KV, and to mean the same, the longer the text before the two is the same.
The index therefore remembers, for runs of 8 and 4 tokens (and, if asked for, 2 and 1), where each
occurred last, and links a new token to the occurrence with the longest run. Runs that are too short
are chance: the 5 in another sum is no copy of this one. Where a run is long enough, all of its
tokens are twins, its first ones too.

Everything is NumPy on one step's tokens at a time: O(1) a token, no Python object per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from memshare.search.evaluate import Positions

_Places = npt.NDArray[np.int64]  # in the index's own arrays

_ORDERS = (1, 2, 4, 8)  # tokens; each run's hash is made of two of the order before
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, bits well spread (Fibonacci hashing)
_FIRST_SIZE = 1024  # tokens


class TwinIndex:
    """The tokens of one request, and the search for the twins that new ones are.

    About 60 bytes a token: 2 MB for a request of 32,768 (docs/benchmarks.md).
    """

    def __init__(self, shortest_run: int = 1) -> None:
        """Start with no tokens.

        Args:
            shortest_run: tokens of the shortest run that makes a twin, 8 at most.
        """
        self._searched = [i for i, order in enumerate(_ORDERS) if order >= shortest_run]
        self._shortest = _ORDERS[self._searched[0]]
        self._clear()

    def _clear(self) -> None:
        self._count = 0
        self._positions: Positions = np.empty(_FIRST_SIZE, np.int32)
        self._tokens = np.zeros(_FIRST_SIZE, np.uint64)
        self._linked = np.zeros(_FIRST_SIZE, np.bool_)  # to an earlier token
        self._hashes = np.empty((len(_ORDERS), _FIRST_SIZE), np.uint64)
        self._make_tables()

    def __len__(self) -> int:
        """Tokens that are remembered."""
        return self._count

    def add_tokens(self, tokens: Sequence[int], position: int) -> tuple[Positions, Positions]:
        """Add one step's tokens and find whose twins they are.

        Args:
            tokens: ``[T]`` token ids, T >= 1.
            position: of ``tokens[0]``. If it is not later than every position added before, the
                request has begun again (a preemption), and what was known is forgotten.

        Returns:
            Positions ``[N]`` of earlier tokens, each at most once, and ``[N]`` of their twins in
            rising order, each linked once in its life. Twins are among ``tokens``, or, where a run
            began before them, just before. A token that occurs several times in ``tokens`` makes a
            chain.
        """
        if self._count and position <= self._positions[self._count - 1]:
            self._clear()
        start, end = self._count, self._count + len(tokens)
        self._make_room(end)
        self._positions[start:end] = np.arange(position, position + len(tokens))
        self._tokens[start:end] = tokens
        self._count = end
        self._hash(self._tokens[start:end], start, end)
        earlier, later = self._complete_runs(*self._look_up(start, end))
        self._remember(start, end)
        return self._positions[earlier], self._positions[later]

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

    def _look_up(self, start: int, end: int) -> tuple[_Places, _Places]:
        """For each new token that ends a known run: where the longest one ended, and the token."""
        earlier = np.full(end - start, -1, np.int64)
        for table, level in zip(self._tables, self._searched, strict=True):
            hashes = self._hashes[level]
            last = table[hashes[start:end] >> self._shift]
            same = (last >= 0) & (hashes[last] == hashes[start:end])
            earlier[same] = last[same]
        found = np.flatnonzero(earlier >= 0)
        return earlier[found], start + found

    def _complete_runs(self, ended: _Places, ends: _Places) -> tuple[_Places, _Places]:
        """Add the tokens before the last one of each shortest run, and link all of them."""
        self._linked[ends] = True
        earlier, later = [ended], [ends]
        for back in range(1, self._shortest):
            before, after = ended - back, ends - back
            # Hashes can be equal by chance; and a token is linked only once.
            new = (before >= 0) & ~self._linked[after]
            new &= self._tokens[before] == self._tokens[after]
            self._linked[after[new]] = True
            earlier.append(before[new])
            later.append(after[new])
        return _chained(np.concatenate(earlier), np.concatenate(later))

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
        self._tokens = _grown(self._tokens, size)
        self._linked = _grown(self._linked, size)
        self._hashes = np.stack([_grown(hashes, size) for hashes in self._hashes])
        self._make_tables()
        self._remember(0, self._count)

    def _make_tables(self) -> None:
        # Direct-mapped, twice as many places as tokens: what shares a place forgets the older one.
        bits = (2 * len(self._positions) - 1).bit_length()
        self._shift = np.uint64(64 - bits)
        self._tables = np.full((len(self._searched), 1 << bits), -1, np.int32)


def _chained(earlier: _Places, later: _Places) -> tuple[_Places, _Places]:
    """Sort by the later token; of several with one earlier token, each follows the one before."""
    order = np.argsort(later)
    earlier, later = earlier[order], later[order]
    by_earlier = np.argsort(earlier, kind="stable")
    again = np.flatnonzero(earlier[by_earlier][1:] == earlier[by_earlier][:-1])
    if not len(again):
        return earlier, later
    earlier[by_earlier[again + 1]] = later[by_earlier[again]]
    # Where a run began before this step, a token of that may have got two now.
    _, first = np.unique(earlier, return_index=True)
    first.sort()
    return earlier[first], later[first]


_Array = TypeVar("_Array", Positions, npt.NDArray[np.bool_], npt.NDArray[np.uint64])


def _grown(array: _Array, size: int) -> _Array:
    larger = np.zeros(size, array.dtype)
    larger[: len(array)] = array
    return larger
