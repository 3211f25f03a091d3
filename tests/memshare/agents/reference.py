"""What each scheme computes, in plain torch: a Llama with a cache of base values and low-rank part.

Slow and obvious, and independent of the code that it judges: one sequence, one layer after the
other, whole matrices.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Rows = dict[str, Tensor]
"""Of one layer: ``keys``, ``values``, and by adapter the input times its A matrix, ``x A``."""


@dataclass(frozen=True)
class Matrices:
    """An adapter's matrices by (layer, projection): A, and B with its scale."""

    down: dict[tuple[int, str], Tensor]
    up: dict[tuple[int, str], Tensor]


def load_matrices(folder: Path) -> Matrices:
    settings = json.loads((folder / "adapter_config.json").read_text())
    down, up = {}, {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        key = int(parts[parts.index("layers") + 1]), parts[-3]
        if "lora_A" in name:
            down[key] = tensor
        else:
            up[key] = tensor * (settings["lora_alpha"] / settings["r"])
    return Matrices(down, up)


class Reference:
    """A Llama in a folder, and adapters of it."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        self.config = json.loads((base / "config.json").read_text())
        self.weights = load_file(base / "model.safetensors")
        self.adapters = {name: load_matrices(folder) for name, folder in adapters.items()}

    def run(
        self, tokens: Sequence[int], adapter: str | None, cache: list[Rows] | None = None
    ) -> tuple[Tensor, list[Rows]]:
        """Compute tokens behind a cache, whoever has written it.

        Args:
            tokens: the new ones.
            adapter: whose turn it is; None is the base model.
            cache: of the tokens before, by layer; not changed.

        Returns:
            Log-probabilities behind each new token, ``[tokens, vocabulary]``, and the cache with
            the new tokens.
        """
        c, heads = self.config, self.config["num_attention_heads"]
        kv_heads, size = c["num_key_value_heads"], c["head_dim"]
        own = self.adapters[adapter] if adapter is not None else None
        before = cache[0]["keys"].shape[0] if cache else 0
        positions = torch.arange(before, before + len(tokens))
        x, grown = self.weights["model.embed_tokens.weight"][list(tokens)], []
        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            h = self._norm(x, f"{name}input_layernorm.weight")
            project = {
                p: h @ self.weights[f"{name}self_attn.{p}.weight"].T
                for p in ("q_proj", "k_proj", "v_proj")
            }
            if own is not None and (layer, "q_proj") in own.up:
                key = layer, "q_proj"
                project["q_proj"] = project["q_proj"] + h @ own.down[key].T @ own.up[key].T
            rows = {
                "keys": self._rotate(project["k_proj"].view(-1, kv_heads, size), positions),
                "values": project["v_proj"],
            } | {
                f"low rank of {other}": h @ matrices.down[layer, "v_proj"].T
                for other, matrices in self.adapters.items()
            }
            if cache:
                rows = {what: torch.cat([cache[layer][what], new]) for what, new in rows.items()}
            grown.append(rows)
            values = rows["values"]
            if own is not None:
                values = values + rows[f"low rank of {adapter}"] @ own.up[layer, "v_proj"].T
            query = self._rotate(project["q_proj"].view(-1, heads, size), positions)
            group = heads // kv_heads
            scores = (
                torch.einsum("thd,shd->hts", query, rows["keys"].repeat_interleave(group, 1))
                * size**-0.5
            )
            ahead = torch.arange(scores.shape[-1])[None] > positions[:, None]
            weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
            by_head = values.view(-1, kv_heads, size).repeat_interleave(group, 1)
            attended = torch.einsum("hts,shd->thd", weights, by_head).flatten(1)
            x = x + attended @ self.weights[f"{name}self_attn.o_proj.weight"].T
            h = self._norm(x, f"{name}post_attention_layernorm.weight")
            gate, up, down = (
                self.weights[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            x = x + (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T
        logits = self._norm(x, "model.norm.weight") @ self.weights["lm_head.weight"].T
        return logits.log_softmax(-1), grown

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[name]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        powers = torch.arange(half) / half
        angles = positions[:, None].float() * self.config["rope_theta"] ** -powers
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def cut(cache: list[Rows], tokens: int) -> list[Rows]:
    """The cache of the first tokens."""
    return [{what: rows[:tokens] for what, rows in layer.items()} for layer in cache]
