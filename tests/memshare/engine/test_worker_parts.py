"""What the workers do, on real vLLM parts: cache layouts, stage two, both runners' tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.memshare.engine.harness import BLOCK, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPT = "Twelve plus thirty is forty-two, and forty-two minus twelve is thirty. " * 3


def test_stage_two_reads_what_the_model_wrote(start_engine: StartEngine, tiny: str) -> None:
    """K and V that attention was given are what the learned layout finds in the cache."""
    memshare = {"mode": "observe", "policy": {"name": "paper"}}
    options = {"load_format": "dummy", "num_gpu_blocks_override": 80}
    with start_engine(tiny, memshare, **options) as engine:
        worker = engine.core.model_executor.driver_worker.worker
        stage_two = worker._memshare._stage_two
        assert all(layer.rotation is not None for layer in stage_two._layers)
        layer = worker.vllm_config.compilation_config.static_forward_context[
            stage_two.layer_names[0]
        ]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        update = layer.impl.do_kv_cache_update

        def watch(a: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
            seen.append((key.clone(), value.clone()))
            update(a, key, value, *rest)

        layer.impl.do_kv_cache_update = watch
        table: list[int] = []
        before_step = worker._memshare.before_step

        def note(message: Any) -> None:
            before_step(message)
            table[:] = [
                b.block_id for b in next(iter(engine.side.tables._manager.req_to_blocks.values()))
            ]

        worker._memshare.before_step = note
        engine.generate([PROMPT], max_tokens=2)
        keys, values = seen[0]  # the prefill: [tokens, heads, channels]
        compared = stage_two._layers[0]
        blocks = torch.tensor(table[: len(keys) // BLOCK])
        k, v = compared.layout.gather(compared.cache, blocks)
        full = len(blocks) * BLOCK
        for found, given in ((k, keys), (v, values)):
            by_block = given[:full].view(len(blocks), BLOCK, *given.shape[1:]).transpose(1, 2)
            torch.testing.assert_close(found, by_block.float(), rtol=0, atol=0)
        assert not torch.equal(k, v)
        at = torch.tensor([0, BLOCK + 3, full - 1, 5])
        k, v = compared.layout.gather_tokens(compared.cache, blocks[at // BLOCK], at % BLOCK)
        for tokens, given in ((k, keys), (v, values)):
            torch.testing.assert_close(tokens, given[at].float(), rtol=0, atol=0)


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


@pytest.mark.usefixtures("kernels_on_a_cpu")
def test_v2_table_stages_one_entry() -> None:
    """On vLLM's own tables and kernels; the runner that holds them is a stand-in."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    from memshare.engine.vllm_0_32.worker_tables import V2Table, table_of

    tables = BlockTables([BLOCK], 3, 64, [6], torch.device("cpu"))
    states = SimpleNamespace(req_id_to_index={"a": 0, "b": 2})
    tables.append_block_ids(2, ([10, 11, 12, 13],), overwrite=True)
    tables.append_block_ids(0, ([20, 21],), overwrite=True)
    tables.apply_staged_writes()
    table = table_of(SimpleNamespace(req_states=states, block_tables=tables))  # type: ignore[arg-type]
    assert isinstance(table, V2Table)
    assert table.repoint("b", 1, 13)
    assert table.block_ids("b", 4) == [10, 11, 12, 13], "nothing changes before the runner applies"
    tables.append_block_ids(2, ([14],), overwrite=False)  # a step that remaps and grows
    tables.apply_staged_writes()
    assert table.block_ids("b", 5) == [10, 13, 12, 13, 14]
    assert table.block_ids("b", 2) == [10, 13]
    assert table.block_ids("a", 4) == [20, 21], "its neighbours stay as they were"
    # This is what the forward pass reads: of the running requests, in the batch's order.
    (read,) = tables.gather_block_tables(torch.tensor([2, 0], dtype=torch.int32), 2)
    assert read.tolist() == [[10, 13, 12, 13, 14, 0], [20, 21, 0, 0, 0, 0]]
    assert not table.repoint("unknown", 0, 1)
    assert table.block_ids("unknown", 1) is None


def test_v2_attributes_exist_in_this_vllm() -> None:
    """The stand-in for the runner is only worth something if vLLM's has what it pretends."""
    import inspect

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


def test_v1_table_edits_row_and_request() -> None:
    from memshare.engine.vllm_0_32.worker_tables import V1Table, table_of

    rows = np.zeros((2, 8), dtype=np.int32)
    rows[1, :3] = [5, 6, 7]
    row_table = SimpleNamespace(
        block_table=SimpleNamespace(np=rows), num_blocks_per_row=np.array([0, 3])
    )
    waited: list[bool] = []
    runner = SimpleNamespace(
        requests={
            "a": SimpleNamespace(block_ids=([5, 6, 7],)),
            "paused": SimpleNamespace(block_ids=([8, 9],)),
        },
        input_batch=SimpleNamespace(req_id_to_index={"a": 1}, block_table=[row_table]),
        prepare_inputs_event=SimpleNamespace(synchronize=lambda: waited.append(True)),
    )
    table = table_of(runner)
    assert isinstance(table, V1Table)
    assert table.repoint("a", 2, 5)
    assert table.repoint("paused", 0, 9)
    assert waited, "async scheduling: the previous step's copy must be over"
    assert table.block_ids("a", 3) == [5, 6, 5]
    assert runner.requests["a"].block_ids[0] == [5, 6, 5], "the row is rebuilt from here"
    assert table.block_ids("paused", 2) == [9, 9]
    assert not table.repoint("gone", 0, 1)
