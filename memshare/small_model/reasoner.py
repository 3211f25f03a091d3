"""The reasoner as an ordinary model: the adapter merged into its base, once, at first use."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.errors import UserError
from memshare.small_model.folders import find_problem, hash_file, locked, replacing, write_manifest
from memshare.small_model.names import SMOLLM2, cache_folder, prepare_model

if TYPE_CHECKING:
    import torch

NAME = f"{SMOLLM2.name}-reasoner"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_DATA = "memshare_lab_data"  # made from tools/lab_data
_PREFIX = "base_model.model."


def adapter_folder() -> Path:
    """Return the folder of the adapter, as peft and vLLM's ``--lora-modules`` take it.

    Raises:
        UserError: the distribution that brings it is not installed.
    """
    try:
        return Path(str(files(_DATA) / "adapter"))
    except ModuleNotFoundError:
        raise UserError(
            f"{NAME} needs the adapter in memshare-lab-data, which is not installed\n"
            "    fix: pip install memshare-lab-data, or in MemShare's sources pip install "
            "./tools/lab_data; or name another model"
        ) from None


def prepare_reasoner() -> Path:
    """Make sure that the merged model is in the user's cache; return its folder.

    Raises:
        UserError: the adapter is not installed, or the base model cannot be prepared (see
            :func:`memshare.small_model.names.prepare_model`).
    """
    adapter = adapter_folder()  # first: the base takes a minute
    base = prepare_model()
    target = cache_folder() / NAME
    recipe = f"{SMOLLM2.recipe} adapter {hash_file(adapter / WEIGHTS)}"
    if find_problem(target, recipe) is None:
        return target
    with locked(target):
        if find_problem(target, recipe) is not None:  # no other process made it while we waited
            with replacing(target) as partial:
                write_merged(base, adapter, partial)
                write_manifest(partial, recipe)
    return target


def write_merged(base: Path, adapter: Path, folder: Path) -> None:
    """Write the model in ``base`` with ``adapter`` merged into it to the empty ``folder``."""
    from safetensors.torch import load_file, save_file

    settings = json.loads((adapter / CONFIG).read_text())
    scale = settings["lora_alpha"] / settings["r"]
    weights = load_file(base / "model.safetensors")
    lora = load_file(adapter / WEIGHTS)
    for name in lora:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = f"{module.removeprefix(_PREFIX)}.weight"
            down, up = lora[name], lora[f"{module}.lora_B.weight"]
            weights[weight] = merge(weights[weight], down, up, scale)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja") and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())


def merge(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``weight + scale * up @ down`` in the type of ``weight`` (LoRA, arXiv 2106.09685).

    Args:
        weight: ``[out, in]``.
        down: ``[rank, in]``.
        up: ``[out, rank]``.
        scale: ``lora_alpha / rank``.
    """
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
