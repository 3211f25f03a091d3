"""Groups of layers: which may be edited, what stands beside them, and what it takes; on vLLM's own
classes, without an engine."""

from __future__ import annotations

from typing import Any

import pytest

from memshare.core.footprint import SideGroup
from memshare.core.interfaces import CacheGroup
from memshare.engine.adapter import vllm_adapter
from tests.memshare.engine.adapter.caches import BLOCK, Scheduled, specs

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("kinds", "index"),
    [
        (("full",), 0),
        (("sliding", "full"), 1),
        (("sliding",) * 5 + ("full",), 5),
        (("gdn", "full", "gdn"), 1),
        (("windowed", "full"), 1),
    ],
)
def test_the_group_with_full_attention_is_found_wherever_it_is(
    kinds: tuple[str, ...], index: int
) -> None:
    found = vllm_adapter().editable_group(specs(*kinds))
    windows = {"sliding": 64, "windowed": 64, "gdn": 2}
    beside = tuple(SideGroup(BLOCK, windows[kind]) for kind in kinds if kind != "full")
    assert found == CacheGroup(index, BLOCK, (f"full.{index}",), beside)


@pytest.mark.parametrize(
    "kinds",
    [("full",), ("sliding", "full"), ("sliding", "sliding", "full"), ("gdn", "gdn", "gdn", "full")],
)
def test_a_footprint_is_what_vllm_takes_at_most(kinds: tuple[str, ...]) -> None:
    """Token by token, over several windows: what is free goes by as many blocks as are foretold."""
    engine = Scheduled(specs(*kinds))
    tables, footprint = engine.tables, engine.tables.footprint
    request = engine.start("a", 1)
    most = 0
    for tokens in range(2, 10 * BLOCK):
        begins = footprint.token_map.entries(tokens) > tables.entries("a")
        free = tables.free
        engine.compute(request, 1)
        assert free - tables.free <= (footprint.begun_together if begins else 0)
        most = max(most, tables.total - tables.free)
        # A state's old block goes in the step behind that which begins the new one, or before.
        assert most <= footprint.blocks(tokens) <= most + kinds.count("gdn"), tokens
    grown = footprint.blocks(10 * BLOCK) - footprint.blocks(4 * BLOCK)
    assert grown <= footprint.most_growth(6 * BLOCK)


@pytest.mark.parametrize("kinds", [("sliding",), ("full", "full"), ("windowed",)])
def test_without_one_such_group_there_is_none_to_edit(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="have full attention; one is wanted"):
        vllm_adapter().editable_group(specs(*kinds))


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (("full", "sliding", "full"), "2 KV cache groups with full attention"),
        (("mla",), "multi-head latent attention"),
        (("sliding", "mla"), "multi-head latent attention"),
        (("gdn",), "no layer of the model has full attention"),
        (("mamba", "full"), r"keep a MambaSpec (MAMBA2), which has not been run"),
        (("sliding",), "no layer of the model has full attention"),
        (("windowed",), "--no-disable-hybrid-kv-cache-manager"),
        (("chunked", "full"), "keep a ChunkedLocalAttentionSpec"),
        (("full",), None),
        (("sliding", "full"), None),
        (("sliding",) * 5 + ("full",), None),
        (("gdn", "full", "gdn"), None),
    ],
)
def test_caches_that_cannot_be_shared_are_refused(kinds: tuple[str, ...], said: str | None) -> None:
    refusals = list(vllm_adapter().cache_refusals(specs(*kinds)))
    assert len(refusals) == (said is not None)
    assert said is None or said in refusals[0]


def test_the_block_at_a_prompts_end_is_published_again_where_hashes_are_of_fewer_tokens() -> None:
    """Tainted or not, in every step: so it must be nobody's target there (RequestTracker)."""
    assert not Scheduled(specs("full")).tables.publishes_prompt_end
    engine = Scheduled(specs("sliding", "full"), hash_block=BLOCK // 2)
    assert engine.tables.publishes_prompt_end
    request = engine.start("a", 2 * BLOCK + BLOCK - 2)  # ends in entry 2, behind half of it
    engine.tables.stop_publishing("a")
    engine.compute(request, 3 * BLOCK)
    table = engine.tables.table("a")
    assert table is not None
    later: Any = table[4]
    assert later.block_hash is None
    engine.tables.repoint("a", 2, later)
    engine.compute(request, 1)
    assert later.block_hash is not None, "approximate KV under the hash of the prompt"
