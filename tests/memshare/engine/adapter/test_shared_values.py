"""Attention with low-rank columns, on vLLM's own modules and LoRA layers, without an engine.

The attention kernel alone is replaced, by plain torch that takes any widths: so the layout for GPUs
is run here, too.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memshare.agents.values import widen_values
from tests.memshare.engine.harness import write_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, SLOTS, RANK = 4, 2, 32, 64, 3, 8
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": None},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "hidden_size": HEADS * HEAD_DIM},
    "Qwen3ForCausalLM": {"model_type": "qwen3"},
}


class DenseAttention(nn.Module):
    """Causal attention over one sequence, with the widths of vLLM's attention."""

    def __init__(self, keys: int, values: int) -> None:
        super().__init__()
        self.head_size, self.head_size_v = keys, values

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = HEADS // KV_HEADS
        q = query.view(-1, HEADS, self.head_size)
        k = key.view(-1, KV_HEADS, self.head_size).repeat_interleave(group, 1)
        v = value.view(-1, KV_HEADS, self.head_size_v).repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", q, k) * HEAD_DIM**-0.5
        ahead = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, v).flatten(1)


def engine_config(folder: Path, architecture: str, **changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    write_tiny_model(folder, architectures=[architecture], **sizes | MODELS[architecture] | changes)
    return EngineArgs(
        model=str(folder), block_size=32, max_model_len=256, dtype="float32", enable_lora=True,
        max_loras=SLOTS, max_lora_rank=RANK,
    ).create_engine_config()  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A model with random weights, and adapters on ``q_proj`` and ``v_proj`` in two slots."""
    from vllm.config import set_current_vllm_config
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.model_manager import create_lora_manager
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )

    from memshare.engine.vllm_0_32.model_memory import one_rank

    config = engine_config(tmp_path_factory.mktemp("model"), request.param)
    torch.manual_seed(0)
    with set_current_vllm_config(config), one_rank():
        model: Any = initialize_model(config)
        for weight in model.parameters():
            weight.data.normal_(std=0.2)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        manager = create_lora_manager(
            model, max_num_seqs=8, max_num_batched_tokens=64, vocab_size=258,
            lora_config=config.lora_config, device=torch.device("cpu"), vllm_config=config,
        )  # fmt: skip
        attention = model.model.layers[1].self_attn
        hidden = config.model_config.get_hidden_size()
        downs = [torch.randn(rank, hidden) * 0.2 for rank in (3, 5)]
        projection = attention.qkv_proj
        for slot, down in enumerate(downs):
            up_q = torch.randn(HEADS * HEAD_DIM, len(down)) * 0.3
            up_v = torch.randn(KV_HEADS * HEAD_DIM, len(down)) * 0.3
            projection.set_lora(
                slot, [torch.randn(len(down), hidden) * 0.2, None, down], [up_q, None, up_v]
            )

        def choose(slots: list[int]) -> None:
            ids = tuple(slot + 1 for slot in slots)
            projection.punica_wrapper.update_metadata(
                LoRAMapping(ids, ids, is_prefill=True), [1, 2, None], SLOTS + 1, 258
            )

        yield SimpleNamespace(
            config=config, attention=attention, manager=manager, downs=downs, choose=choose,
            hidden=hidden,
        )  # fmt: skip


def share(loaded: SimpleNamespace, keys: int, values: int) -> Any:
    """The attention module, sharing: both adapters' columns, one behind the other."""
    from memshare.engine.vllm_0_32.shared_values import SHARED

    shared = copy.copy(loaded.attention)
    shared._modules = dict(shared._modules)
    shared._buffers = dict(shared._buffers)
    shared.__class__ = SHARED[type(loaded.attention)]
    columns = torch.zeros(SLOTS, RANK, dtype=torch.long)
    columns[0], columns[1] = torch.arange(RANK), (torch.arange(RANK) + 3).clamp(max=7)
    shared.begin(torch.cat(loaded.downs), columns, DenseAttention(keys, values))
    return shared


@pytest.mark.parametrize(
    ("keys", "values"), [(HEAD_DIM, HEAD_DIM + 8), (64, 64)], ids=["gpu", "cpu"]
)
@pytest.mark.parametrize("slots", [[0] * 9, [1] * 9, [-1] * 9])
def test_reading_what_one_has_written_is_vllms_own_lora(
    loaded: SimpleNamespace, slots: list[int], keys: int, values: int
) -> None:
    """Queries, keys, norms, rotation and scales of each architecture; and the base model."""
    loaded.choose(slots)
    positions, hidden = torch.arange(9), torch.randn(9, loaded.hidden)
    plain = loaded.attention
    plain.attn = DenseAttention(HEAD_DIM, HEAD_DIM)
    wanted = plain(positions, hidden)
    given = share(loaded, keys, values)(positions, hidden)
    assert wanted.abs().max() > 0.1
    assert torch.allclose(given, wanted, atol=1e-5)


def test_what_is_cached_is_the_base_models_and_the_columns(loaded: SimpleNamespace) -> None:
    """Whoever writes: a token's keys and values depend on its input alone."""
    positions, hidden = torch.arange(6), torch.randn(6, loaded.hidden)
    shared = share(loaded, HEAD_DIM, HEAD_DIM + 8)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    shared.attn.register_forward_pre_hook(lambda _, given: seen.append(given))
    for slots in ([0] * 6, [1] * 6, [-1] * 6, [0, 1, -1, 1, 0, -1]):
        loaded.choose(slots)
        shared(positions, hidden)
    (query, key, value), *others = seen
    qkv, _ = loaded.attention.qkv_proj.base_layer(hidden)
    low_rank = hidden @ torch.cat(loaded.downs).T
    base = qkv[:, -KV_HEADS * HEAD_DIM :].contiguous()
    assert torch.allclose(value, widen_values(base, low_rank, KV_HEADS, HEAD_DIM + 8), atol=1e-5)
    for other_query, other_key, other_value in others:
        assert torch.equal(other_key, key)
        assert torch.equal(other_value, value)
        assert not torch.equal(other_query, query)


def test_rows_behind_a_batch_may_hold_anything(loaded: SimpleNamespace) -> None:
    """Captured graphs are longer than their batch; the rest of the slots' buffer is old."""
    shared = share(loaded, HEAD_DIM, HEAD_DIM + 8)
    positions, hidden = torch.arange(6), torch.randn(6, loaded.hidden)
    loaded.choose([0, 1, -1, 0, 1, 0])
    wanted = shared(positions, hidden)
    punica = shared.qkv_proj.punica_wrapper
    punica._token_lora_indices[4:] = torch.tensor([1 << 40, -7, *([99] * 58)])
    given = shared(positions, hidden)
    assert given.isfinite().all()
    assert torch.equal(given[:4], wanted[:4])


# ---- layouts ----


@pytest.mark.parametrize("architecture", MODELS)
def test_nothing_is_refused_that_works(architecture: str, tmp_path: Path) -> None:
    from memshare.engine.vllm_0_32.shared_values import ARCHITECTURES, value_refusals

    assert architecture in ARCHITECTURES
    assert list(value_refusals(engine_config(tmp_path, architecture), 8)) == []


@pytest.mark.parametrize(
    ("changes", "width", "what"),
    [
        ({"_architecture": "PhiForCausalLM"}, 8, "is a PhiForCausalLM"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}, 8,
         "sliding window"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, 8, "two chunks"),
        ({}, 600, "600 low-rank columns are wider"),
    ],
)  # fmt: skip
def test_models_whose_values_cannot_be_widened(
    changes: dict[str, Any], width: int, what: str, tmp_path: Path
) -> None:
    from memshare.engine.vllm_0_32.shared_values import value_refusals

    config = engine_config(tmp_path, "LlamaForCausalLM")
    for name, value in changes.items():
        owner = (
            config.model_config if name == "_architecture" else config.model_config.hf_text_config
        )
        setattr(owner, name, value)
    (refusal,) = value_refusals(config, width)
    assert what in refusal
    assert "agents.scheme" in refusal


def test_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs keys and values are padded to a width that vLLM has; on GPUs nothing is, and the
    backend is one for values of another width."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from memshare.engine.vllm_0_32 import value_layout

    config = engine_config(tmp_path, "LlamaForCausalLM")
    assert value_layout.layout_of(config, 8) == value_layout.ValueLayout(64, 64)
    assert value_layout.layout_of(config, 40) == value_layout.ValueLayout(80, 80)
    assert value_layout.layout_of(config, 600) is None
    monkeypatch.setattr(value_layout, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    for wanted, name in (
        (None, "TRITON_ATTN_DIFFKV"),
        (AttentionBackendEnum.FLASH_ATTN, "TRITON_ATTN_DIFFKV"),
        (AttentionBackendEnum.TRITON_ATTN_DIFFKV, "TRITON_ATTN_DIFFKV"),
    ):
        config.attention_config.backend = wanted
        layout = value_layout.layout_of(config, 8)
        assert layout is not None
        assert (layout.keys, layout.values) == (32, 40)
        assert layout.backend is not None
        assert layout.backend.get_name() == name
        assert layout.backend.head_size_v == 40


INTERPRETED = """
import os

# Triton without a GPU, as vLLM takes it where devices are hidden for a while.
os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
import vllm.platforms

vllm.platforms.vllm_version_matches_substr = lambda name: False  # a build for CPUs has no Triton
import torch
from vllm.v1.attention.ops import triton_reshape_and_cache_flash as writing
from vllm.v1.attention.ops.triton_unified_attention_diffkv import unified_attention_diffkv
from memshare.agents.values import widen_values

heads, kv_heads, block, tokens = 4, 2, 16, 21
torch.manual_seed(0)
for size, width in ((32, 8), (64, 24), (128, 16)):
    values = size + width
    query, key = torch.randn(tokens, heads, size), torch.randn(tokens, kv_heads, size)
    base, low_rank = torch.randn(tokens, kv_heads * size), torch.randn(tokens, width)
    value = widen_values(base, low_rank, kv_heads, values).view(tokens, kv_heads, values)
    cache = torch.zeros(6, block, kv_heads, size + values)
    table, one = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor(1.0)
    slots = torch.tensor([int(table[0, t // block]) * block + t % block for t in range(tokens)])
    writing.triton_reshape_and_cache_flash_diffkv(key, value, cache, slots, "auto", one, one)
    out = torch.zeros(tokens, heads, values)
    unified_attention_diffkv(
        q=query, k=cache[..., :size], v=cache[..., size:], out=out,
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32),
        seqused_k=torch.tensor([tokens], dtype=torch.int32), softmax_scale=size**-0.5,
        q_descale=None, k_descale=None, v_descale=None, causal=True, alibi_slopes=None,
        use_alibi_sqrt=False, window_size=(-1, -1), block_table=table, softcap=0, sinks=None,
        max_seqlen_q=tokens, seq_threshold_3D=None, num_par_softmax_segments=None,
        softmax_segm_output=None, softmax_segm_max=None, softmax_segm_expsum=None,
    )
    group = heads // kv_heads
    scores = torch.einsum("thd,shd->hts", query, key.repeat_interleave(group, 1)) * size**-0.5
    ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    wanted = torch.einsum("hts,shd->thd", weights, value.repeat_interleave(group, 1))
    print("gap:", float((out - wanted).abs().max()))
"""


def test_vllms_kernels_for_gpus_take_values_wider_than_keys() -> None:
    """The writing and the attending kernel of ``TRITON_ATTN_DIFFKV``, run by Triton's interpreter;
    in a process of its own, because that leaves traces."""
    pytest.importorskip("triton", reason="there is none for this machine")
    out = subprocess.run(
        [sys.executable, "-c", INTERPRETED], check=True, capture_output=True, text=True
    ).stdout
    gaps = [float(line.split()[1]) for line in out.splitlines() if line.startswith("gap:")]
    assert len(gaps) == 3
    assert max(gaps) < 1e-5
