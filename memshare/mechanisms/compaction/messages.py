"""What a step tells the workers to compact, and what they report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass(frozen=True, slots=True)
class Packing:
    """Tokens of some entries of a request go; those that stay move together.

    Attributes:
        request_id: the engine's name for the request.
        entries: full, committed entries of its block table, ascending, none of them a hole.
        blocks: the ids of the blocks under them.
        keep: how many of them stay: the first ``keep`` entries hold the kept tokens afterwards, the
            others become holes. 0 drops every token, and moves nothing.
    """

    request_id: str
    entries: tuple[int, ...]
    blocks: tuple[int, ...]
    keep: int


@dataclass(frozen=True, slots=True)
class CompactionCommands:
    """Scheduler to workers, with one step.

    Attributes:
        packings: in the order in which they are to be done.
        holes: how many holes the table of each request has after them, of every request that has
            some. Totals, each step anew: workers keep no count that could go stale.
        ended: requests whose kept slots a worker may forget: finished or preempted.
    """

    packings: tuple[Packing, ...] = ()
    holes: Mapping[str, int] = field(default_factory=dict)
    ended: tuple[str, ...] = ()


@dataclass
class CompactionReport:
    """Workers to scheduler.

    Attributes:
        seconds: that steps took to choose and move tokens, of steps that are done; on the slowest
            rank.
    """

    seconds: list[float]

    def add(self, other: CompactionReport) -> None:
        """Take in what another rank reports."""
        pairs = zip_longest(self.seconds, other.seconds, fillvalue=0.0)
        self.seconds = [max(pair) for pair in pairs]
