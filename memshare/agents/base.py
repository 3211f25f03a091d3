"""The base model that adapters belong to, as far as sharing depends on it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memshare.config import ConfigError

_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class BaseModelFacts:
    """Shapes of a base model, and which one it is.

    Attributes:
        name: its folder or hub id.
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: attention heads.
        kv_heads: heads of keys and values.
        head_dim: width of a head.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def outputs(self, part: str) -> int | None:
        """Rows of B that fit a projection of attention; None for other modules."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        return heads[part] * self.head_dim if part in heads else None


def facts_of(name: str, config: Any) -> BaseModelFacts:
    """The facts, from a configuration with the attributes of Transformers.

    Args:
        name: the model's folder or hub id.
        config: ``hidden_size`` and so on.
    """
    heads = int(config.num_attention_heads)
    return BaseModelFacts(
        name=name,
        hidden=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def read_facts(model: Path) -> BaseModelFacts:
    """The facts of a model in a folder, from its ``config.json``.

    Raises:
        ConfigError: there is none, or it lacks a size.
    """
    from types import SimpleNamespace

    file = model / "config.json"
    try:
        return facts_of(str(model), SimpleNamespace(**json.loads(file.read_text("utf-8"))))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: cannot be read as a model's configuration ({error})\n"
            "    fix: give the folder of the base model"
        ) from None


def identity_of(model: str) -> str:
    """What tells a base model from others: of a folder, a digest of its configuration, and of the
    sizes, headers and samples of its weights, which reads some 100 kB of each file; else its name.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            # The header is at the front: names, types and places of all tensors.
            header = int.from_bytes(opened.read(8), "little")
            digest.update(opened.read(min(header, size)))
            for sample in range(_SAMPLES):
                opened.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
