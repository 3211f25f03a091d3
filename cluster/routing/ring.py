"""Consistent hashing: where a session is at home."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import numpy as np

_POINTS = 100  # of each replica on the ring; the load of homes then varies by about a tenth


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

    def part(self, members: Collection[str]) -> Ring:
        """The ring that these of its members would have alone."""
        part = Ring()
        part._places = {name: self._places[name] for name in members}
        stays = np.isin(self._owners, list(part._places.values()))
        part._points, part._owners = self._points[stays], self._owners[stays]
        part._names = self._names
        return part

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
