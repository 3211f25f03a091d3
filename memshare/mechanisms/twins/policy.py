"""``twins``: blocks go first that hold little which does not stand elsewhere in the request."""

from __future__ import annotations

import numpy as np

from memshare.mechanisms.remap.policy import DemandPolicy, RequestView, Victim
from memshare.mechanisms.twins.params import TwinsParams

# A re-pointed block adds log(multiplicity) to its donor's attention logits. So much further away,
# in blocks, may a donor be to have one sharer less.
_BLOCKS_A_SHARER = 16


class TwinsPolicy(DemandPolicy):
    """Takes the block whose loss is expected to cost least; the donor is the nearest that stays.

    The cost is what has no twin, times how much attention the block gets: the older, the less.

    On real traces (tools/bench/study_policies.py) the nearest block, before or behind, that is
    unlikely to go itself has been a better donor than the nearest behind, than the block that
    holds most of the target's twins, and than the newest. Two reasons: keys that stand near each
    other have been turned by nearly the same angle, and victims spread over many donors.
    """

    def __init__(self, params: TwinsParams) -> None:
        self._params = params

    def promise(self, view: RequestView) -> float:
        """See :meth:`DemandPolicy.promise`: the best coverage of any block."""
        return float(view.coverage[view.first : view.end].max(initial=0.0))

    def choose(self, view: RequestView) -> Victim | None:
        """See :meth:`DemandPolicy.choose`."""
        least, coverage = self._least_coverage(view), view.coverage
        targets = [
            i for i in range(view.first, view.end) if coverage[i] >= least and view.is_target(i)
        ]
        lost = 1.0 - coverage[targets]
        age = ((np.array(targets) + 1.0) / max(view.full, 1)) ** self._params.age_weight
        # The control looks at coverage alone: with age it would do well for another reason.
        cost = -lost if self._params.order == "least_covered" else lost * age
        ranked = [targets[i] for i in np.argsort(cost, kind="stable")]
        likely_next = set(ranked[: view.budget])
        own = [j for j in range(view.first, view.full) if view.is_own(j)]
        stay = [j for j in own if j not in likely_next] or own
        for target in ranked:
            donors = [j for j in stay if j != target]
            if donors:
                donor = min(donors, key=lambda j: (_distance(j, target, view), j < target))
                return Victim(target, donor, float(coverage[target]))
        return None

    def objection(self, view: RequestView, index: int) -> str | None:
        """See :meth:`DemandPolicy.objection`."""
        return "badly covered" if view.coverage[index] < self._params.min_coverage else None

    def _least_coverage(self, view: RequestView) -> float:
        asked = view.block_threshold
        return self._params.min_coverage if asked is None else asked


def _distance(donor: int, target: int, view: RequestView) -> int:
    return abs(donor - target) + _BLOCKS_A_SHARER * view.sharers(donor)
