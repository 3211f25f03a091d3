"""What a user can set of the policy ``twins``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memshare.config.fields import Fraction, PolicyParams, Real, Whole


class TwinsParams(PolicyParams):
    """Blocks first whose tokens stand elsewhere in the request too, at whatever offset."""

    name: Literal["twins"]
    shortest_run: Whole = Field(default=4, ge=1, le=8)
    """Tokens, rounded up to 1, 2, 4 or 8. Two tokens are twins only if they stand in equal runs of
    so many. Short runs are chance: they find more twins, and take the number in one sum for that
    in another."""
    age_weight: Real = Field(default=1.0, ge=0.0, le=8.0)
    """Exponent of a block's place in its request, 0..1, in what losing it is expected to cost: what
    has no twin, times place to this power. 0 looks at coverage alone."""
    min_coverage: Fraction = 0.05
    """Coverage, 0..1. Blocks below it are never targets, and vLLM preempts if memory is short all
    the same; with 0, memory comes before exactness."""
    order: Literal["most_covered", "least_covered"] = "most_covered"
    """Which blocks go first. ``least_covered`` is the negative control of measurements. It does not
    look at age; what it costs more than ``most_covered`` is what the order is worth."""
