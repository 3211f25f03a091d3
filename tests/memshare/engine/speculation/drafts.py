"""Draft models with KV caches of their own, for a tiny model with weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DRAFTS = 3
METHODS = ("draft_model", "eagle")


def write_draft(method: str, model: Path, folder: Path) -> dict[str, Any]:
    """Write a draft for a model, right now and then; vLLM's ``speculative_config`` of it.

    Args:
        method: one of ``METHODS``.
        model: folder of a Llama with weights.
        folder: of the draft, not there yet.
    """
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    if method == "eagle":
        tensors = _eagle_weights(tensors, generator)
        _change_config(folder, num_hidden_layers=1)
    else:
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator) * tensor.std()
            tensors[name] = tensor if "norm" in name else tensor + 0.05 * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"method": method, "model": str(folder), "num_speculative_tokens": DRAFTS}


def _eagle_weights(
    tensors: dict[str, torch.Tensor], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """One layer behind the model's own hidden state, most of which it hands on."""
    layer = "model.layers.0."
    own = {
        name.removeprefix("model."): tensor * 0.3 if tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
        if name.startswith(layer) and "input_layernorm" not in name
    }
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    mixed = 0.01 * torch.randn(hidden, hidden, generator=generator)
    return own | {"fc.weight": torch.cat((mixed, torch.eye(hidden)), 1)}


def _change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
