"""Zero-padded attention heads, so that a tensor-parallel size divides a model's head counts.

A padded head has zero query, key and value weights: it attends to everything equally, sums zero
values, and meets zero columns in the output projection. The model's outputs do not change; its KV
cache grows by the ratio of the KV heads.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from memshare.errors import UserError
from memshare.small_model.folders import MANIFEST, locked, replacing

if TYPE_CHECKING:
    import torch

# Families whose attention is exactly q, k, v and o projections (with per-head norms at most) and
# for which transformers and vLLM both take `head_dim` from the configuration.
SUPPORTED = ("llama", "mistral", "qwen3")
# Give up beyond this many times the original KV heads: such a copy would be useless.
MOST_GROWTH = 8

ATTENTION = re.compile(r"(?:^|\.)self_attn\.(?P<name>.+)$")
# Per-head weights, [head_dim]; the same for every head, so nothing to pad.
PER_HEAD = ("q_norm.weight", "k_norm.weight")
UNTOUCHED = ("o_proj.bias", "rotary_emb.inv_freq")


class ModelShape(BaseModel):
    """The fields of a model's ``config.json`` that padding depends on."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    quantization_config: dict[str, object] | None = None

    @property
    def heads(self) -> Heads:
        """The head counts; without a KV count every query head has its own."""
        return Heads(
            query=self.num_attention_heads,
            key_value=self.num_key_value_heads or self.num_attention_heads,
            dim=self.head_dim or self.hidden_size // self.num_attention_heads,
        )


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts of one attention layer, and the channels of a head."""

    query: int
    key_value: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.query // self.key_value


def padded_heads(shape: ModelShape, tensor_parallel_size: int) -> Heads:
    """Return the smallest head counts that ``tensor_parallel_size`` divides.

    The group (query heads per KV head) stays: head ``i`` reads KV head ``i // group``, so heads
    appended at the end leave the mapping of the real ones alone. Fewer KV heads than ranks are fine
    where the ranks are a multiple: vLLM then keeps copies.

    Raises:
        UserError: no padding makes the size divide.
    """
    size, heads = tensor_parallel_size, shape.heads
    if size < 1:
        raise UserError(f"tensor parallel size must be 1 or more, not {size}")
    if shape.intermediate_size % size:
        raise UserError(
            f"tensor parallel size {size} does not divide the MLP width {shape.intermediate_size}; "
            "heads can be padded, the MLP cannot: use another size"
        )
    for key_value in range(heads.key_value, MOST_GROWTH * max(heads.key_value, size) + 1):
        query = key_value * heads.group
        fits = key_value % size == 0 if key_value >= size else size % key_value == 0
        # transformers refuses a Llama whose hidden size is no multiple of its query heads.
        loads = shape.model_type != "llama" or shape.hidden_size % query == 0
        if query % size == 0 and fits and loads:
            return Heads(query, key_value, heads.dim)
    raise UserError(
        f"no padding of {heads.query} query and {heads.key_value} KV heads suits tensor parallel "
        f"size {size} (hidden size {shape.hidden_size}): use another size"
    )


def read_shape(source: Path) -> ModelShape:
    """Read the shape of the model in folder ``source``.

    Raises:
        UserError: there is no readable ``config.json``, or padding does not support the model.
    """
    path = source / "config.json"
    try:
        shape = ModelShape.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{source} is not a model folder: it has no config.json") from error
    except ValidationError as error:
        raise UserError(f"{path} does not describe a decoder that can be padded: {error}") from None
    if shape.model_type not in SUPPORTED:
        raise UserError(
            f"head padding knows {', '.join(SUPPORTED)}; {source} is a {shape.model_type}"
        )
    if shape.quantization_config is not None:
        raise UserError(f"head padding needs unquantised weights; {source} is quantised")
    return shape


def pad_heads(source: Path, target: Path, tensor_parallel_size: int) -> Path:
    """Copy the model in ``source`` to ``target`` with heads that ``tensor_parallel_size`` divides.

    ``source`` holds safetensors (one file or shards) and is not modified. ``target`` appears whole
    or not at all. If the size divides already, the copy has the heads of the original.

    Raises:
        UserError: the model or the size is not supported, or ``target`` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it, or name another folder")
    with locked(target), replacing(target) as partial:
        write_padded(source, partial, tensor_parallel_size)
    return target


def write_padded(source: Path, folder: Path, tensor_parallel_size: int) -> None:
    """Write the padded copy of ``source`` into the existing, empty ``folder``.

    One shard is in memory at a time.

    Raises:
        UserError: the model or the size is not supported.
    """
    # Here, not above: `--help` and errors must not wait for torch.
    from safetensors.torch import load_file, save_file

    shape = read_shape(source)
    heads = padded_heads(shape, tensor_parallel_size)
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{source} has no .safetensors file")

    total_bytes = 0
    for shard in shards:
        tensors = pad_tensors(load_file(shard), shape.heads, heads)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})

    written = {shard.name for shard in shards} | {"config.json", MANIFEST}
    for path in source.iterdir():
        if path.is_file() and path.name not in written:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    config.update(
        num_attention_heads=heads.query, num_key_value_heads=heads.key_value, head_dim=heads.dim
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        index = json.loads(index_path.read_text())
        index.setdefault("metadata", {})["total_size"] = total_bytes
        index_path.write_text(json.dumps(index, indent=2) + "\n")


def pad_tensors(
    tensors: Mapping[str, torch.Tensor], old: Heads, new: Heads
) -> dict[str, torch.Tensor]:
    """Return the tensors with zero heads appended; tensors outside attention are passed on.

    Shapes, with Q query heads, KV KV heads, D channels a head and H hidden units:
    ``q_proj.weight`` [Q*D, H], ``k_proj``/``v_proj.weight`` [KV*D, H], their biases [Q*D] or
    [KV*D], ``o_proj.weight`` [H, Q*D].

    Raises:
        UserError: an attention tensor is unknown, or its shape is not that of ``old``.
    """
    rows = {
        "q_proj": (old.query * old.dim, new.query * new.dim),
        "k_proj": (old.key_value * old.dim, new.key_value * new.dim),
        "v_proj": (old.key_value * old.dim, new.key_value * new.dim),
    }
    padded = {}
    for full_name, tensor in tensors.items():
        match = ATTENTION.search(full_name)
        if match is None or match["name"] in UNTOUCHED:
            padded[full_name] = tensor
            continue
        projection, _, kind = match["name"].rpartition(".")
        if projection in rows and kind in ("weight", "bias"):
            padded[full_name] = grow(full_name, tensor, 0, *rows[projection])
        elif match["name"] == "o_proj.weight":
            padded[full_name] = grow(full_name, tensor, 1, *rows["q_proj"])
        elif match["name"] in PER_HEAD and tuple(tensor.shape) == (old.dim,):
            padded[full_name] = tensor
        else:
            raise UserError(f"head padding does not know the tensor {full_name}")
    return padded


def grow(name: str, tensor: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    """Return ``tensor`` with zeros appended along ``axis``, from ``before`` to ``after`` entries.

    Raises:
        UserError: the axis does not have ``before`` entries.
    """
    if tensor.shape[axis] != before:
        raise UserError(
            f"{name} has shape {tuple(tensor.shape)}; config.json asks for {before} in axis {axis}"
        )
    shape = list(tensor.shape)
    shape[axis] = after
    result = tensor.new_zeros(shape)
    result.narrow(axis, 0, before).copy_(tensor)
    return result
