"""Models of the comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from memshare.small_model.folders import find_problem, locked, replacing, write_manifest
from memshare.small_model.names import SMOLLM2, cache_folder, prepare_model, resolve_model

DUMMY = "dummy-1.1b"
"""Random weights in the shape of a 1.1B Llama: on a CPU core its decode steps are bound by reading
weights, as a GPU's are, so that a larger batch costs little."""
_SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "head_dim": 64,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
}


def resolve(name: str) -> str:
    """Return the folder or hub id of ``name``: ``DUMMY``, or what ``resolve_model`` knows."""
    return str(_make_dummy()) if name == DUMMY else resolve_model(name)


def load_format(model: str) -> Literal["dummy", "auto"]:
    """vLLM's ``load_format`` for a resolved model."""
    return "dummy" if Path(model).name == DUMMY else "auto"


def _make_dummy() -> Path:
    """Write a folder with a configuration and SmolLM2's tokenizer, and no weights."""
    target = cache_folder() / DUMMY
    recipe = f"{SMOLLM2.recipe} shape {json.dumps(_SHAPE)}"
    with locked(target):
        if find_problem(target, recipe) is None:
            return target
        real = prepare_model()
        with replacing(target) as partial:
            for file in real.iterdir():
                if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
                    (partial / file.name).write_bytes(file.read_bytes())
            config = json.loads((real / "config.json").read_text())
            (partial / "config.json").write_text(json.dumps(config | _SHAPE))
            write_manifest(partial, recipe)
    return target
