"""Policies: what picks pairs.

A policy is one module here, one parameter class in :mod:`memshare.config` and one line below. It
is either *staged* (pairs come from stage one, are judged by stage two and wait in the reclaim
queue) or *on demand* (a victim is picked at the moment when a block is needed). See :mod:`.base`.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from memshare.config import PolicyParams
from memshare.mechanisms.remap.policy import DemandPolicy, StagedPolicy

# Imported only when chosen, so that a policy may bring its own dependencies.
_POLICIES = {
    "paper": "memshare.mechanisms.step_pairs.policy:PaperPolicy",
    "oldest": "memshare.mechanisms.baselines.oldest:OldestPolicy",
    "random": "memshare.mechanisms.baselines.random:RandomPolicy",
    "twins": "memshare.mechanisms.twins.policy:TwinsPolicy",
}


def load_policy(params: PolicyParams) -> StagedPolicy | DemandPolicy:
    """Build the policy that ``params.name`` names."""
    module, _, name = _POLICIES[params.name].partition(":")
    return cast("StagedPolicy | DemandPolicy", getattr(import_module(module), name)(params))
