"""Stage one's inner loop: cosine of token bags, one new step against all earlier ones.

Steps are sparse bags of token ids, stored end to end in flat arrays. The new step is scattered into
a dense scratch vector once; all dot products are then one gather and one segmented sum. That is
O(K) in the number of remembered steps, incremental, and without a Python object per token.

Plain NumPy on purpose: numba does the same work a little faster, but its import breaks the start of
vLLM's CPU workers in the same process (vllm/triton_utils/dispatcher.py walks over every module).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Label = TypeVar("Label")

_Offsets = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]

_ROUNDING = 1e-6  # must not hide an identical step from a threshold of exactly 1


class StepIndex(Generic[Label]):
    """The steps of one history, and the search for those that a new step resembles."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._labels: list[Label] = []
        self._first = 0  # steps before it have been forgotten
        self._ids: _Offsets = np.empty(1024, np.int64)  # NumPy gathers by this type fastest
        self._counts: _Floats = np.empty(1024, np.float32)
        self._offsets: _Offsets = np.zeros(65, np.int64)
        self._norms: _Floats = np.empty(64, np.float32)  # NaN: discarded, matches nothing
        self._scratch: _Floats = np.zeros(1024, np.float32)

    def __len__(self) -> int:
        """Steps that are remembered."""
        return len(self._labels) - self._first

    def match_and_add(
        self, tokens: Sequence[int], label: Label, threshold: float, limit: int
    ) -> list[tuple[Label, float]]:
        """Find the earlier steps that resemble ``tokens``, then remember it as ``label``.

        Args:
            tokens: ``[T]`` token ids, T >= 1, all >= 0.
            label: what to return for this step when a later one resembles it.
            threshold: cosine in 0..1.
            limit: the most matches to return.

        Returns:
            (label, cosine) of the matches, best first, newest first among equals.
        """
        bag = Counter(tokens)  # for a step's few tokens quicker than np.unique
        ids = np.fromiter(bag, np.int64, len(bag))
        counts = np.fromiter(bag.values(), np.float32, len(bag))
        norm = math.sqrt(float(counts @ counts))
        self._make_room(len(ids), max(bag))
        matches = self._match(ids, counts, norm, threshold, limit)
        self._add(ids, counts, norm, label)
        return matches

    def discard(self, gone: Callable[[Label], bool]) -> None:
        """Forget every step whose label is ``gone``."""
        for step in range(self._first, len(self._labels)):
            if gone(self._labels[step]):
                self._norms[step] = np.nan

    def _match(
        self, ids: _Offsets, counts: _Floats, norm: float, threshold: float, limit: int
    ) -> list[tuple[Label, float]]:
        first, last = self._first, len(self._labels)
        if first == last:
            return []
        start, end = self._offsets[first], self._offsets[last]
        self._scratch[ids] = counts
        products = self._scratch.take(self._ids[start:end], mode="clip")  # unchecked: all fit
        products *= self._counts[start:end]
        self._scratch[ids] = 0.0
        scores = np.add.reduceat(products, self._offsets[first:last] - start)
        scores /= self._norms[first:last] * np.float32(norm)
        similar = np.flatnonzero(scores >= threshold - _ROUNDING)[::-1]
        if len(similar) == 0:
            return []
        best = similar[np.argsort(-scores[similar].round(6), kind="stable")[:limit]]
        return [(self._labels[first + i], min(float(scores[i]), 1.0)) for i in best]

    def _add(self, ids: _Offsets, counts: _Floats, norm: float, label: Label) -> None:
        step = len(self._labels)
        start = self._offsets[step]
        end = start + len(ids)
        self._ids[start:end] = ids
        self._counts[start:end] = counts
        self._offsets[step + 1] = end
        self._norms[step] = norm
        self._labels.append(label)
        if len(self) > self._max_steps:
            self._first += 1
            if self._first >= self._max_steps:
                self._compact()

    def _make_room(self, distinct: int, largest: int) -> None:
        steps = len(self._labels)
        needed = int(self._offsets[steps]) + distinct
        if needed > len(self._ids):
            self._ids = _grown(self._ids, needed)
            self._counts = _grown(self._counts, needed)
        if steps + 1 > len(self._norms):
            self._norms = _grown(self._norms, steps + 1)
            self._offsets = _grown(self._offsets, len(self._norms) + 1)
        if largest >= len(self._scratch):
            self._scratch = np.zeros(max(2 * len(self._scratch), largest + 1), np.float32)

    def _compact(self) -> None:
        """Drop what lies before ``_first``. Amortised O(1) a step: runs once in max_steps."""
        start = self._offsets[self._first]
        end = self._offsets[len(self._labels)]
        self._ids[: end - start] = self._ids[start:end].copy()
        self._counts[: end - start] = self._counts[start:end].copy()
        kept = len(self)
        self._offsets[: kept + 1] = self._offsets[self._first : self._first + kept + 1] - start
        self._norms[:kept] = self._norms[self._first : self._first + kept].copy()
        del self._labels[: self._first]
        self._first = 0


_Array = TypeVar("_Array", _Offsets, _Floats)


def _grown(array: _Array, needed: int) -> _Array:
    larger = np.empty(max(2 * len(array), needed), array.dtype)
    larger[: len(array)] = array
    return larger
