"""``oldest``: the baseline that lets go of the oldest unprotected blocks, whatever they hold."""

from __future__ import annotations

from memshare.mechanisms.remap.policy import DemandPolicy, RequestView, Victim


class OldestPolicy(DemandPolicy):
    """Takes the first block that frees memory; the donor stands one budget further on.

    The distance keeps donors out of the region that later victims come from. TableView are spread
    evenly over the donors behind it, one each where there is room, because a re-pointed block adds
    log(multiplicity) to its donor's attention logits.
    """

    def choose(self, view: RequestView) -> Victim | None:
        """See :meth:`DemandPolicy.choose`."""
        for target in range(view.first, view.end):
            if view.is_target(target):
                donor = self._donor(view, target)
                return Victim(target, donor) if donor > target else None
        return None

    @staticmethod
    def _donor(view: RequestView, target: int) -> int:
        nearest = view.first + max(view.budget, 1)
        newest = view.full - 1
        if nearest > newest:
            return newest
        donor = nearest + (target - view.first) % (newest - nearest + 1)
        return donor if donor > target else newest
