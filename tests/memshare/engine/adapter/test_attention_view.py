"""The attention view, on vLLM's own builders, block tables and metadata; no engine."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memshare.config import load_config
from memshare.core.interfaces import CacheGroup
from memshare.engine.adapter import vllm_adapter
from memshare.engine.compatibility import edits_view
from memshare.engine.vllm_0_32.view import attention_view
from tests.memshare.engine.adapter.tables import assert_squeezed, squeezed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

# ---- builders: vLLM's own, of every backend that can be imported here ----

SIZE, WIDTH = 32, 32
BACKENDS = {
    "cpu": "cpu_attn.CPUAttentionBackend",
    "flash": "flash_attn.FlashAttentionBackend",
    "triton": "triton_attn.TritonAttentionBackend",
    "flex": "flex_attention.FlexAttentionBackend",
    "flashinfer": "flashinfer.FlashInferBackend",
    "rocm": "rocm_attn.RocmAttentionBackend",
}


def backend_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    module, _, cls = BACKENDS[name].partition(".")
    if name == "flashinfer":
        pytest.importorskip("flashinfer", reason="a package for NVIDIA GPUs")
    found = importlib.import_module(f"vllm.v1.attention.backends.{module}")
    if name == "flash":  # it asks the GPU which version it has
        monkeypatch.setattr(found, "get_flash_attn_version", lambda *args, **more: 2)
    return getattr(found, cls)


@pytest.fixture(scope="module")
def config(folder: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(str(folder), max_model_len=1024, block_size=SIZE, max_num_seqs=8)
    config = made.create_engine_config()
    config.cache_config.num_gpu_blocks = 500
    return config


class Group:
    """vLLM's attention group with a backend of ours, attached to a stand-in for a runner."""

    def __init__(self, backend: Any, config: Any, kernel_block: int = SIZE) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.worker.utils import AttentionGroup

        spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
        self.vllms = AttentionGroup(attention_view.with_view(backend), ["layer"], spec, 0)
        with set_current_vllm_config(config):
            self.vllms.create_metadata_builders(config, torch.device("cpu"), kernel_block)
        (self.builder,) = self.vllms.metadata_builders
        self.cache = KVCacheConfig(
            num_blocks=500, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        states = {f"r{row}": 10 + row for row in range(8)}
        self.runner = SimpleNamespace(
            attn_groups=[[self.vllms]], req_states=SimpleNamespace(req_id_to_index=states)
        )
        self.group = CacheGroup(0, SIZE, ("layer",))
        assert list(vllm_adapter().builder_refusals(self.runner, self.group)) == []
        self.view = vllm_adapter().attention_view(self.runner, self.group)
        self.passed_on: list[bool] = []  # whether the builder was given vLLM's own batch
        made = self.builder._squeezed.view

        def note(batch: Any, *args: Any) -> Any:
            seen = made(batch, *args)
            self.passed_on.append(seen is batch)
            return seen

        self.builder._squeezed.view = note

    def build(self, table: torch.Tensor, lens: torch.Tensor, capture: bool = False) -> Any:
        """As model runner V2 does it."""
        from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

        rows = len(lens)
        starts = torch.arange(rows + 1, dtype=torch.int32)
        return build_attn_metadata(
            attn_groups=[[self.vllms]],
            num_reqs=rows,
            num_tokens=rows,
            query_start_loc_gpu=starts,
            query_start_loc_cpu=starts,
            max_query_len=1,
            seq_lens=lens,
            max_seq_len=1024 if capture else int(lens.max()),
            block_tables=[table],
            slot_mappings=torch.zeros(1, rows, dtype=torch.int64),
            kv_cache_config=self.cache,
            seq_lens_cpu_upper_bound=lens.clone(),
            for_cudagraph_capture=capture,
            req_idx=np.arange(rows)[::-1] + 10,  # rows in another order than the requests
        )["layer"]


def batch() -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """A table with holes in some rows, lengths, and the holes of each request."""
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.integers(1, 190, (5, WIDTH)).astype(np.int32))
    lens = torch.tensor([900, 300, 64, 33, 500], dtype=torch.int32)
    table[0, [2, 3, 4, 9]] = table[1, [0]] = table[4, [1, 3]] = 0
    return table, lens, {"r4": 4, "r3": 1, "r0": 2, "waiting": 7}


@pytest.mark.proves("compaction backends", "nvidia", how="parts")
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backends_builder_is_given_tables_without_holes(
    name: str, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(backend_of(name, monkeypatch), config)
    table, lens, holes = batch()
    before = table.clone(), lens.clone()
    plain = group.build(table, lens)
    assert plain.block_table.data_ptr() == table.data_ptr(), "nobody has holes: nothing is copied"
    group.view.leave_out(holes)
    seen = group.build(table, lens)
    assert_squeezed(seen.block_table, seen.seq_lens, squeezed(table, lens, SIZE, 1))
    assert seen.max_seq_len == 900 - 4 * SIZE, "the host knows the bound exactly"
    assert torch.equal(table, before[0])
    assert torch.equal(lens, before[1])
    group.view.clear()
    group.build(table, lens)
    assert group.passed_on == [True, False, True]


@pytest.mark.proves("compaction graphs", how="parts")
@pytest.mark.parametrize("name", ["triton", "rocm", "flash"])
def test_full_cuda_graphs_find_each_step_at_the_addresses_that_they_captured(
    name: str, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import CUDAGraphMode

    compilation = config.compilation_config
    monkeypatch.setattr(compilation, "cudagraph_mode", CUDAGraphMode.FULL)
    monkeypatch.setattr(compilation, "cudagraph_capture_sizes", [1, 2, 4, 8])
    group = Group(backend_of(name, monkeypatch), config)
    table, lens, holes = batch()
    captured = group.build(table.clone(), lens.clone(), capture=True)
    tensors = captured.block_table, captured.seq_lens
    assert tensors[0].data_ptr() != table.data_ptr()
    for step_holes in ({}, holes, {}):
        group.view.leave_out(step_holes)
        seen = group.build(table, lens)
        for ours, theirs in zip((seen.block_table, seen.seq_lens), tensors, strict=True):
            assert ours.data_ptr() == theirs.data_ptr()
            assert ours.stride() == theirs.stride()
        wanted = squeezed(table, lens, SIZE, 1)
        if not step_holes:
            wanted = squeezed(table, lens, SIZE, 0)
        assert_squeezed(*tensors, wanted)


def test_a_backend_may_split_blocks(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel blocks of 16 tokens under the engine's of 32: the null block is two of them."""
    group = Group(backend_of("triton", monkeypatch), config, kernel_block=16)
    assert group.builder.kv_cache_spec.block_size == 16
    table, lens, holes = batch()
    group.view.leave_out(holes)
    seen = group.build(table, lens)
    split = (table[:, :, None] * 2 + torch.arange(2, dtype=torch.int32)).flatten(1)
    assert_squeezed(seen.block_table, seen.seq_lens, squeezed(split, lens, 16, 2))
    assert seen.seq_lens.tolist() == [
        int(length) - SIZE * holes.get(f"r{4 - row}", 0) for row, length in enumerate(lens)
    ]
    assert seen.max_seq_len == 900 - 4 * SIZE


@pytest.mark.parametrize("name", BACKENDS)
def test_the_backend_stays_what_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(name, monkeypatch)
    ours = attention_view.with_view(backend)
    assert attention_view.with_view(backend) is ours, "vLLM groups layers by class"
    assert issubclass(ours, backend)
    assert ours.get_name() == backend.get_name()
    assert ours.get_impl_cls() is backend.get_impl_cls()
    builder, base = ours.get_builder_cls(), backend.get_builder_cls()
    assert issubclass(builder, base)
    assert not builder.supports_update_block_table, "it would bring a plain table back"
    assert builder._cudagraph_support == base._cudagraph_support


def test_holes_are_found_by_row_in_model_runner_v1() -> None:
    rows = {"a": 2, "b": 0, "c": 3}
    runner: Any = SimpleNamespace(input_batch=SimpleNamespace(req_id_to_index=rows))
    view = attention_view.HolesOfRequests(runner)
    seen: Any = SimpleNamespace(num_reqs=4, req_idx=None)
    assert view.null_entries(seen) is None
    view.leave_out({"a": 5, "c": 1, "gone": 9})
    counts = view.null_entries(seen)
    assert counts is not None
    assert counts.tolist() == [0, 0, 5, 1]
    view.leave_out({"gone": 9})
    assert view.null_entries(seen) is None, "none of them runs in this step"
    view.leave_out({"a": 5})
    view.clear()
    assert view.null_entries(seen) is None


# ---- what is refused, and what is left alone ----


def attention_layer(name: str, spec: Any, shares: str | None = None, **impl: Any) -> Any:
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    layer: Any = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.layer_name, layer.kv_sharing_target_layer_name = name, shares
    layer.attn_backend, layer.impl = TritonAttentionBackend, SimpleNamespace(**impl)
    layer.get_kv_cache_spec = lambda config: None if shares else spec
    return layer


def test_only_layers_that_attend_to_everything_read_through_the_view() -> None:
    from vllm.v1 import kv_cache_interface as kv

    heads = {"block_size": SIZE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full = kv.FullAttentionSpec(**heads)
    windowed = kv.SlidingWindowSpec(**heads, sliding_window=64)
    made = [
        attention_layer("full", full),
        attention_layer("shares", full, shares="full"),
        attention_layer("window", windowed),
        attention_layer("shares its window", windowed, shares="window"),
    ]
    layers: dict[str, Any] = {layer.layer_name: layer for layer in made}
    layers["mamba"] = mamba = SimpleNamespace(attn_backend="its own")
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    vllm_adapter().install_view(config)
    has_view = {
        layer.layer_name: hasattr(layer.attn_backend.get_builder_cls(), "rows") for layer in made
    }
    assert has_view == {"full": True, "shares": True, "window": False, "shares its window": False}
    assert mamba.attn_backend == "its own"


def test_attention_that_is_not_ours_is_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_of("triton", monkeypatch)
    group = Group(backend, config)
    (builder,) = group.vllms.metadata_builders
    plain = backend.get_builder_cls()(builder.kv_cache_spec, ["other"], config, torch.device("cpu"))
    group.vllms.metadata_builders.append(plain)
    (said,) = vllm_adapter().builder_refusals(group.runner, group.group)
    assert "other builds its metadata with TritonAttentionMetadataBuilder" in said
    assert "another policy" in said


def setup(**changes: Any) -> Any:
    made = {
        "parallel_config": SimpleNamespace(use_ubatching=False),
        "model_config": SimpleNamespace(model="m", is_mm_prefix_lm=False, rswa_window=None),
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "compilation_config": SimpleNamespace(static_forward_context={}),
    }
    return SimpleNamespace(
        **made | {name: SimpleNamespace(**vars(made[name]) | new) for name, new in changes.items()}
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"parallel_config": {"use_ubatching": True}}, "micro-batches"),
        ({"cache_config": {"kv_sharing_fast_prefill": True}}, "kv_sharing_fast_prefill"),
        ({"model_config": {"is_mm_prefix_lm": True}}, "attends by position"),
        ({"model_config": {"rswa_window": 64}}, "attends by position"),
    ],
)
def test_set_ups_in_which_tokens_cannot_be_left_out_are_refused(
    changes: dict[str, Any], said: str | None
) -> None:
    refusals = list(vllm_adapter().view_refusals(setup(**changes)))
    assert len(refusals) == (said is not None)
    assert said is None or said in refusals[0]


def test_alibi_is_refused_once_the_layers_are_there() -> None:
    layers = {
        name: attention_layer(name, None, alibi_slopes=slopes)
        for name, slopes in (("plain", None), ("biased", [0.5]), ("biased too", [0.5]))
    }
    changes = {"compilation_config": {"static_forward_context": layers}}
    (said,) = vllm_adapter().view_refusals(setup(**changes))
    assert "biased has ALiBi" in said


@pytest.mark.parametrize(
    ("policy", "mode", "wanted"),
    [
        ("compaction", "share", True),
        ("compaction", "observe", False),
        ("compaction", "off", False),
        ("twins", "share", False),
        ("paper", "share", False),
    ],
)
def test_only_a_mechanism_that_leaves_holes_gets_a_view(
    policy: str, mode: str, wanted: bool
) -> None:
    config = load_config({"mode": mode, "policy": {"name": policy}}, {})
    assert edits_view(config) == wanted


def test_what_the_refusals_look_at_exists_in_this_vllm(config: Any) -> None:
    assert list(vllm_adapter().view_refusals(config)) == []
    assert not config.parallel_config.use_ubatching


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
def test_a_captured_graph_reads_what_each_step_leaves() -> None:
    """A stand-in for attention is captured once, and replayed for tables with and without holes."""
    device = torch.device("cuda")
    tables = attention_view.SqueezedTables(8, WIDTH, SIZE, device, captured=True)
    table, lens, holes = batch()

    def seen(counts: Any, longest: int) -> Any:
        given: Any = common_metadata(table.to(device), lens.to(device), longest)
        return tables.view(given, counts, 1)

    def attention(view: Any) -> torch.Tensor:
        used = (view.seq_lens[:, None] + SIZE - 1) // SIZE
        columns = torch.arange(WIDTH, device=device)
        return torch.where(columns < used, view.block_table_tensor, 0).sum(1) + view.seq_lens

    captured = seen(None, 1024)
    attention(captured)  # warm up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(captured)
    counts = np.array([holes.get(f"r{4 - row}", 0) for row in range(5)], np.int32)
    for step in (None, counts, None):
        seen(step, int(lens.max()))
        graph.replay()
        torch.cuda.synchronize()
        nulls = 0 if step is None else 1
        wanted = [sum(kept) + length for kept, length in squeezed(table, lens, SIZE, nulls)]
        assert out.tolist() == wanted


def common_metadata(table: torch.Tensor, lens: torch.Tensor, longest: int) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.arange(len(lens) + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(table.device),
        query_start_loc_cpu=starts,
        seq_lens=lens,
        num_reqs=len(lens),
        num_actual_tokens=len(lens),
        max_query_len=1,
        max_seq_len=longest,
        block_table_tensor=table,
        slot_mapping=torch.zeros(len(lens), dtype=torch.int64, device=table.device),
        seq_lens_cpu_upper_bound=lens.cpu(),
    )
