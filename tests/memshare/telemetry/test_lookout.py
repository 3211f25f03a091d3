"""Looks at all blocks: what they count, and how much of the engine's time they take.

Stand-ins: requests and block tables that no engine made; real ones are in
tests/memshare/engine/test_bookkeeping.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from memshare.config import ReportConfig
from memshare.telemetry.block_census import BlockCensus
from memshare.telemetry.stats import Counters, Payload


@dataclass
class World:
    """Requests with ten blocks each: two of prompt, three recent."""

    total: int = 1000
    free: int = 400
    now: float = 0.0
    cost: float = 0.0001  # seconds that one request takes to look at
    requests: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counters = Counters()
        self.lookout = BlockCensus(
            ReportConfig(every_s=1.0, requests=2),
            cast(Any, self),
            cast(Any, self),
            self.counters,
            lambda: self.now,
        )

    def add(self, name: str, first_block: int, repointed: set[int]) -> None:
        ids = list(range(first_block, first_block + 10))
        for index in repointed:
            ids[index] = first_block + 6
        self.tables[name] = [SimpleNamespace(block_id=i) for i in ids]
        self.requests[name] = SimpleNamespace(
            request_id=name, repointed=repointed, holes=set(), generation=0,
            request=SimpleNamespace(num_tokens=320),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests.values())

    def table(self, name: str) -> list[Any] | None:
        self.now += self.cost / 2  # asked twice a request and look
        return self.tables.get(name)

    def first_target(self, state: Any) -> int:
        return 2

    def end_target(self, state: Any) -> int:
        return 7

    def step(self, seconds: float = 0.0) -> Payload | None:
        self.now += seconds
        self.lookout.look()
        return self.counters.take({})


@pytest.fixture
def world() -> World:
    return World()


def test_every_block_is_of_one_kind(world: World) -> None:
    world.add("a", 1, {3, 4})  # blocks 4 and 5 are free, block 7 is their donor
    world.add("b", 11, set())
    world.free = 900
    payload = world.step()
    assert payload is not None
    # 18 blocks of two requests, and 82 of requests that are not followed.
    assert payload["blocks"] == {
        "prompt": 4, "recent": 6, "shared": 1, "other": 7 + 82, "free": 900,
    }  # fmt: skip
    assert [(row["request"], row["shared"]) for row in payload["requests"]] == [("a", 2), ("b", 0)]


def test_a_long_look_is_spread_over_steps_and_rare(world: World) -> None:
    for i in range(60):
        world.add(f"r{i}", 1 + 10 * i, set())
    began, slices = world.now, 0
    while (payload := world.step(0.01)) is None:
        slices += 1
        assert slices < 100
    assert slices >= 5
    assert sum(payload["blocks"].values()) == world.total
    cost = world.now - began - (slices + 1) * 0.01
    assert world.step(0.9 * cost / 0.001) is None, "not yet"
    assert world.step(cost / 0.001) is None, "under way"
    assert any(world.step(0.01) for _ in range(100))


def test_what_is_freed_during_a_look_does_not_spoil_the_sum(world: World) -> None:
    for i in range(60):
        world.add(f"r{i}", 1 + 10 * i, set())
    assert world.step() is None
    world.requests.clear()
    world.requests["r59"] = SimpleNamespace(
        request_id="r59",
        repointed=set(),
        holes=set(),
        generation=0,
        request=SimpleNamespace(num_tokens=320),
    )
    world.tables = {"r59": world.tables["r59"]}
    world.free = 990
    payloads = [world.step() for _ in range(20)]
    (blocks,) = [payload["blocks"] for payload in payloads if payload is not None]
    assert sum(blocks.values()) == world.total
    assert min(blocks.values()) >= 0


def test_the_end_is_seen_at_once_and_once(world: World) -> None:
    world.add("a", 1, set())
    assert world.step() is not None
    world.requests.clear()
    world.free = world.total
    payload = world.step()
    assert payload is not None
    assert payload["blocks"]["free"] == world.total
    assert payload["requests"] == []
    assert [world.step(0.01) for _ in range(5)] == [None] * 5


def test_zero_never_looks(world: World) -> None:
    world.lookout._config = ReportConfig(every_s=0.0)
    world.add("a", 1, set())
    assert world.step(100.0) is None
