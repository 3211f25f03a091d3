"""Attention that reads chosen pages, on vLLM's own kernel; and set-ups that are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform

from memshare.config import SelectionConfig
from memshare.engine.adapter import vllm_adapter
from memshare.engine.compatibility import UnsupportedSetup, check_before_load
from memshare.plug_in import plug_in

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not current_platform.is_cpu(), reason="attention of CPUs"),
]

PAGE, HEADS, GROUP, CHANNELS = 32, 2, 3, 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_head_reads_its_own_pages(dtype: torch.dtype) -> None:
    """Requests of several lengths, whose heads choose apart, against softmax in float64."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, _get_attn_isa

    from memshare.engine.vllm_0_32.view.selecting import SelectedStep, SelectingImpl
    from memshare.mechanisms.selection.bounds import PageBounds, PageWrites
    from memshare.mechanisms.selection.choice import PageChooser

    generator = torch.Generator().manual_seed(0)
    lens = np.array([600, 75, 410], np.int32)
    width, pages = 19, 60
    isa = _get_attn_isa(dtype, PAGE, CHANNELS, "auto")
    cache = torch.zeros(pages, HEADS, PAGE, 2 * CHANNELS, dtype=dtype)
    table = torch.randperm(pages, generator=generator)[: 3 * width].view(3, width).int()
    bounds = PageBounds(pages, HEADS, CHANNELS, dtype, torch.device("cpu"))
    layer = SimpleNamespace(isa=isa, kv_cache=cache, _k_scale_float=1.0, _v_scale_float=1.0)
    impl = SelectingImpl.__new__(SelectingImpl)
    impl.__dict__.update(
        num_heads=HEADS * GROUP, num_kv_heads=HEADS, num_queries_per_kv=GROUP, attn_type="decoder",
        scale=CHANNELS**-0.5, alibi_slopes=None, sliding_window=-1, logits_soft_cap=0, sinks=None,
        kv_cache_dtype="auto", bounds=bounds,
    )  # fmt: skip
    keys, values = {}, {}
    for row, length in enumerate(lens.tolist()):
        at = torch.arange(length)
        slots = table[row].long()[at // PAGE] * PAGE + at % PAGE
        shape = (length, HEADS, CHANNELS)
        keys[row], values[row] = (
            torch.randn(shape, generator=generator).to(dtype) for _ in range(2)
        )
        impl.selector = SimpleNamespace(writes=lambda s: PageWrites.of(s.numpy(), PAGE))
        impl.do_kv_cache_update(layer, keys[row], values[row], cache, slots)
    queries = (2 * torch.randn(3, HEADS * GROUP, CHANNELS, generator=generator)).to(dtype)
    chooser = PageChooser(SelectionConfig(budget=0.4), HEADS, PAGE, pages)
    impl.selector = SimpleNamespace(chooser=chooser, count=lambda step, chooses: None)
    plan = chooser.begin(table, lens)
    starts = torch.arange(3 * HEADS + 1, dtype=torch.int32)
    work = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=3 * HEADS, num_heads=GROUP, num_kv_heads=1, head_dim=CHANNELS, seq_lens=plan.lens,
        dtype=dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=True,
    )  # fmt: skip
    metadata = CPUAttentionMetadata(
        3 * HEADS, 1, starts, int(plan.lens.max()), plan.lens, table, torch.zeros(3), work
    )
    output = torch.empty_like(queries)
    impl._read_chosen(layer, queries, cache, SelectedStep(0, 0, plan, metadata), output)
    chosen = metadata.block_table.clone()
    assert not torch.equal(chosen[0] // HEADS, chosen[1] // HEADS), "the heads choose apart"
    for row, length in enumerate(lens.tolist()):
        for head in range(HEADS):
            read = int(plan.read[row])
            entries = [
                table[row].tolist().index(int(p) // HEADS)
                for p in chosen[row * HEADS + head][:read]
            ]
            held = [at for e in entries for at in range(e * PAGE, min(length, (e + 1) * PAGE))]
            own = slice(head * GROUP, (head + 1) * GROUP)
            key, value = keys[row][held, head].double(), values[row][held, head].double()
            weight = (queries[row, own].double() @ key.T * CHANNELS**-0.5).softmax(-1)
            gap = (output[row, own].double() - weight @ value).abs().max()
            assert gap < (1e-5 if dtype == torch.float32 else 2e-2)
            whole = keys[row][:, head].double(), values[row][:, head].double()
            full = (queries[row, own].double() @ whole[0].T * CHANNELS**-0.5).softmax(-1) @ whole[1]
            if read < -(-length // PAGE):
                assert (output[row, own].double() - full).abs().max() > 5e-2, "control"


# ---- what is refused before anything loads ----


@pytest.fixture(scope="module")
def vllm_config(folder: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    memshare = {
        "mode": "observe",
        "policy": {"name": "oldest"},
        "selection": {"budget": 0.5, "exempt_layers": 1},
    }
    options = {"max_model_len": 512, "block_size": 32, "load_format": "dummy"}
    return EngineArgs(str(folder), **options, **plug_in(memshare)).create_engine_config()


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        ("cache_config", "cache_dtype", "fp8", "selection: kv_cache_dtype is 'fp8'"),
        ("", "speculative_config", SimpleNamespace(method="ngram"), "selection: speculative"),
        ("parallel_config", "enable_dbo", True, "selection: micro-batches"),
    ],
)
def test_set_ups_that_cannot_select(
    vllm_config: Any, owner: str, name: str, value: object, said: str
) -> None:
    check_before_load(vllm_config)  # the set-up itself is fine
    broken = copy.deepcopy(vllm_config)
    setattr(getattr(broken, owner) if owner else broken, name, value)
    with pytest.raises(UnsupportedSetup, match=said):
        check_before_load(broken)
    extra = broken.kv_transfer_config.kv_connector_extra_config
    broken.kv_transfer_config.kv_connector_extra_config = {**extra, "selection": {}}
    check_before_load(broken)  # without selection it is in nobody's way


def test_models_and_machines_that_cannot_select(
    vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusals(**config: Any) -> list[str]:
        found = SelectionConfig(budget=0.5, **config)
        return list(vllm_adapter().selection_refusals(vllm_config, found))

    assert refusals(exempt_layers=1) == []
    (said,) = refusals(exempt_layers=2)
    assert "selection.exempt_layers is 2" in said
    assert "has 2 layers" in said
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    (said,) = refusals(exempt_layers=1)
    assert "selection works on CPUs only" in said


def test_attention_with_biases_or_sinks_is_refused_once_the_layers_are_there(
    vllm_config: Any,
) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    impl.alibi_slopes, impl.sinks = None, torch.zeros(2)
    loaded = copy.copy(vllm_config)
    loaded.compilation_config = SimpleNamespace(
        static_forward_context={"model.layers.0.attn": SimpleNamespace(impl=impl)}
    )
    config = SelectionConfig(budget=0.5, exempt_layers=1)
    (said,) = vllm_adapter().selection_refusals(loaded, config)
    assert "model.layers.0.attn has ALiBi biases or sinks" in said
