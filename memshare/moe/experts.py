"""Which experts the tokens of a step chose, and how unevenly they are used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HALF_LIFE = 256
"""Counted steps after which an expert's tokens weigh half as much in the skew."""


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """The experts of one engine step.

    Attributes:
        layers: numbers of the layers with experts.
        counts: ``[layers, experts]``, tokens that chose each expert.
        decodes: every request had one token in the step.
    """

    layers: tuple[int, ...]
    counts: npt.NDArray[np.int32]
    decodes: bool

    @property
    def touched(self) -> npt.NDArray[np.int64]:
        """``[layers]``: distinct experts."""
        return np.asarray(np.count_nonzero(self.counts, axis=1))

    @property
    def chosen(self) -> npt.NDArray[np.int64]:
        """``[layers]``: tokens, each as often as it chose an expert."""
        return np.asarray(self.counts.sum(axis=1, dtype=np.int64))


class ExpertLoad:
    """How many tokens chose each expert, of which old ones fade."""

    def __init__(self) -> None:
        self._load: npt.NDArray[np.float64] | None = None

    def take(self, step: ExpertCounts) -> None:
        """Add a step."""
        if self._load is None:
            self._load = np.zeros(step.counts.shape)
        self._load *= 0.5 ** (1 / HALF_LIFE)
        self._load += step.counts

    def skew(self) -> npt.NDArray[np.float64]:
        """``[layers]``: tokens of the busiest expert as a multiple of the mean; 1 if all alike.
        Empty before the first step."""
        if self._load is None:
            return np.empty(0)
        return np.asarray(self._load.max(axis=1) / np.maximum(self._load.mean(axis=1), 1e-9))
