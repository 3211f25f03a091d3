"""What a user can set of the baselines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memshare.config.fields import PolicyParams, Whole


class OldestParams(PolicyParams):
    """Baseline: the oldest unprotected blocks first, whatever they hold."""

    name: Literal["oldest"]


class RandomParams(PolicyParams):
    """Baseline: unprotected blocks in random order."""

    name: Literal["random"]
    seed: Whole = Field(default=0, ge=0)
    """Seed of the generator that draws victims and donors."""
