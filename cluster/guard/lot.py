"""Which requests are chosen."""

from __future__ import annotations

import random


class Lot:
    """Draws a share of what comes by: one in each stretch of ``1 / share``, at a random place.

    Nobody can tell which one is next, and how many of a number are chosen is known but for one or
    two, so that a guard that should see ten requests of two hundred does.
    """

    def __init__(self, share: float, chance: random.Random) -> None:
        """Begin.

        Args:
            share: in (0, 1].
            chance: the random numbers.
        """
        self._share = share
        self._chance = chance
        self._passed = 0.0  # stretches
        self._stretch = 0
        self._place = chance.random()

    def draw(self) -> bool:
        """Whether this one is chosen."""
        self._passed += self._share
        if self._passed <= self._place:
            return False
        self._stretch += 1
        self._place = self._stretch + self._chance.random()
        return True
