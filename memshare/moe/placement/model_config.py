"""Reads a model's sizes from its ``config.json``, of the families whose layers are known here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

from memshare.config import ConfigError
from memshare.moe.placement.shape import Experts, GroupedHeads, LatentHeads, ModelShape

_DTYPES = {"bfloat16": Fraction(2), "float16": Fraction(2), "float32": Fraction(4)}
_MXFP4 = Fraction(4 * 32 + 8, 8 * 32)  # 32 numbers of four bits share a scale of eight
_SCALE_BYTES = 4  # of a block of fp8 numbers
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_shape(model: Path) -> ModelShape:
    """The sizes of a model.

    Args:
        model: its folder, or its ``config.json`` itself.

    Raises:
        ConfigError: there is no such file, it lacks a field, or what it describes is not known
            here; names the field.
    """
    file = model / "config.json" if model.is_dir() else model
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: cannot be read as a model's configuration ({error})\n"
            "    fix: give the folder of a model, or its config.json"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: is not an object\n    fix: give a model's config.json")
    return shape_of(found)


def shape_of(config: Mapping[str, object]) -> ModelShape:
    """The sizes that a configuration gives, with the names that Transformers uses.

    Raises:
        ConfigError: see :func:`read_shape`.
    """
    fields = _Fields(config)
    family = _FAMILIES.get(fields.word("model_type"))
    if family is None:
        raise fields.error(
            "model_type", f"is not known here; known: {', '.join(sorted(_FAMILIES))}"
        )
    heads, layers = fields.size("num_attention_heads"), fields.size("num_hidden_layers")
    windowed, window = _windows(fields, layers)
    plain = fields.dtype()
    dense, expert = _quantised(fields, plain)
    experts = family.experts(fields, layers) if family.experts else None
    return ModelShape(
        model_type=fields.word("model_type"),
        hidden=fields.size("hidden_size"),
        layers=layers,
        vocabulary=fields.size("vocab_size"),
        tied=fields.flag("tie_word_embeddings"),
        attention=family.attention(fields, heads),
        experts=experts,
        dense_width=0
        if experts is not None and experts.layers == layers
        else fields.size("intermediate_size"),
        dense_bias=fields.flag("mlp_bias"),
        windowed_layers=windowed,
        window=window,
        plain_size=plain,
        dense_size=dense,
        expert_size=expert,
    )


class _Fields:
    """The fields of a configuration, checked one by one as they are read."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = config

    def error(self, name: str, text: str) -> ConfigError:
        return ConfigError(f"config.json: {name} = {self._config.get(name)!r}: {text}")

    def has(self, name: str) -> bool:
        return self._config.get(name) is not None

    def size(self, name: str, default: int | None = None, at_least: int = 1) -> int:
        """A whole number; ``default`` where there is none or null."""
        value = self._config.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise self.error(name, f"a whole number from {at_least} on is wanted")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false is wanted")
        return default if value is None else value

    def word(self, name: str, default: str = "") -> str:
        value = self._config.get(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "a string is wanted")
        return default if value is None else value

    def items(self, name: str) -> list[object]:
        value = self._config.get(name)
        if value is not None and not isinstance(value, list):
            raise self.error(name, "a list is wanted")
        return value or []

    def mapping(self, name: str) -> Mapping[str, object]:
        value = self._config.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "an object is wanted")
        return value or {}

    def dtype(self) -> Fraction:
        name = "dtype" if self.has("dtype") else "torch_dtype"
        size = _DTYPES.get(self.word(name, "bfloat16"))
        if size is None:
            raise self.error(name, f"known: {', '.join(_DTYPES)}")
        return size


def _windows(fields: _Fields, layers: int) -> tuple[int, int]:
    """Layers whose attention is windowed, and tokens of the window."""
    kinds = fields.items("layer_types")
    if kinds:
        if len(kinds) != layers:
            raise fields.error("layer_types", f"has {len(kinds)} entries for {layers} layers")
        if unknown := {str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}:
            raise fields.error(
                "layer_types", f"{', '.join(sorted(unknown))}: their state is not counted here"
            )
        windowed = kinds.count("sliding_attention")
    elif fields.has("sliding_window") and fields.flag("use_sliding_window", default=True):
        windowed = layers - fields.size("max_window_layers", 0, at_least=0)
    else:
        windowed = 0
    return (windowed, fields.size("sliding_window")) if windowed > 0 else (0, 0)


def _quantised(fields: _Fields, plain: Fraction) -> tuple[Fraction, Fraction]:
    """Bytes of a number in matrices outside of experts, and in those of experts."""
    if not (given := fields.mapping("quantization_config")):
        return plain, plain
    inner = _Fields(given)
    method = inner.word("quant_method")
    if method == "mxfp4":
        return plain, _MXFP4
    if method == "fp8":
        block = inner.items("weight_block_size")
        area = 0
        if block:
            if len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block):
                raise inner.error("weight_block_size", "two whole numbers from 1 on are wanted")
            rows, columns = cast(list[int], block)
            area = rows * columns
        size = Fraction(1) + (Fraction(_SCALE_BYTES, area) if area else 0)
        return size, size
    raise fields.error(
        "quantization_config",
        "its quant_method is not known here; known: fp8, mxfp4\n"
        "    fix: take the field out of a copy of the file to place the model unquantised",
    )


def _grouped(
    input_bias: bool | None = None, norms: Callable[[int, int, int], int] | None = None
) -> Callable[[_Fields, int], GroupedHeads]:
    """Attention of a family: whether it has biases (None: as ``attention_bias`` says), and the
    numbers in its norms, by heads, KV heads and head_dim."""

    def read(fields: _Fields, heads: int) -> GroupedHeads:
        kv_heads = fields.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"does not divide {heads} attention heads")
        head_dim = fields.size("head_dim", fields.size("hidden_size") // heads)
        has_bias = fields.flag("attention_bias")
        return GroupedHeads(
            heads, kv_heads, head_dim,
            input_bias=has_bias if input_bias is None else input_bias,
            output_bias=has_bias,
            norms=0 if norms is None else norms(heads, kv_heads, head_dim),
            sinks=fields.word("model_type") == "gpt_oss",
        )  # fmt: skip

    return read


def _latent(fields: _Fields, heads: int) -> LatentHeads:
    return LatentHeads(
        heads,
        fields.size("q_lora_rank") if fields.has("q_lora_rank") else None,
        fields.size("kv_lora_rank"),
        fields.size("qk_nope_head_dim"),
        fields.size("qk_rope_head_dim"),
        fields.size("v_head_dim"),
    )


def _chosen(fields: _Fields, count: int) -> int:
    name = "num_experts_per_tok"
    chosen = fields.size(name)
    if chosen > count:
        raise fields.error(name, f"is more than the {count} experts of a layer")
    return chosen


def _count(fields: _Fields) -> int:
    """Experts of a layer. Families name them differently, and Transformers 5 differently again."""
    return fields.size(next(filter(fields.has, _COUNTS), _COUNTS[0]))


def _everywhere(bias: bool = False, by_tokens: bool = False) -> Callable[[_Fields, int], Experts]:
    """Experts in every layer, as wide as ``intermediate_size`` says."""

    def read(fields: _Fields, layers: int) -> Experts:
        count = _count(fields)
        width = fields.size("intermediate_size")
        return Experts(count, _chosen(fields, count), width, layers, bias=bias, by_tokens=by_tokens)

    return read


def _qwen3(fields: _Fields, layers: int) -> Experts:
    count, step = _count(fields), fields.size("decoder_sparse_step", 1)
    dense = fields.items("mlp_only_layers")
    sparse = sum(i not in dense and (i + 1) % step == 0 for i in range(layers))
    return Experts(count, _chosen(fields, count), fields.size("moe_intermediate_size"), sparse)


def _deepseek(fields: _Fields, layers: int) -> Experts:
    count, frequency = _count(fields), fields.size("moe_layer_freq", 1)
    first = fields.size("first_k_dense_replace", 0, at_least=0)
    width = fields.size("moe_intermediate_size")
    return Experts(
        count, _chosen(fields, count), width,
        layers=sum(i >= first and i % frequency == 0 for i in range(layers)),
        shared_width=width * fields.size("n_shared_experts", 0, at_least=0),
        balanced=fields.word("topk_method") == "noaux_tc",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Family:
    """How one kind of model is read.

    Attributes:
        attention: of all layers, by the fields and the number of query heads.
        experts: by the fields and the number of layers; None in dense models.
    """

    attention: Callable[[_Fields, int], GroupedHeads | LatentHeads]
    experts: Callable[[_Fields, int], Experts] | None = None


def _head_norms(heads: int, kv_heads: int, head_dim: int) -> int:
    return 2 * head_dim


def _whole_norms(heads: int, kv_heads: int, head_dim: int) -> int:
    return (heads + kv_heads) * head_dim


_FAMILIES = {
    "llama": _Family(_grouped()),
    "mistral": _Family(_grouped()),
    "qwen2": _Family(_grouped(input_bias=True)),
    "qwen3": _Family(_grouped(norms=_head_norms)),
    "mixtral": _Family(_grouped(), _everywhere()),
    "olmoe": _Family(_grouped(norms=_whole_norms), _everywhere()),
    "qwen3_moe": _Family(_grouped(norms=_head_norms), _qwen3),
    "gpt_oss": _Family(_grouped(), _everywhere(bias=True, by_tokens=True)),
    "deepseek_v2": _Family(_latent, _deepseek),
    "deepseek_v3": _Family(_latent, _deepseek),
    "kimi_k2": _Family(_latent, _deepseek),
}
