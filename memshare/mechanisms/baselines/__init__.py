"""``oldest`` and ``random``: blocks are given up whatever they hold.

Does: nothing is compared; any unprotected block goes, and another one stands for it.
Costs: no time, and the most accuracy: these are what other policies are measured against.
From: ``oldest`` is what a sliding window would forget; ``random`` is the null hypothesis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memshare.mechanisms.baselines.params import OldestParams, RandomParams
from memshare.mechanisms.remap.mechanism import OnDemandRemap

if TYPE_CHECKING:
    from memshare.mechanisms.baselines.oldest import OldestPolicy
    from memshare.mechanisms.baselines.random import RandomPolicy


class Oldest(OnDemandRemap[OldestParams]):
    """The oldest unprotected blocks first."""

    params = OldestParams

    def policy(self) -> OldestPolicy:
        """See :meth:`OnDemandRemap.policy`."""
        from memshare.mechanisms.baselines.oldest import OldestPolicy

        return OldestPolicy()


class Random(OnDemandRemap[RandomParams]):
    """Unprotected blocks in random order."""

    params = RandomParams

    def policy(self) -> RandomPolicy:
        """See :meth:`OnDemandRemap.policy`."""
        from memshare.mechanisms.baselines.random import RandomPolicy

        return RandomPolicy(self._params.seed)
