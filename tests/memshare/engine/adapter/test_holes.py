"""What the scheduler's tables promise of holes and of taking blocks back, on vLLM's own manager.

A new version of vLLM is supported once its adapter passes these (docs/porting.md).
"""

from __future__ import annotations

import pytest

from tests.memshare.engine.adapter.caches import BLOCK, Scheduled, specs

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(params=[("full",), ("sliding", "full")], ids="-".join)
def engine(request: pytest.FixtureRequest) -> Scheduled:
    return Scheduled(specs(*request.param))


def test_a_hole_frees_its_block_and_the_request_ends_as_any_other(engine: Scheduled) -> None:
    tables = engine.tables
    request = engine.start("a", 5 * BLOCK)
    table = tables.table("a")
    assert table is not None
    dropped, free = table[1], tables.free
    assert tables.drop_entries("a", [1]) == 1
    assert table[1].is_null, "what was returned is live"
    assert dropped.ref_cnt == 0
    assert tables.free == free + 1
    assert tables.entries("a") == 5, "the other entries stay where they are"
    assert tables.block_ids()["a"][1] == 0
    assert tables.reference_faults() == []
    with pytest.raises(AssertionError, match="a hole already"):
        tables.drop_entries("a", [1])
    engine.compute(request, 2 * BLOCK)
    assert tables.entries("a") == 7, "it grows as if nothing had gone"
    engine.manager.free(request)
    assert tables.free == tables.total
    assert engine.manager.reset_prefix_cache()


def test_the_block_under_a_hole_can_be_found_as_long_as_it_is_not_reused(
    engine: Scheduled,
) -> None:
    request = engine.start("a", 5 * BLOCK)
    assert engine.published(request) == 5 * BLOCK
    engine.tables.drop_entries("a", [1])
    assert engine.published(request) == 5 * BLOCK, "it is exact"
    room = BLOCK * engine.tables.free // len(engine.manager.coordinator.single_type_managers)
    other = engine.request("b", list(range(1000, 1000 + room)))
    assert engine.manager.allocate_slots(other, room) is not None
    assert engine.published(request) == 1 * BLOCK
    assert engine.tables.reference_faults() == []


def test_a_block_that_another_request_reads_frees_nothing(engine: Scheduled) -> None:
    request = engine.start("a", 3 * BLOCK)
    twin = engine.request("twin", [*request.all_token_ids, 9])
    blocks, found = engine.manager.get_computed_blocks(twin)[:2]
    assert found == 3 * BLOCK
    assert engine.manager.allocate_slots(twin, 1, found, blocks) is not None
    assert not engine.tables.make_writable("a", [0, 1])
    assert engine.published(request) == 3 * BLOCK, "nothing has changed"
    assert engine.tables.drop_entries("a", [1]) == 0
    assert engine.tables.reference_faults() == []


def test_what_is_written_to_cannot_be_found(engine: Scheduled) -> None:
    request = engine.start("a", 4 * BLOCK)
    table = engine.tables.table("a")
    assert table is not None
    assert engine.tables.make_writable("a", [1, 2])
    assert engine.published(request) == 1 * BLOCK
    pool = engine.manager.block_pool
    assert [pool.is_block_writable(block) for block in table] == [False, True, True, False]
    engine.tables.drop_entries("a", [3])
    assert not engine.tables.make_writable("a", [2, 3]), "a hole has nothing to write to"


def test_what_the_step_completes_is_taken_back_in_every_group(engine: Scheduled) -> None:
    request = engine.start("a", 2 * BLOCK + BLOCK // 2)
    assert engine.published(request) == 2 * BLOCK
    request.append_output_token_ids([7] * 2 * BLOCK)
    # As between vLLM's scheduling and its advance: allocated, and not yet counted as computed.
    assert engine.manager.allocate_slots(request, 2 * BLOCK) is not None
    assert engine.published(request) == 4 * BLOCK
    assert engine.tables.unpublish_step(request)
    assert engine.published(request) == 2 * BLOCK
    for manager in engine.manager.coordinator.single_type_managers:
        assert all(block.block_hash is None for block in manager.req_to_blocks["a"][2:])
    assert engine.tables.unpublish_step(request), "nothing is left to take back"


def test_what_another_request_has_found_cannot_be_taken_back(engine: Scheduled) -> None:
    request = engine.start("a", 2 * BLOCK)
    request.append_output_token_ids([7] * BLOCK)
    assert engine.manager.allocate_slots(request, BLOCK) is not None
    twin = engine.request("twin", [*request.all_token_ids, 9])
    blocks, found = engine.manager.get_computed_blocks(twin)[:2]
    assert found == 3 * BLOCK
    assert engine.manager.allocate_slots(twin, 1, found, blocks) is not None
    assert not engine.tables.unpublish_step(request)
    assert engine.published(request) == 3 * BLOCK
