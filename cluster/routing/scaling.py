"""How many replicas there should be. Decisions only: no Ray, no clock.

Load is counted as :class:`cluster.routing.load.Load` does, in units of one replica, so that the
number that a total load needs is a division. Between the loads at which replicas come and go lies
the one that their new number aims at: whatever was decided is right for the same load afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cluster.config import ScalingConfig
from cluster.routing.load import Load

_MOST_AT_ONCE = 2  # at most twice, at least half as many: one report may be wrong


class Decision(NamedTuple):
    """How many replicas, and why."""

    replicas: int
    reason: str


def decide(config: ScalingConfig, loads: Sequence[Load], replicas: int) -> Decision:
    """The number of replicas for these loads.

    Args:
        config: thresholds and bounds.
        loads: of the replicas that have reported, each averaged over some time.
        replicas: that serve now; those without a report are taken to be like the others.
    """
    if not loads or not replicas:
        return Decision(_within(config, replicas), "nothing is known of the load")
    mean = sum(load.demand for load in loads) / len(loads)
    need = math.ceil(mean * replicas / config.target_demand)
    requests = sum(load.requests for load in loads)
    waiting = sum(load.waiting for load in loads) / requests if requests else 0.0
    preemptions = sum(load.preemptions for load in loads) / len(loads)
    if mean > config.up_demand:
        reason = f"load {mean:.2f} above {config.up_demand:g}"
    elif waiting > config.up_waiting_share:
        reason = f"{waiting:.0%} of the requests wait"
    elif preemptions > config.up_preemptions_per_minute:
        reason = f"{preemptions:.1f} preemptions a minute and replica"
    else:
        is_calm = (
            waiting <= config.up_waiting_share / 2
            and preemptions <= config.up_preemptions_per_minute / 2
        )
        if is_calm and mean * replicas < config.down_demand * (replicas - 1):
            wanted = max(need, math.ceil(replicas / _MOST_AT_ONCE))
            reason = f"load {mean:.2f}, with one replica fewer below {config.down_demand:g}"
            return Decision(_within(config, wanted), reason)
        return Decision(_within(config, replicas), f"load {mean:.2f}")
    wanted = min(max(replicas + 1, need), _MOST_AT_ONCE * replicas)
    return Decision(_within(config, wanted), reason)


def _within(config: ScalingConfig, replicas: int) -> int:
    return min(max(replicas, config.min_replicas), config.max_replicas)
