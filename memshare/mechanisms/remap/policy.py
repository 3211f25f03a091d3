"""What picks the blocks that are given up, without any engine: indices in, indices out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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
        """``[full]``, 0..1: how much of each block appears elsewhere in the request; 0 if
        unknown."""
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
    """A policy that picks a victim at the moment when a block is needed."""

    def promise(self, view: RequestView) -> float:
        """The most quality that :meth:`choose` could find in the request, cheaply; 0..1."""
        del view
        return 0.0

    @abstractmethod
    def choose(self, view: RequestView) -> Victim | None:
        """Pick one of the request's blocks, or None if there is none to take."""

    def objection(self, view: RequestView, index: int) -> str | None:
        """Why :meth:`choose` would never take this block, in words; None if it might."""
        del view, index
        return None
