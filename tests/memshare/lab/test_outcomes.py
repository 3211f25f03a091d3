"""What becomes of each block of a finished request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.config import load_config
from memshare.lab.bench.block_outcomes import count_outcomes
from memshare.mechanisms.remap.mechanism import demand_policy
from memshare.mechanisms.step_pairs.scheduler import StepPairsPart


@dataclass
class Blocks:
    """A finished request of ten blocks, of which the first is prompt and the last is recent."""

    full: int = 10
    first: int = 1
    end: int = 9
    given_up: tuple[int, ...] = (2,)
    shared: tuple[int, ...] = (3,)
    last_copies: tuple[int, ...] = (4,)
    coverage: tuple[float, ...] = (0.0, 0.0, 0.9, 0.9, 0.9, 0.01, 0.9, 0.9, 0.9, 0.9)
    has_budget: bool = True

    def is_own(self, index: int) -> bool:
        return index not in self.given_up

    def is_alone(self, index: int) -> bool:
        return index not in self.shared

    def is_target(self, index: int) -> bool:
        return self.is_own(index) and self.is_alone(index) and index not in self.last_copies


def objection_of(policy: str, view: Any) -> Callable[[int], str | None]:
    """What a policy says of the blocks; for ``paper``, pairs for 7 and 8 are at hand."""
    if policy != "paper":
        params = load_config({"policy": {"name": policy}}).policy
        return partial(demand_policy(params).objection, view)
    state: Any = SimpleNamespace(request_id="r", generation=0)
    held_back = {"r": [SimpleNamespace(target_key=("r", 0, 8))]}
    part: Any = SimpleNamespace(_queue={("r", 0, 7)}, _held_back=held_back)
    return partial(StepPairsPart.objection, part, state, view)


@pytest.mark.parametrize(
    ("policy", "has_budget", "found"),
    [
        ("twins", True, {"badly covered": 2, "not asked for": 3}),
        ("twins", False, {"badly covered": 2, "over budget": 3}),
        ("oldest", True, {"not asked for": 5}),
        ("paper", True, {"no similar block": 3, "not asked for": 2}),
        ("paper", False, {"no similar block": 3, "over budget": 2}),
    ],
)
def test_every_block_has_one_fate(policy: str, has_budget: bool, found: dict[str, int]) -> None:
    view: Any = Blocks(has_budget=has_budget)
    counted = count_outcomes(view, objection_of(policy, view))
    same = {"prompt": 1, "given up": 1, "in other tables": 1, "last copy": 1, "recent window": 1}
    assert counted == same | found
