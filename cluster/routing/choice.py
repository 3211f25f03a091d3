"""Which replica a request goes to. Decisions only: no Ray, no clock, no network.

- A request of a session goes to the session's *home*, where its prefix is cached. Homes are found
  by consistent hashing, so that they stay where they are when replicas come and go, and so that all
  proxies agree without talking to each other.
- A home whose requests wait for memory is passed over, as long as others have some: consistent
  hashing with bounded loads (Mirrokni et al., arXiv 1608.01350).
- All others take the better of two replicas drawn at random (Mitzenmacher, "The power of two
  choices in randomized load balancing", 1996): by what their KV caches will hold, as far as that is
  known, else by their requests.
- Of a kind that its caller names, both are drawn, and homes are looked for, among the replicas that
  this kind prefers (:mod:`cluster.routing.kinds`), as long as these are not fuller than others.

Reports of load are seconds old. What has been sent to a replica since is added to what it reported,
or everybody would run to the replica that was idle last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from cluster.config import RoutingConfig
from cluster.routing.kinds import Kinds
from cluster.routing.load import Load
from cluster.routing.ring import Ring

Ongoing = Callable[[str], int | None]
"""Requests that a router knows to be on a replica now; None if it does not know."""


@dataclass(frozen=True, slots=True)
class _Report:
    demand: float
    requests: float


class Routing:
    """The choices of one router. Each costs O(log replicas), whatever their number."""

    def __init__(self, config: RoutingConfig, random: Random) -> None:
        """``random`` draws the two candidates."""
        self._config = config
        self._random = random
        self._replicas: list[str] = []
        self._known: set[str] = set()
        self._ring = Ring()
        self._kinds = Kinds(self._ring if config.sessions else None)
        self._has_kinds = config.kinds
        self._has_homes = config.sessions
        self._reports: dict[str, _Report] = {}
        self._demand = 0.0  # sums over the reports
        self._requests = 0.0
        self._limit = 0.0  # the demand at which a replica is too full to be preferred

    def set_replicas(self, replicas: Collection[str]) -> None:
        """Tell which replicas there are. O(replicas)."""
        self._replicas = sorted(replicas)
        self._known = set(replicas)
        if self._config.sessions:
            self._ring.update(self._known)
        if self._has_kinds:
            self._kinds.set_replicas(self._known)
        for gone in self._reports.keys() - self._known:
            self.report(gone, None)

    def report(self, replica: str, load: Load | None) -> None:
        """Take what a replica said of itself; None forgets it."""
        old = self._reports.pop(replica, None)
        if old is not None:
            self._demand -= old.demand
            self._requests -= old.requests
        if load is not None and replica in self._known and self._config.load == "kv":
            new = self._reports[replica] = _Report(load.demand, load.requests)
            self._demand += new.demand
            self._requests += new.requests
        if self._reports:
            self._limit = self._config.spill_imbalance * self._demand / len(self._reports)

    def rank(self, session: str, ongoing: Ongoing, kind: str = "") -> list[list[str]]:
        """Replicas to try for one request, best first; those of one rank are equally good.

        Args:
            session: the request's session, or empty.
            ongoing: see :data:`Ongoing`.
            kind: what its caller calls its kind, or empty.

        Returns:
            Ranks of replicas; empty if there are none. A replica may occur twice.
        """
        if not self._replicas:
            return []
        if kind and self._has_kinds:
            preferred = self._kinds.stretch(kind)
            if preferred is not None:
                if session and self._has_homes:
                    homes = self._homes(preferred.ring.walk(session), ongoing)
                    return [[home] for home in homes] + self._two_choices(self._replicas, ongoing)
                ranks, demand = self._compare(preferred.names, ongoing)
                if demand is None:  # those that refuse, for they are full, leave it to anybody
                    return [*ranks, _two_of(self._replicas, self._random)]
                if demand <= self._limit:
                    return ranks
                return self._two_choices(self._replicas, ongoing)
        anyone = self._two_choices(self._replicas, ongoing)
        if not session or not self._has_homes:
            return anyone
        walk = self._ring.walk(session)
        return [[home] for home in self._homes(walk, ongoing)] + anyone

    def estimate(self, replica: str, ongoing: Ongoing) -> float | None:
        """The replica's demand by now (see :mod:`cluster.routing.load`), None if not known."""
        report = self._reports.get(replica)
        if report is None:
            return None
        # Never less than was reported: of what other proxies send, this one hears late.
        requests = max(ongoing(replica) or 0, report.requests)
        if report.requests:
            return report.demand / report.requests * requests
        return self._demand / self._requests * requests if self._requests else 0.0

    def _homes(self, walk: Iterator[str], ongoing: Ongoing) -> list[str]:
        homes = islice(walk, 1 + self._config.fallbacks)
        return [home for home in homes if not self._is_overloaded(home, ongoing)]

    def _is_overloaded(self, replica: str, ongoing: Ongoing) -> bool:
        demand = self.estimate(replica, ongoing)
        if demand is None or demand <= self._config.spill_demand:
            return False
        return demand > self._limit

    def _two_choices(self, replicas: Sequence[str], ongoing: Ongoing) -> list[list[str]]:
        return self._compare(replicas, ongoing)[0]

    def _compare(
        self, replicas: Sequence[str], ongoing: Ongoing
    ) -> tuple[list[list[str]], float | None]:
        """Two of the replicas by rank, and the demand of the better one, if both are known."""
        pair = _two_of(replicas, self._random)
        demands = [self.estimate(replica, ongoing) for replica in pair]
        known = [demand for demand in demands if demand is not None]
        if len(known) < len(pair):
            return [pair], None
        if len(pair) < 2 or known[0] == known[1]:
            return [pair], known[0]  # Ray Serve takes the one with fewer requests
        if known[0] < known[1]:
            return [[pair[0]], [pair[1]]], known[0]
        return [[pair[1]], [pair[0]]], known[1]


def _two_of(replicas: Sequence[str], random: Random) -> list[str]:
    """Two different ones in random order; fewer if there are fewer."""
    if len(replicas) < 2:
        return list(replicas)
    first = random.randrange(len(replicas))
    second = random.randrange(len(replicas) - 1)
    return [replicas[first], replicas[second + (second >= first)]]
