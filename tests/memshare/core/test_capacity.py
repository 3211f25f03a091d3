"""How many requests a cache holds (memshare/core/capacity.py)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memshare.config import MemShareConfig, ProtectConfig, load_config
from memshare.core.capacity import RequestShape, concurrency, end_target, first_target
from memshare.core.footprint import Footprint, SideGroup
from memshare.core.token_map import TokenMap

BLOCKS = TokenMap(32)
CACHE = Footprint(BLOCKS)


def config(**options: object) -> MemShareConfig:
    return load_config(options, {})


def test_a_request_by_hand() -> None:
    """96 tokens of prompt (3 blocks, protected), 400 of output: 16 blocks, the last half full."""
    limits = config(protect={"recent_tokens": 128}, budget={"max_shared_fraction": 1.0})
    shape = RequestShape(prompt=96, output=400, freed=1.0)
    assert shape.held(400, CACHE, None) == 16
    # 15 full blocks, 4 of them in the recent window, 3 prompt: 8 may go.
    assert shape.held(400, CACHE, limits) == 16 - 8
    assert RequestShape(96, 400, 0.25).held(400, CACHE, limits) == 16 - 3
    half = config(budget={"max_shared_fraction": 0.2})
    assert RequestShape(96, 400, 0.25).held(400, CACHE, half) == 16 - 3
    assert shape.held(400, CACHE, half) == 16 - 3, "the budget bounds what is freed"


def test_a_compacted_request_by_hand() -> None:
    """The same, of which 8 blocks may go: bounded by all its blocks, and by what may go."""

    def held(recent: int | None = 128, **budget: float) -> int:
        policy, protect = {"name": "compaction"}, {"recent_tokens": recent}
        limits = config(policy=policy, budget=budget, protect=protect)
        return RequestShape(96, 400, 1.0).held(400, CACHE, limits)

    assert held(max_dropped_fraction=1.0, max_thinning=1.0) == 16 - 8
    assert held(max_dropped_fraction=1.0, max_thinning=0.75) == 16 - 6
    assert held(max_dropped_fraction=0.4, max_thinning=0.9) == 16 - 6
    assert held(max_dropped_fraction=0.2, max_shared_fraction=1.0) == 16 - 3
    # Three blocks more where the window is the policy's own, of one block.
    assert held(None, max_dropped_fraction=1.0, max_thinning=1.0) == 16 - 11


def test_a_request_keeps_its_tokens_by_hand() -> None:
    """The same with a budget of tokens, of which the block that is being filled takes a part."""

    def held(kept: int | None, **budget: float) -> int:
        options = {"max_kept_tokens": kept, "max_dropped_fraction": 0.2, **budget}
        limits = config(
            policy={"name": "compaction"}, budget=options, protect={"recent_tokens": 128}
        )
        return RequestShape(96, 400, 0.0 if kept else 1.0).held(400, CACHE, limits)

    assert held(None) == 16 - 3
    assert held(320) == 10
    assert held(351) == 10, "whole blocks"
    assert held(160) == 16 - 8, "prompt and recent window stay"
    assert held(496) == 15
    assert held(2048) == 16, "a budget of tokens does not touch what is shorter"


def test_concurrency_by_hand() -> None:
    shape = RequestShape(prompt=32, output=64, freed=0.5)
    found = concurrency(shape, usable=30, footprint=CACHE, max_num_seqs=256, config=None)
    # A block of prompt; the output takes a second and a third: 2 and 3, half the time each.
    assert (found.held, found.at_full_length, found.spread) == (3, 10, 12)
    limited = concurrency(shape, usable=30, footprint=CACHE, max_num_seqs=8, config=None)
    assert (limited.at_full_length, limited.spread) == (8, 8)
    assert concurrency(shape, 2, CACHE, 256, None).at_full_length == 0


def test_protection_is_whole_blocks() -> None:
    protect = ProtectConfig(prompt_tokens=40)
    assert first_target(100, BLOCKS, protect) == 2
    assert first_target(10, BLOCKS, protect) == 1
    assert first_target(100, BLOCKS, ProtectConfig()) == 4
    assert end_target(10, BLOCKS, 40) == 8
    assert end_target(1, BLOCKS, 40) == 0


@given(
    prompt=st.integers(1, 600),
    output=st.integers(1, 600),
    freed=st.floats(0, 1),
    budget=st.floats(0, 1),
    recent=st.integers(0, 400),
    block=st.sampled_from([16, 32, 64]),
    beside=st.lists(st.builds(SideGroup, st.sampled_from([16, 32]), st.integers(2, 200))),
)
def test_sharing_never_costs_room_nor_frees_what_is_protected(
    prompt: int, output: int, freed: float, budget: float, recent: int, block: int,
    beside: list[SideGroup],
) -> None:  # fmt: skip
    limits = config(protect={"recent_tokens": recent}, budget={"max_shared_fraction": budget})
    shape = RequestShape(prompt, output, freed)
    cache = Footprint(TokenMap(block), beside)
    plain = concurrency(shape, 1000, cache, 10_000, None)
    shared = concurrency(shape, 1000, cache, 10_000, limits)
    assert shared.at_full_length >= plain.at_full_length
    assert shared.spread >= plain.spread
    assert plain.at_full_length <= plain.spread, "requests are shorter on average than at their end"
    kept_by_rule = -(-prompt // block)
    assert shared.held >= kept_by_rule
    assert plain.held - shared.held <= budget * plain.held
    assert plain.held == -(-(prompt + output) // block) + sum(
        group.blocks(prompt + output) for group in beside
    )


def test_layers_that_forget_by_hand() -> None:
    """A window of 100 tokens in blocks of 32: its tokens lie in 5 blocks at most, 4 when the last
    of them is full. Linear attention keeps a state, and the one before it for a step."""
    window, state = SideGroup(32, 100), SideGroup(512, 2)
    assert [window.blocks(tokens) for tokens in (0, 1, 32, 33, 128, 129, 161, 4000)] == [
        0, 1, 1, 2, 4, 5, 5, 5
    ]  # fmt: skip
    assert [state.blocks(tokens) for tokens in (1, 512, 513, 1024, 1025)] == [1, 1, 2, 2, 2]
    hybrid = Footprint(BLOCKS, (window, state))
    assert hybrid.blocks(4000) == 125 + 5 + 2
    assert (hybrid.begun_together, CACHE.begun_together) == (3, 1)
    assert hybrid.most_growth(64) == 3 + 3 + 2
