"""What a user can set of the policy ``compaction``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memshare.config.fields import Fraction, NonEmpty, PolicyParams, Whole


class CompactionParams(PolicyParams):
    """Tokens are dropped, by layer and KV head; those that stay move together."""

    name: Literal["compaction"]
    scorer: Literal["probe", "recency", "random"] = "probe"
    """What tells how much each token is worth: a probe that was trained for the model (without one
    that fits, recency), how new the token is, or chance."""
    probe: NonEmpty | None = None
    """File of the probe, or the name of an installed one; null looks for one that fits."""
    position_weight: Fraction = 0.7
    """How much a token's place counts beside its worth; 0 looks at its worth alone."""
    seed: Whole = Field(default=0, ge=0)
    """Seed of the scorer ``random``."""
    round_fraction: Fraction = Field(default=0.25, gt=0.0)
    """Fraction of what may go that one round drops of a request, within its budget. All requests
    have lost as much before one loses more."""
    min_round: Whole = Field(default=2, ge=1)
    """KV blocks. A round that would free fewer waits until the request has grown, unless a request
    would have to be preempted instead."""
