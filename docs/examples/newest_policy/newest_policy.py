"""A policy from outside of MemShare: the newest unprotected blocks are given up first."""

from typing import Literal

from memshare.config import PolicyParams
from memshare.mechanisms.remap.mechanism import OnDemandRemap
from memshare.mechanisms.remap.policy import DemandPolicy, RequestView, Victim


class NewestParams(PolicyParams):
    """Its part of the configuration: the section ``policy``, when ``name`` is ``newest``."""

    name: Literal["newest"]
    spare: int = 0
    """Blocks. So many of those that could go, the newest ones, are left alone."""


class NewestPolicy(DemandPolicy):
    """Chooses a victim and a donor whenever the engine needs a block."""

    def __init__(self, params: NewestParams) -> None:
        self._spare = params.spare

    def choose(self, view: RequestView) -> Victim | None:
        """The newest block that may go; the nearest block that stays stands for it."""
        for target in reversed(range(view.first, view.end - self._spare)):
            donors = [j for j in range(view.first, view.full) if view.is_own(j) and j != target]
            if donors and view.is_target(target):
                return Victim(target, min(donors, key=lambda donor: abs(donor - target)))
        return None


class Newest(OnDemandRemap[NewestParams]):
    """What the entry point names."""

    params = NewestParams

    def policy(self) -> NewestPolicy:
        """Build the policy from its parameters."""
        return NewestPolicy(self._params)
