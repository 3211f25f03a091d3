"""The mechanism of a policy that is nothing more. Light: a configuration imports it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from memshare.config import registry
from memshare.mechanisms.contract import Mechanism, Params

if TYPE_CHECKING:
    from memshare.config import PolicyParams
    from memshare.mechanisms.contract import SchedulerContext, WorkerContext
    from memshare.mechanisms.remap.on_demand import OnDemandPart
    from memshare.mechanisms.remap.policy import DemandPolicy
    from memshare.mechanisms.remap.worker import RemapWorkerPart


class OnDemandRemap(Mechanism[Params]):
    """Base of mechanisms that are a policy and no more: what to give up, and what stands for it."""

    @abstractmethod
    def policy(self) -> DemandPolicy:
        """Build the policy."""

    def scheduler_part(self, context: SchedulerContext) -> OnDemandPart:
        """See :meth:`Mechanism.scheduler_part`."""
        from memshare.mechanisms.remap.on_demand import OnDemandPart

        return OnDemandPart(context, self.policy())

    def worker_part(self, context: WorkerContext) -> RemapWorkerPart:
        """See :meth:`Mechanism.worker_part`."""
        from memshare.mechanisms.remap.worker import RemapWorkerPart

        return RemapWorkerPart(context.tables)


def demand_policy(params: PolicyParams) -> DemandPolicy:
    """The policy that chooses victims on demand, for whoever asks it outside an engine.

    Raises:
        ValueError: the mechanism of that name does not work so.
    """
    mechanism = registry.mechanism_of(params)
    if not isinstance(mechanism, OnDemandRemap):
        raise ValueError(f"policy {params.name!r} chooses no victims on demand")
    return mechanism.policy()
