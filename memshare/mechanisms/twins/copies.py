"""What is known of one request's tokens and their twins, for the policy ``twins``.

Twins of twins are twins: all places of one token make a list, and each token knows its neighbours
in that. A token that is given up lives on in them, and they become neighbours of each other. So a
block can go while every token of it has another copy, and the last copy of something that has been
given up is told apart from what has one copy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memshare.core.token_map import TokenMap
from memshare.search.evaluate import Positions

_Similarities = npt.NDArray[np.float32]
_HOPS = 8  # neighbours that are followed at most; past them, a list is cut in two


class TokenCopies:
    """Lists of copies, by token position. Tokens of one block are never neighbours: they would go
    together."""

    def __init__(self, token_map: TokenMap) -> None:
        """Start without tokens.

        Args:
            token_map: which tokens are of one block.
        """
        self._map = token_map
        # -1: none. Of a token that was given up, `_next` is who stands for it.
        self._next: Positions = np.full(0, -1, np.int32)
        self._previous: Positions = np.full(0, -1, np.int32)
        self._similarity = np.zeros(0, np.float32)  # to the next one
        # Stands for a token that was given up: must not go itself while it is alone.
        self._needed = np.zeros(0, np.bool_)
        self._gone = np.zeros(0, np.bool_)
        self._blocks: _BlockView | None = None  # the same by block, if still right

    def grow(self, blocks: int) -> None:
        """Make room for so many blocks."""
        missing = self._map.first_position(blocks) - len(self._next)
        if missing <= 0:
            return
        missing += len(self._next) // 2
        none = np.full(missing, -1, np.int32)
        self._next, self._previous = np.append(self._next, none), np.append(self._previous, none)
        self._similarity = np.append(self._similarity, np.zeros(missing, np.float32))
        no = np.zeros(missing, np.bool_)
        self._needed, self._gone = np.append(self._needed, no), np.append(self._gone, no)
        self._blocks = None

    def learn(self, earlier: Positions, later: Positions, similarity: _Similarities) -> None:
        """Take compared pairs: new ones, or neighbours whose similarity was a guess.

        Args:
            earlier: ``[N]`` tokens, each at most once.
            later: ``[N]`` their twins, each at most once, in other blocks. One that has another
                neighbour before it by now keeps that.
            similarity: ``[N]``, 1 is identical, 0 is as unlike as random tokens, or negative: those
                are no twins.
        """
        before = self._previous[later]
        known = before == earlier
        self._similarity[earlier[known]] = np.maximum(similarity[known], 0.0)
        new = (before < 0) & (similarity > 0)
        self._link(earlier[new], later[new], similarity[new])
        self._blocks = None

    def _link(self, earlier: Positions, later: Positions, similarity: _Similarities) -> None:
        """Put each ``later`` behind its ``earlier``, in front of what stood there."""
        displaced, likeness = self._next[earlier], self._similarity[earlier]
        self._next[earlier], self._previous[later] = later, earlier
        self._similarity[earlier] = similarity
        pushed = displaced >= 0
        tails, behind = later[pushed], displaced[pushed]
        likeness = np.minimum(likeness[pushed], similarity[pushed])
        self._previous[behind] = -1
        # Within one call, tokens may follow each other: what stood there comes behind the last. Of
        # those that come behind the same one, each comes behind the one before.
        while len(tails):
            for _ in range(_HOPS):
                further = self._next[tails]
                tails = np.where(further >= 0, further, tails)
            fits = (self._next[tails] < 0) & (self._map.entry(tails) != self._map.entry(behind))
            tails, behind, likeness = tails[fits], behind[fits], likeness[fits]
            _, first = np.unique(tails, return_index=True)
            self._next[tails[first]], self._previous[behind[first]] = behind[first], tails[first]
            self._similarity[tails[first]] = likeness[first]
            tails, behind, likeness = (np.delete(x, first) for x in (tails, behind, likeness))

    def give_up(self, index: int) -> tuple[Positions, Positions]:
        """Block ``index`` is re-pointed; its tokens live on in their neighbours.

        Returns:
            Pairs that have become neighbours, worth comparing: how alike they are is a guess.
        """
        own = self._map.positions(index)
        before, after = self._previous[own].copy(), self._next[own].copy()
        likeness = np.minimum(self._similarity_to_previous()[own], self._similarity[own])
        self._needed[before[before >= 0]] = True
        self._needed[after[after >= 0]] = True
        self._next[before[before >= 0]] = -1
        self._similarity[before[before >= 0]] = 0.0
        self._previous[after[after >= 0]] = -1
        self._next[own] = np.where(after >= 0, after, before)
        self._previous[own], self._similarity[own], self._gone[own] = -1, 0.0, True
        joined = (before >= 0) & (after >= 0)
        joined &= self._map.entry(before) != self._map.entry(after)
        before, after = before[joined], after[joined]
        self._next[before], self._previous[after] = after, before
        self._similarity[before] = likeness[joined]
        self._blocks = None
        return before, after

    def keep(self, gone: Positions, later: Positions) -> tuple[Positions, Positions]:
        """Twins of tokens that have been given up already, found too late.

        Where nothing stands for such a token yet, its twin does from now on.

        Args:
            gone: ``[N]`` tokens of re-pointed blocks, each at most once.
            later: ``[N]`` their twins, in blocks that are there.

        Returns:
            Pairs that are worth comparing: who stands for a token already, and its new twin.
        """
        successors = self._next[gone]
        for _ in range(_HOPS):
            on = (successors >= 0) & self._gone[successors]
            if not on.any():
                break
            successors = np.where(on, self._next[successors], successors)
        alone = (successors < 0) | self._gone[successors]
        self._next[gone[alone]] = later[alone]
        self._needed[later[alone]] = True
        self._blocks = None
        apart = ~alone & (self._map.entry(successors) != self._map.entry(later))
        successors, later = successors[apart], later[apart]
        _, first = np.unique(successors, return_index=True)
        return successors[first], later[first]

    def _similarity_to_previous(self) -> _Similarities:
        has = self._previous >= 0
        return np.where(has, self._similarity[self._previous], np.float32(0.0))

    @property
    def best(self) -> tuple[Positions, _Similarities]:
        """Each token's more similar neighbour, -1 if it has none, and how similar that is."""
        behind, ahead = self._similarity_to_previous(), self._similarity
        twins = np.where(self._gone, -1, np.where(behind > ahead, self._previous, self._next))
        return twins.astype(np.int32), np.maximum(behind, ahead)

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        """``[blocks]``: mean over a block's tokens of the similarity to their nearest twin."""
        return self._by_block().coverage

    @property
    def last_copies(self) -> npt.NDArray[np.bool_]:
        """``[blocks]``: whether something that was given up elsewhere survives only there."""
        return self._by_block().last_copies

    def _by_block(self) -> _BlockView:
        if self._blocks is None:
            size = self._map.block_size
            whole = self._map.first_position(self._map.full(len(self._next)))
            covered = np.maximum(self._similarity, self._similarity_to_previous())[:whole]
            alone = self._needed & ~self._gone & (self._next < 0) & (self._previous < 0)
            last_copies = np.logical_or.reduce(alone[:whole].reshape(-1, size), axis=1)
            self._blocks = _BlockView(covered.reshape(-1, size).mean(axis=1), last_copies)
        return self._blocks


class _BlockView(NamedTuple):
    coverage: npt.NDArray[np.float32]
    last_copies: npt.NDArray[np.bool_]
