"""What a step tells workers about page selection, and what they report."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SelectionCommands:
    """Scheduler to workers, with one step.

    Attributes:
        exact: requests that read all of their pages; every one, each step anew.
    """

    exact: Set[str]


@dataclass
class SelectionReport:
    """Workers to scheduler: what requests that generate have read since the last report.

    Attributes:
        read: pages that attention has read, each counted for every layer and KV head.
        there: pages that they had, counted likewise.
    """

    read: int
    there: int

    def add(self, other: SelectionReport) -> None:
        """Add what another rank reports, of its own KV heads."""
        self.read += other.read
        self.there += other.there
