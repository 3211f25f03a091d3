"""``random``: the baseline that lets go of unprotected blocks in random order."""

from __future__ import annotations

import random

from memshare.mechanisms.remap.policy import DemandPolicy, RequestView, Victim


class RandomPolicy(DemandPolicy):
    """Draws the target among the blocks that free memory, the donor among the others that stay."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, view: RequestView) -> Victim | None:
        """See :meth:`DemandPolicy.choose`."""
        targets = [i for i in range(view.first, view.end) if view.is_target(i)]
        donors = [i for i in range(view.first, view.full) if view.is_own(i)]
        if not targets or len(donors) < 2:
            return None
        target = self._random.choice(targets)
        donor = self._random.choice([i for i in donors if i != target])
        return Victim(target, donor)
