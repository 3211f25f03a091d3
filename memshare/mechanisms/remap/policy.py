"""What a policy is, without any engine: block indices in, block indices out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from memshare.core.token_map import TokenMap
from memshare.search.evaluate import Span


@dataclass(frozen=True, slots=True)
class BlockRef:
    """The ``index``-th block of the request that wrote ``span``'s step."""

    span: Span
    index: int


class PairProposal(NamedTuple):
    """Re-point ``target`` at ``donor``."""

    target: BlockRef
    donor: BlockRef


class StagedPolicy(ABC):
    """A policy whose pairs pass stage one and stage two."""

    @abstractmethod
    def propose(self, later: Span, earlier: Span, token_map: TokenMap) -> Iterator[PairProposal]:
        """Block pairs of two similar steps that are worth comparing in stage two."""

    def damage(self, similarity: float) -> float:
        """How much a verified pair is expected to hurt; the reclaim queue takes the least first."""
        return 1.0 - similarity


class RequestView(Protocol):
    """What an on-demand policy may know of one request's blocks. Indices into its block table."""

    @property
    def first(self) -> int:
        """First block that may be a target."""
        ...

    @property
    def end(self) -> int:
        """One past the last block that may be a target now (the recent window begins here)."""
        ...

    @property
    def full(self) -> int:
        """One past the last full, committed block: what may be a donor ends here."""
        ...

    @property
    def budget(self) -> int:
        """How many of the request's blocks may be re-pointed in all."""
        ...

    def is_target(self, index: int) -> bool:
        """Whether giving up this entry would free its block: it is not re-pointed, nobody but
        re-pointed entries of the same request shares the block (they move along), and nothing that
        was given up elsewhere survives only in it."""
        ...

    def is_own(self, index: int) -> bool:
        """Whether the entry has not been re-pointed, so that it may be a donor."""
        ...

    def sharers(self, index: int) -> int:
        """How many other entries point to the block of this entry."""
        ...

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        """``[full]``, 0..1: how much of each block has twins (memshare/twins.py). 0 if unknown."""
        ...

    @property
    def block_threshold(self) -> float | None:
        """The least coverage that the request itself asks for; None if it does not."""
        ...


@dataclass(frozen=True, slots=True)
class Victim:
    """An on-demand choice within one request.

    Attributes:
        target: the block that is given up.
        donor: the block that stands for it.
        quality: how little is lost, 0..1; 0 if the policy does not know.
    """

    target: int
    donor: int
    quality: float = 0.0


class DemandPolicy(ABC):
    """A policy that picks a victim when a block is needed.

    Attributes:
        uses_coverage: whether it looks at :attr:`RequestView.coverage`, which takes both stages. If
            not, nothing is compared.
    """

    uses_coverage = False

    def promise(self, view: RequestView) -> float:
        """The most quality that :meth:`choose` could find in the request, cheaply; 0..1."""
        del view
        return 0.0

    @abstractmethod
    def choose(self, view: RequestView) -> Victim | None:
        """Pick one of the request's blocks, or None if there is none to take."""
