"""Which blocks a step gives to whom, by vLLM's own scheduler, and what adapters find of others'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memshare.core.block_writers import BlockWriters, Found
from memshare.core.token_map import TokenMap
from memshare.engine.adapter import vllm_adapter
from memshare.lab.simulate.harness import SchedulerHarness
from tests.memshare.engine.harness import write_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

BLOCK = 16


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[SchedulerHarness]:
    """Seven blocks, and prompts in pieces."""
    folder = write_tiny_model(tmp_path)
    harness = SchedulerHarness(
        folder, {"mode": "off"}, 8, max_num_seqs=4, block_size=BLOCK, max_num_batched_tokens=40
    )
    yield harness
    harness.close()


def test_tables_that_grow_by_what_is_told_are_the_schedulers(harness: SchedulerHarness) -> None:
    """Through preemptions, and with prefixes that are found."""
    read, manager = vllm_adapter().read_growth, harness.scheduler.kv_cache_manager
    prompt = [1, 2, 3] * 20
    for name in ("a", "b"):
        harness.add(name, prompt, 40)
    tables: dict[str, list[int]] = {}
    found: list[int] = []
    for _ in range(200):
        output = harness.scheduler.schedule()
        growth = read(output)
        for admitted in growth.admitted:
            tables[admitted.request_id] = list(admitted.block_ids)
            found.append(admitted.found)
        for request_id, block_ids in growth.grown:
            tables[request_id] += block_ids
        for request_id in output.num_scheduled_tokens:
            assert tables[request_id] == manager.get_block_ids(request_id)[0]
        harness.finish_step(output)
    assert len(found) > 2, "one was preempted, and came back"
    assert any(found)
    assert all(tokens % BLOCK == 0 for tokens in found)


def test_what_a_family_finds(harness: SchedulerHarness) -> None:
    """Two adapters whose blocks have the same hashes, as a family's have."""
    from vllm.lora.request import LoRARequest

    writers = BlockWriters(8, TokenMap(BLOCK))
    read, prompt = vllm_adapter().read_growth, [1, 2, 3] * 12
    plan, act = (LoRARequest(name, number, name) for number, name in enumerate(("plan", "act"), 1))
    found = []
    for number, lora in enumerate((plan, act, plan, None)):
        request = harness.add(f"r{number}", prompt, 4)
        request.lora_request = lora  # behind hashing, which would part them
        for _ in range(8):
            output = harness.scheduler.schedule()
            found += writers.take(read(output))
            harness.finish_step(output)
    assert found == [Found("plan", 0, 0), Found("act", 32, 32), Found("plan", 32, 0)]
