"""Gives adapters that were trained apart one A matrix on ``v_proj``, so that they share a cache
with as many low-rank columns as they have together, or with fewer.

The low-rank parts of all adapters on a layer's values lie in the space that all their A matrices
span. An orthonormal basis of it, or of the part of it that counts, is an A that all can take: what
remains of each is its own B. All of the basis changes nothing but rounding; a part of it loses
something, which is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memshare.agents.adapter import SETTINGS, WEIGHTS, Adapter

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class _Part:
    """What an adapter makes of a layer's values: ``x A B``.

    Attributes:
        down: A, ``[rank, hidden]``.
        up: B with the adapter's scale, ``[outputs, rank]``.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Unified:
    """One A for a layer.

    Attributes:
        down: ``[rank, hidden]``, orthonormal rows, those that count most first.
        up: each adapter's B, scale and all, ``[outputs, rank]``; zeros for one that has none here.
        lost: with the first ``k`` rows alone, of the worst adapter: the norm of what is lost of its
            ``A B``, relative to the norm of all; ``k`` from 0 on.
    """

    down: Tensor
    up: dict[str, Tensor]
    lost: Tensor


class Unifier:
    """Adapters of one base model, and an A for them in each layer."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Read the adapters, and find what they have in common.

        Args:
            adapters: of one base model, with plain LoRA on ``q_proj`` and ``v_proj`` alone.
        """
        from safetensors.torch import load_file

        self._adapters = adapters
        self._tensors = {a.name: load_file(a.folder / WEIGHTS) for a in adapters}
        self._scales = {a.name: _scale(a.folder) for a in adapters}
        names = sorted(
            {m.name for a in adapters for m in a.modules if m.part == "v_proj"}, key=_by_number
        )
        self.layers = {name: self._unified(name) for name in names}
        """By the name of the module."""

    def _unified(self, module: str) -> Unified:
        parts = {a.name: part for a in self._adapters if (part := self._part(a, module))}
        return unify(parts, [adapter.name for adapter in self._adapters])

    def _part(self, adapter: Adapter, module: str) -> _Part | None:
        tensors = self._tensors[adapter.name]
        key = next((n for n in tensors if n.endswith(f"{module}.lora_A.weight")), None)
        if key is None:
            return None
        up = tensors[key.replace("lora_A", "lora_B")].double() * self._scales[adapter.name]
        return _Part(tensors[key].double(), up)

    @property
    def _numbers(self) -> list[int]:
        """Layers that any adapter changes."""
        every = {m.layer for a in self._adapters for m in a.modules if m.layer is not None}
        return sorted(every)

    @property
    def whole(self) -> int:
        """Rows with which nothing is lost."""
        return max(len(layer.down) for layer in self.layers.values())

    def lost(self, rank: int) -> float:
        """What the worst adapter loses in its worst layer with so many rows (see
        :class:`Unified`)."""
        return max(float(layer.lost[min(rank, len(layer.down))]) for layer in self.layers.values())

    def write(self, rank: int, output: Path) -> None:
        """Write all adapters with one A of so many rows, in float32, each into a folder of its
        name."""
        from safetensors.torch import save_file

        for adapter in self._adapters:
            folder = output / adapter.name
            folder.mkdir(parents=True)
            save_file(self._written(adapter, rank), folder / WEIGHTS, metadata={"format": "pt"})
            settings: dict[str, Any] = json.loads((adapter.folder / SETTINGS).read_text("utf-8"))
            # The scale is in B. vLLM reads r and lora_alpha alone, peft the patterns as well.
            settings |= {
                "lora_alpha": settings["r"], "use_rslora": False,
                "rank_pattern": {"v_proj": rank}, "alpha_pattern": {"v_proj": rank},
                "target_modules": sorted({m.part for m in adapter.modules} | {"v_proj"}),
                "layers_to_transform": self._numbers,
            }  # fmt: skip
            (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")

    def _written(self, adapter: Adapter, rank: int) -> dict[str, Tensor]:
        written = {}
        for name, tensor in self._tensors[adapter.name].items():
            if "v_proj" not in name:
                scale = self._scales[adapter.name] if "lora_B" in name else 1.0
                written[name] = (tensor.float() * scale).contiguous()
        for module, layer in self.layers.items():
            down, up = layer.down[:rank], layer.up[adapter.name][:, :rank]
            missing = rank - len(down)  # a layer of few adapters has fewer
            pad = torch.nn.functional.pad
            written[f"{_PREFIX}{module}.lora_A.weight"] = pad(down, (0, 0, 0, missing)).float()
            written[f"{_PREFIX}{module}.lora_B.weight"] = pad(up, (0, missing)).float()
        return {name: tensor.contiguous() for name, tensor in written.items()}


def unify(parts: Mapping[str, _Part], names: Sequence[str]) -> Unified:
    """One A for the adapters of a layer.

    Args:
        parts: of those that have one, by name.
        names: of all adapters.
    """
    downs = torch.cat([part.down for part in parts.values()])
    basis, triangle = torch.linalg.qr(downs.T)  # [hidden, ranks], [ranks, ranks]
    own = dict(
        zip(parts, triangle.split([len(part.down) for part in parts.values()], dim=1), strict=True)
    )
    cores = {name: own[name] @ part.up.T for name, part in parts.items()}  # [ranks, outputs]
    norms = {name: core.norm().clamp_min(1e-30) for name, core in cores.items()}
    # Each counts as much as the others, however large it is: what is lost is relative.
    turned, _, _ = torch.linalg.svd(
        torch.cat([core / norms[name] for name, core in cores.items()], dim=1), full_matrices=False
    )
    kept = {name: turned.T @ core for name, core in cores.items()}  # [rows, outputs]
    rows = turned.shape[1]
    lost = torch.stack([_left_out(kept[name]) / norms[name] for name in kept]).amax(0)
    outputs = next(iter(parts.values())).up.shape[0]
    return Unified(
        (basis @ turned).T,
        {name: kept[name].T if name in kept else torch.zeros(outputs, rows) for name in names},
        lost,
    )


def _left_out(rows: Tensor) -> Tensor:
    """Norm of all rows from the ``k``-th on, for each ``k``: ``[rows + 1]``."""
    squares = rows.square().sum(1)
    behind = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([behind, behind.new_zeros(1)]).sqrt()


def _scale(folder: Path) -> float:
    """What an adapter's B counts, as vLLM reads it."""
    settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    rank, alpha = settings["r"], settings["lora_alpha"]
    return float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)


def _by_number(module: str) -> tuple[int, str]:
    number = module.rpartition("layers.")[2].partition(".")[0]
    return (int(number) if number.isdecimal() else 0), module
