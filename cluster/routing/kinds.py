"""Which replicas a kind of requests prefers: kinds that callers name, and that use alike experts.

The replicas stand in a line, and each kind has a stretch of it, as long as its share of the
requests; a replica at a border serves both sides. So a kind's requests meet on few replicas, whose
steps touch fewer distinct experts of a mixture of experts, and all replicas get as many requests.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.routing.ring import Ring

_LATELY = 1000  # requests over which shares are averaged
_EVERY = 100  # requests from one look at the shares to the next
_MOVED = 0.25  # of a replica, or
_SHARE_MOVED = 0.02  # of all: a border that moves less stays, as homes of sessions move with it
_SLIVER = 0.1  # of a replica, which is left to the neighbour
_MOST = 64  # kinds; requests of others prefer nobody: names come from callers


@dataclass(frozen=True, slots=True)
class Stretch:
    """The replicas that one kind prefers.

    Attributes:
        names: themselves.
        ring: for homes of sessions; empty if there are none.
    """

    names: Sequence[str]
    ring: Ring


_NOBODY = Stretch((), Ring())


@dataclass(slots=True)
class _Kind:
    weight: float = 0.0  # of its requests
    share: float = 0.0  # of all, by which its stretch was cut
    stretch: Stretch = _NOBODY


class Kinds:
    """Shares of the kinds among one router's requests, and the stretches that follow from them."""

    def __init__(self, ring: Ring | None) -> None:
        """``ring``: of all replicas, up to date at each :meth:`set_replicas`; None without
        sessions."""
        self._ring = ring
        self._replicas: list[str] = []
        self._kinds: dict[str, _Kind] = {}
        self._unit = 1.0  # weight of the next request: grows, so that old ones fade
        self._until_look = 0

    def set_replicas(self, replicas: Collection[str]) -> None:
        """Tell which replicas there are. The line is in the order of their names, which all routers
        know."""
        self._replicas = sorted(replicas)
        self._look(is_new=True)

    def stretch(self, kind: str) -> Stretch | None:
        """Count a request, and tell where it would go; None if its kind prefers nobody."""
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= _MOST:
                return None
            known = self._kinds[kind] = _Kind()
            self._until_look = 0
        self._unit *= 1 + 1 / _LATELY
        known.weight += self._unit
        self._until_look -= 1
        if self._until_look < 0:
            self._look(is_new=not known.share)
        return known.stretch if known.stretch.names else None

    def _look(self, is_new: bool) -> None:
        self._until_look = _EVERY
        total = sum(kind.weight for kind in self._kinds.values())
        if not total or not self._replicas:
            return
        self._unit /= total
        for name, kind in list(self._kinds.items()):
            kind.weight /= total
            if kind.weight < 1e-3:  # all but gone: makes room for others
                del self._kinds[name]
                is_new = True
        least = max(_SHARE_MOVED, _MOVED / len(self._replicas))
        if is_new or any(abs(kind.share - kind.weight) > least for kind in self._kinds.values()):
            self._cut()

    def _cut(self) -> None:
        count = len(self._replicas)
        begin = 0.0
        for _, kind in sorted(self._kinds.items()):
            kind.share = kind.weight
            end = begin + kind.share * count
            first = min(math.floor(begin + _SLIVER), count - 1)
            names = self._replicas[first : max(math.ceil(end - _SLIVER), first + 1)]
            kind.stretch = Stretch(names, self._ring.part(names) if self._ring else Ring())
            begin = end
