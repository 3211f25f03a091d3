"""The adapter alone, on vLLM's own classes: what each interface promises, without an engine.

A new version of vLLM is supported once its adapter passes these (docs/porting.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memshare.core.interfaces import Block, CacheGroup, EngineRequest
from memshare.engine.adapter import Adapter, vllm_adapter
from memshare.lab.simulate.harness import SchedulerHarness
from tests.memshare.engine.adapter.caches import BLOCK, BLOCKS, Scheduled, specs

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(params=[("full",), ("sliding", "full")], ids="-".join)
def engine(request: pytest.FixtureRequest) -> Scheduled:
    return Scheduled(specs(*request.param))


def test_the_adapter_has_every_function_with_its_arguments() -> None:
    adapter = vllm_adapter()
    for name, wanted in inspect.getmembers(Adapter, inspect.isfunction):
        if not name.startswith("_"):
            given = inspect.signature(getattr(adapter, name))
            expected = list(inspect.signature(wanted).parameters)[1:]
            assert list(given.parameters) == expected, name


# ---- requests and blocks ----


def test_requests_and_blocks_have_what_the_interfaces_name(engine: Scheduled) -> None:
    request = engine.start("a", 40)
    for protocol, thing in (
        (EngineRequest, request),
        (Block, engine.manager.block_pool.blocks[1]),
    ):
        names = [name for name in vars(protocol) if not name.startswith("_")]
        assert len(names) >= 3
        assert [name for name in names if not hasattr(thing, name)] == []
    assert (request.num_prompt_tokens, request.num_tokens) == (40, 40)
    engine.compute(request, 3)
    assert (request.num_tokens, request.num_computed_tokens) == (43, 43)
    assert len(request.all_token_ids) == 43
    assert list(request.output_token_ids) == [7, 7, 7]
    assert request.num_in_flight_tokens == 0
    assert request.max_tokens == 500
    assert engine.manager.block_pool.null_block.is_null


# ---- the scheduler's tables ----


def test_tables_show_what_vllm_has_allocated(engine: Scheduled) -> None:
    tables, pool = engine.tables, engine.manager.block_pool
    assert tables.total == tables.free == BLOCKS - 1
    assert tables.table("a") is None
    assert tables.entries("a") == 0
    request = engine.start("a", 3 * BLOCK + 1)
    assert tables.entries("a") == 4
    table = tables.table("a")
    assert table is not None
    manager = engine.manager.coordinator.single_type_managers[engine.group.index]
    assert [block is held for block, held in zip(table, manager.req_to_blocks["a"], strict=True)]
    assert tables.block_ids() == {"a": [block.block_id for block in table]}
    assert tables.free == pool.get_num_free_blocks() < tables.total
    engine.manager.free(request)
    assert tables.free == tables.total
    assert tables.block_ids().get("a", []) == []


def test_a_remap_frees_the_target_and_counts_the_donor_twice(engine: Scheduled) -> None:
    tables = engine.tables
    request = engine.start("a", 5 * BLOCK)
    table = tables.table("a")
    assert table is not None
    target, donor, free = table[1], table[3], tables.free
    assert tables.repoint("a", 1, donor) == 1
    assert table[1] is donor, "what was returned is live"
    assert (target.ref_cnt, donor.ref_cnt) == (0, 2)
    assert tables.free == free + 1
    assert tables.reference_faults() == []
    assert tables.repoint("a", 1, table[2]) == 0, "the donor is still held by its own entry"
    engine.manager.free(request)
    assert tables.free == tables.total
    assert engine.manager.reset_prefix_cache()


def test_a_wrong_count_is_seen_in_whichever_group(engine: Scheduled) -> None:
    """Negative control of the check."""
    engine.start("a", 5 * BLOCK)
    assert engine.tables.reference_faults() == []
    for manager in engine.manager.coordinator.single_type_managers:
        block = manager.req_to_blocks["a"][-1]
        block.ref_cnt += 1
        (fault,) = engine.tables.reference_faults()
        assert f"block {block.block_id}: ref_cnt is 2, but 1" in fault
        block.ref_cnt -= 1


def test_a_block_is_published_exactly_in_the_steps_that_are_foretold(engine: Scheduled) -> None:
    request = engine.start("a", 2 * BLOCK)
    said = 0
    for _ in range(3 * BLOCK):
        before = engine.published(request)
        request.append_output_token_ids([7])
        foretold = engine.tables.publishes_soon(request)
        engine.compute(request, 1)
        assert foretold == (engine.published(request) > before)
        said += foretold
    assert said == 3


def test_after_the_taint_nothing_is_published_until_the_blocks_are_gone(engine: Scheduled) -> None:
    tables = engine.tables
    request = engine.start("a", 2 * BLOCK)
    assert tables.is_publishing("a")
    assert engine.published(request) == 2 * BLOCK
    tables.stop_publishing("a")
    assert not tables.is_publishing("a")
    engine.compute(request, 3 * BLOCK)
    assert engine.published(request) == 2 * BLOCK, "what was published before stays"
    for manager in engine.manager.coordinator.single_type_managers:
        assert all(block.block_hash is None for block in manager.req_to_blocks["a"][2:])
    engine.manager.free(request)
    assert tables.is_publishing("a"), "what is recomputed is exact"


def test_admission_leaves_free_what_it_is_told_to(engine: Scheduled) -> None:
    engine.start("running", BLOCK)
    waiting = engine.request("waiting", list(range(2 * BLOCK)))

    def admitted() -> bool:
        admits = engine.manager.allocate_slots(waiting, 2 * BLOCK, has_scheduled_reqs=True)
        if admits is not None:
            engine.manager.free(waiting)
        return admits is not None

    assert admitted()
    engine.tables.keep_free(engine.tables.free)
    assert not admitted()
    engine.tables.keep_free(0)
    assert admitted()


# ---- the workers' tables ----


GROUP = CacheGroup(1, BLOCK, ("full.1",))


def v1_runner() -> Any:
    """Model runner V1's state, around vLLM's own block table; two groups."""
    from vllm.v1.worker.block_table import MultiGroupBlockTable

    table = MultiGroupBlockTable(
        max_num_reqs=4,
        max_num_batched_tokens=64,
        pin_memory=False,
        device=torch.device("cpu"),
        block_sizes=[BLOCK, BLOCK],
        max_num_blocks=[16, 16],
    )
    table.add_row(([1, 2, 3], [5, 6, 7]), 1)
    waited: list[bool] = []
    return SimpleNamespace(
        requests={
            "a": SimpleNamespace(block_ids=([1, 2, 3], [5, 6, 7])),
            "paused": SimpleNamespace(block_ids=([4], [8, 9])),
        },
        input_batch=SimpleNamespace(req_id_to_index={"a": 1}, block_table=table),
        prepare_inputs_event=SimpleNamespace(synchronize=lambda: waited.append(True)),
        waited=waited,
    )


@pytest.mark.proves("runner v1")
@pytest.mark.proves("async scheduling", how="parts")
def test_v1_edits_the_row_that_attention_reads_and_the_request_it_is_rebuilt_from() -> None:
    runner = v1_runner()
    tables = vllm_adapter().worker_tables(runner, GROUP)
    assert tables.block_ids("a", 3) == [5, 6, 7]
    assert tables.repoint("a", 2, 5)
    assert runner.waited, "async scheduling: the previous step's copy must be over"
    assert tables.block_ids("a", 3) == [5, 6, 5]
    assert tables.block_ids("a", 2) == [5, 6]
    assert runner.requests["a"].block_ids == ([1, 2, 3], [5, 6, 5]), "the other group is as it was"
    other, own = (runner.input_batch.block_table[group] for group in (0, 1))
    assert other.get_numpy_array()[1, :3].tolist() == [1, 2, 3]
    own.commit_block_table(2)
    assert own.get_device_tensor(2)[1, :3].tolist() == [5, 6, 5], "what the device is given"
    assert tables.repoint("paused", 0, 9), "not in the batch now"
    assert tables.block_ids("paused", 2) == [9, 9]
    assert not tables.repoint("gone", 0, 1)
    assert tables.block_ids("gone", 1) is None


@pytest.fixture
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own kernels for V2's tables, run by Triton's interpreter instead of on a GPU."""
    pytest.importorskip("triton", reason="there is none for this machine")
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction
    from vllm.v1.worker.gpu import block_table, buffer_utils

    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # memory of a device
    for module, kernels in (
        (buffer_utils, ["_apply_write_kernel", "_load_ptr"]),
        (block_table, ["_gather_block_tables_kernel", "_load_ptr"]),
    ):
        monkeypatch.setattr(module, "tl", triton.language)  # vLLM has a placeholder on a CPU
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, InterpretedFunction(getattr(module, kernel)))


@pytest.mark.proves("runner v2", "nvidia", how="parts")
@pytest.mark.usefixtures("kernels_on_a_cpu")
def test_v2_stages_one_entry_for_the_runner_to_apply() -> None:
    """On vLLM's own tables and kernels, of two groups; the runner that holds them is a stand-in."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    vllms = BlockTables([BLOCK, BLOCK], 3, 64, [6, 6], torch.device("cpu"))
    states = SimpleNamespace(req_id_to_index={"a": 0, "b": 2})
    vllms.append_block_ids(2, ([1, 2, 3, 4], [10, 11, 12, 13]), overwrite=True)
    vllms.append_block_ids(0, ([5, 6], [20, 21]), overwrite=True)
    vllms.apply_staged_writes()
    runner: Any = SimpleNamespace(req_states=states, block_tables=vllms)
    tables = vllm_adapter().worker_tables(runner, GROUP)
    assert tables.repoint("b", 1, 13)
    assert tables.block_ids("b", 4) == [10, 11, 12, 13], "nothing changes before the runner applies"
    vllms.append_block_ids(2, ([7], [14]), overwrite=False)  # a step that remaps and grows
    vllms.apply_staged_writes()
    assert tables.block_ids("b", 5) == [10, 13, 12, 13, 14]
    assert tables.block_ids("b", 2) == [10, 13]
    assert tables.block_ids("a", 4) == [20, 21], "its neighbours stay as they were"
    # This is what the forward pass reads: of the running requests, in the batch's order.
    other, own = vllms.gather_block_tables(torch.tensor([2, 0], dtype=torch.int32), 2)
    assert own.tolist() == [[10, 13, 12, 13, 14, 0], [20, 21, 0, 0, 0, 0]]
    assert other.tolist() == [[1, 2, 3, 4, 7, 0], [5, 6, 0, 0, 0, 0]], "the other group as it was"
    assert not tables.repoint("unknown", 0, 1)
    assert tables.block_ids("unknown", 1) is None


def test_v2_attributes_exist_in_this_vllm() -> None:
    """The stand-in for the runner is only worth something if vLLM's has what it pretends."""
    from vllm.v1.worker.gpu import block_table, buffer_utils, model_runner

    staged = inspect.signature(buffer_utils.StagedWriteTensor.stage_write)
    assert list(staged.parameters) == ["self", "index", "start", "x"]
    tables = inspect.getsource(block_table.BlockTables.__init__)
    assert "self.block_tables: list[StagedWriteTensor]" in tables
    assert "self.num_blocks = UvaBackedTensor" in tables
    runner = inspect.getsource(model_runner.GPUModelRunner)
    assert "self.block_tables = BlockTables(" in runner
    assert "self.req_states.req_id_to_index" in runner
    # Remaps are staged before the runner applies what is staged, in the same step.
    execute = inspect.getsource(model_runner.GPUModelRunner.execute_model)
    assert "self.block_tables.apply_staged_writes()" in execute


# ---- steps and workers ----


@pytest.fixture
def harness(folder: Path) -> Iterator[SchedulerHarness]:
    """vLLM's own scheduler, without MemShare."""
    harness = SchedulerHarness(folder, {"mode": "off"}, 8, max_num_seqs=4)
    yield harness
    harness.close()


def test_a_step_says_who_lost_their_blocks_and_who_is_sent_whole(harness: SchedulerHarness) -> None:
    read = vllm_adapter().read_schedule
    for name in ("a", "b"):
        harness.add(name, [1, 2, 3] * 20, 120)
    first = read(harness.step())
    assert sorted(first.sent_whole) == ["a", "b"]
    assert (list(first.preempted), first.resumed) == ([], False)
    second = read(harness.step())
    assert (list(second.preempted), list(second.sent_whole), second.resumed) == ([], [], False)
    steps = [read(harness.step()) for _ in range(300)]
    lost = [name for step in steps for name in step.preempted]
    assert lost, "seven blocks do not hold two requests of six"
    back = [name for step in steps for name in step.sent_whole]
    assert back == lost
    assert sum(step.resumed for step in steps) == len(back)


def test_our_worker_extends_the_platforms_own() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    base = vllm_adapter().base_worker()
    assert issubclass(base, Worker)
    for name, argument in (
        ("initialize_from_config", "kv_cache_config"),
        ("execute_model", "scheduler_output"),
    ):
        assert argument in inspect.signature(getattr(base, name)).parameters
