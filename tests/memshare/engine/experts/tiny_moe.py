"""Small mixtures of experts with random weights, as Transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.memshare.engine.harness import write_tiny_model

EXPERTS = 8
CHOSEN = 2
LAYERS = 3

KINDS = ("qwen3_moe", "mixtral", "olmoe")


def write_tiny_moe(folder: Path, kind: str) -> Path:
    """Write one of :data:`KINDS`, with a tokenizer of bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    write_tiny_model(folder)
    tokens = json.loads((folder / "config.json").read_text())
    shape: dict[str, Any] = {
        "vocab_size": tokens["vocab_size"], "hidden_size": 128, "intermediate_size": 64,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "num_experts_per_tok": CHOSEN,
        "bos_token_id": tokens["bos_token_id"], "eos_token_id": tokens["eos_token_id"],
        # Wide enough that no two experts are so near that rounding decides.
        "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(kind, shape))
    for name, weight in model.named_parameters():
        if "gate.weight" in name:  # of the router
            torch.nn.init.normal_(weight, std=0.2)
    (folder / "config.json").unlink()
    model.save_pretrained(folder)
    return folder


def _config(kind: str, shape: dict[str, Any]) -> Any:
    from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

    if kind == "mixtral":
        return MixtralConfig(**shape, num_local_experts=EXPERTS, head_dim=32)
    if kind == "olmoe":
        return OlmoeConfig(**shape, num_experts=EXPERTS, pad_token_id=shape["eos_token_id"])
    return Qwen3MoeConfig(
        **shape, num_experts=EXPERTS, moe_intermediate_size=64, head_dim=32, norm_topk_prob=True,
        mlp_only_layers=[1],  # a dense layer in between
    )  # fmt: skip
