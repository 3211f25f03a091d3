"""Small hybrid models with random weights: layers with full attention beside others.

Only configurations are written. Weights are made when vLLM loads them (``load_format="dummy"``), by
:func:`random_weights`: vLLM's own dummy weights are so small that outputs hardly depend on the KV
cache, and changing parameters after the load does not reach the prepacked ones on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memshare.engine.harness import write_tiny_model

WINDOW = 128  # tokens
# Gemma's norms add 1, and its residual stream is the token's own embedding unless they are large.
_GEMMA_NORM = 2.0

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
KINDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {  # a sliding layer and a full one in turn
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": 4,
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
        "layer_types": [_SLIDING, _FULL] * 2, "rope_theta": 150000.0, "attention_bias": True,
        "swiglu_limit": 7.0, "initial_context_length": 4096, "rope_scaling": None,
    },
    "gemma3": {  # five sliding layers, then a full one
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "num_hidden_layers": 6, "sliding_window": WINDOW, "sliding_window_pattern": 6,
        "layer_types": [_SLIDING] * 5 + [_FULL], "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 32, "tie_word_embeddings": True,
    },
    "qwen3_next": {  # three gated delta nets, then a full layer
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
        "num_hidden_layers": 4, "layer_types": [_LINEAR] * 3 + [_FULL], "decoder_sparse_step": 1,
        "full_attention_interval": 4, "moe_intermediate_size": 64, "mlp_only_layers": [],
        "shared_expert_intermediate_size": 64, "partial_rotary_factor": 0.25, "rope_theta": 1e7,
        "rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "num_key_value_heads": 4, "head_dim": 64, **_EXPERTS,
    },
    "nemotron_h": {  # Mamba2, perceptrons and one full layer
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
        "num_hidden_layers": 6, "hybrid_override_pattern": "M-M*M-", "attention_head_dim": 32,
        "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 32,
        "conv_kernel": 4, "expand": 2, "chunk_size": 128, "mlp_hidden_act": "relu2",
        "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


def write_tiny_hybrid(folder: Path, kind: str) -> str:
    """Write one of :data:`KINDS`, with a tokenizer of bytes; the folder."""
    write_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | _SHAPE | KINDS[kind]))
    return str(folder)


def write_hybrid_weights(folder: Path, kind: str) -> str:
    """Write one of :data:`KINDS` with weights that Transformers makes, too; the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tiny_hybrid(folder, kind)
    config = AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.12
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kind == "gemma3":
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data.fill_(_GEMMA_NORM)
    model.save_pretrained(folder)
    return str(folder)


@contextmanager
def random_weights(kind: str, scale: float = 0.12) -> Iterator[None]:
    """Let engines that start here load weights by which outputs depend on every block.

    Args:
        kind: one of :data:`KINDS`.
        scale: standard deviation of matrices. Vectors are those of a norm that changes nothing.
    """
    from vllm.model_executor.model_loader import dummy_loader

    generator = torch.Generator().manual_seed(7)
    unit = _GEMMA_NORM if kind == "gemma3" else 1.0

    def make(weight: torch.Tensor, *_: Any, **__: Any) -> None:
        if not torch.is_floating_point(weight) or weight.device.type == "meta":
            return
        if weight.dim() < 2:
            weight.data.fill_(unit)
        else:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dummy_loader, "initialize_single_dummy_weight", make)
        yield
