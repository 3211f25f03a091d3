"""Adapters of a tiny Llama, made and saved by peft."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    return LlamaConfig(**sizes | changes)


def write_adapter(
    folder: Path,
    base: PreTrainedModel | None = None,
    *,
    seed: int,
    rank: int = 4,
    a_seed: int | None = None,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    **settings: Any,
) -> Path:
    """Save an adapter with random matrices.

    Args:
        folder: is made.
        base: the model it belongs to; a tiny Llama if None.
        seed: of its matrices.
        rank: of all modules.
        a_seed: of the A matrices on ``v_proj``; ``seed`` if None. Adapters with the same one may
            share blocks.
        targets: modules it changes.
        settings: more of peft's.
    """
    base = LlamaForCausalLM(tiny_config()) if base is None else base
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM", **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, lora)
    own = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(seed if a_seed is None else a_seed)
    for name, matrix in sorted(model.named_parameters()):
        if "lora_A" in name:
            generator = shared if "v_proj" in name else own
            matrix.data = torch.randn(matrix.shape, generator=generator) * matrix.shape[1] ** -0.5
        elif "lora_B" in name:
            matrix.data = torch.randn(matrix.shape, generator=own) * 0.5
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(folder))
    model.unload()
    return folder
