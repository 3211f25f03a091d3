"""Which replica a request goes to. Decisions only: no Ray, no clock, no network.

- A request of a session goes to the session's *home*, where its prefix is cached. Homes are found
  by consistent hashing, so that they stay where they are when replicas come and go, and so that all
  proxies agree without talking to each other.
- A home whose requests wait for memory is passed over, as long as others have some: consistent
  hashing with bounded loads (Mirrokni et al., arXiv 1608.01350).
- All others take the better of two replicas drawn at random (Mitzenmacher, "The power of two
  choices in randomized load balancing", 1996): by what their KV caches will hold, as far as that is
  known, else by their requests.

Reports of load are seconds old. What has been sent to a replica since is added to what it reported,
or everybody would run to the replica that was idle last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import numpy as np

from cluster.config import RoutingConfig
from cluster.routing.load import Load

_POINTS = 100  # of each replica on the ring; the load of homes then varies by about a tenth

Ongoing = Callable[[str], int | None]
"""Requests that a router knows to be on a replica now; None if it does not know."""


class Ring:
    """Consistent hashing: keys to members, each in an order of preference of its own."""

    def __init__(self, members: Collection[str] = ()) -> None:
        """Place ``members`` on the ring."""
        self._points = np.empty(0, np.uint64)  # ascending
        self._owners = np.empty(0, np.int32)  # whose each point is: indices of _names
        self._names: list[str] = []
        self._places: dict[str, int] = {}
        self._vacant: list[int] = []
        self.update(members)

    def update(self, members: Collection[str]) -> None:
        """Make ``members`` those on the ring. Points of who stays are copied, not sorted."""
        wanted = set(members)
        gone = [self._places.pop(name) for name in self._places.keys() - wanted]
        if gone:
            stays = ~np.isin(self._owners, gone)
            self._points, self._owners = self._points[stays], self._owners[stays]
            self._vacant += gone
        new = sorted(wanted - self._places.keys())
        if new:
            points = np.array([_hash(f"{n}:{i}") for n in new for i in range(_POINTS)], np.uint64)
            owners = np.repeat(np.array([self._place(name) for name in new], np.int32), _POINTS)
            order = points.argsort()
            where = self._points.searchsorted(points[order])
            self._points = np.insert(self._points, where, points[order])
            self._owners = np.insert(self._owners, where, owners[order])

    def _place(self, name: str) -> int:
        if self._vacant:
            place = self._vacant.pop()
            self._names[place] = name
        else:
            place = len(self._names)
            self._names.append(name)
        self._places[name] = place
        return place

    def walk(self, key: str) -> Iterator[str]:
        """All members once: first the key's home, then who would follow without it."""
        start = int(self._points.searchsorted(np.uint64(_hash(key)), side="right"))
        seen: set[int] = set()
        for offset in range(len(self._owners)):
            owner = int(self._owners[(start + offset) % len(self._owners)])
            if owner not in seen:
                seen.add(owner)
                yield self._names[owner]
                if len(seen) == len(self._places):
                    return


def _hash(key: str) -> int:
    # Equal in every process and after every restart, which hash() is not.
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


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
        self._reports: dict[str, _Report] = {}
        self._demand = 0.0  # sums over the reports
        self._requests = 0.0

    def set_replicas(self, replicas: Collection[str]) -> None:
        """Tell which replicas there are. O(replicas)."""
        self._replicas = sorted(replicas)
        self._known = set(replicas)
        if self._config.sessions:
            self._ring.update(self._known)
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

    def rank(self, session: str, ongoing: Ongoing) -> list[list[str]]:
        """Replicas to try for one request, best first; those of one rank are equally good.

        Args:
            session: the request's session, or empty.
            ongoing: see :data:`Ongoing`.

        Returns:
            Ranks of replicas; empty if there are none. A replica may occur twice.
        """
        if not self._replicas:
            return []
        anyone = self._two_choices(ongoing)
        if not session or not self._config.sessions:
            return anyone
        return [[home] for home in self._homes(session, ongoing)] + anyone

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

    def _homes(self, session: str, ongoing: Ongoing) -> list[str]:
        homes = islice(self._ring.walk(session), 1 + self._config.fallbacks)
        return [home for home in homes if not self._is_overloaded(home, ongoing)]

    def _is_overloaded(self, replica: str, ongoing: Ongoing) -> bool:
        demand = self.estimate(replica, ongoing)
        if demand is None or demand <= self._config.spill_demand:
            return False
        return demand > self._config.spill_imbalance * self._demand / len(self._reports)

    def _two_choices(self, ongoing: Ongoing) -> list[list[str]]:
        pair = _two_of(self._replicas, self._random)
        demands = [self.estimate(replica, ongoing) for replica in pair]
        known = [demand for demand in demands if demand is not None]
        if len(pair) < 2 or len(known) < 2 or known[0] == known[1]:
            return [pair]  # Ray Serve takes the one with fewer requests
        return [[pair[0]], [pair[1]]] if known[0] < known[1] else [[pair[1]], [pair[0]]]


def _two_of(replicas: Sequence[str], random: Random) -> list[str]:
    """Two different ones in random order; fewer if there are fewer."""
    if len(replicas) < 2:
        return list(replicas)
    first = random.randrange(len(replicas))
    second = random.randrange(len(replicas) - 1)
    return [replicas[first], replicas[second + (second >= first)]]
