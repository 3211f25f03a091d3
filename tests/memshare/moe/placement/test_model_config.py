"""Sizes of published models, and configurations that cannot be read."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from memshare.config import ConfigError
from memshare.moe.placement.model_config import read_shape, shape_of
from memshare.moe.placement.shape import LatentHeads
from tests.memshare.moe.placement.published import (
    DEEPSEEK_V3,
    GPT_OSS_20B,
    GPT_OSS_120B,
    LLAMA_8B,
    MIXTRAL,
    QWEN3_30B,
)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (QWEN3_30B, 30_532_122_624),  # as its checkpoint's index counts them
        (MIXTRAL, 46_702_792_704),
        (LLAMA_8B, 8_030_261_248),
        (GPT_OSS_20B, 20_914_757_184),
        (GPT_OSS_120B, 116_829_156_672),
        (DEEPSEEK_V3, 671_026_419_200),  # without its draft layer
    ],
)
def test_parameters_are_those_of_the_published_model(
    config: dict[str, object], parameters: int
) -> None:
    assert shape_of(config).parameters == parameters


def test_gpt_oss_checkpoints_are_as_large_as_its_card_says() -> None:
    """arXiv 2508.10925, table 1: 60.8 and 12.8 GiB."""
    gib = 1 << 30
    assert round(shape_of(GPT_OSS_120B).weight_bytes / gib, 1) == 60.8
    assert round(shape_of(GPT_OSS_20B).weight_bytes / gib, 1) == 12.8


def test_a_layer_of_qwen3_by_hand() -> None:
    shape = shape_of(QWEN3_30B)
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048 + 2 * 128 + 2 * 2048
    found = sum(w.numbers * w.layers for w in shape.weights() if w.part == "attention")
    assert found == 48 * attention
    assert shape.active_parameters == shape.parameters - 48 * (128 - 8) * 3 * 2048 * 768


def test_layers_without_experts_are_counted() -> None:
    shape = shape_of(DEEPSEEK_V3)
    assert shape.experts is not None
    assert (shape.experts.layers, shape.dense_layers) == (58, 3)
    assert isinstance(shape.attention, LatentHeads)
    assert shape.attention.cached == 576
    mixed = shape_of({**QWEN3_30B, "decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert mixed.experts is not None
    assert (mixed.experts.layers, mixed.dense_layers) == (23, 25)  # every second one, less one


def test_transformers_5_writes_the_number_of_experts_under_another_name() -> None:
    renamed = {**QWEN3_30B, "num_local_experts": 128}
    del renamed["num_experts"]
    assert shape_of(renamed) == shape_of(QWEN3_30B)
    del renamed["num_local_experts"]
    with pytest.raises(ConfigError, match="num_experts = None: a whole number"):
        shape_of(renamed)


def test_windows_and_sizes_of_numbers() -> None:
    shape = shape_of(GPT_OSS_20B)
    assert (shape.windowed_layers, shape.window) == (12, 128)
    assert (shape.plain_size, shape.dense_size, shape.expert_size) == (2, 2, Fraction(17, 32))
    shape = shape_of(DEEPSEEK_V3)
    assert shape.dense_size == shape.expert_size == 1 + Fraction(4, 128 * 128)
    assert shape_of({**LLAMA_8B, "torch_dtype": "float32"}).plain_size == 4
    assert shape_of(QWEN3_30B).windowed_layers == 0
    sliding = {**LLAMA_8B, "model_type": "mistral", "sliding_window": 4096}
    assert shape_of(sliding).windowed_layers == 32
    some = {**QWEN3_30B, "sliding_window": 4096, "use_sliding_window": True}
    assert shape_of({**some, "max_window_layers": 28}).windowed_layers == 20
    assert shape_of(some).windowed_layers == shape_of(some).window == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba': is not known here; known: deepseek_v2"),
        ({"hidden_size": None}, "hidden_size = None: a whole number from 1 on is wanted"),
        ({"num_experts": True}, "num_experts = True: a whole number"),
        ({"num_experts": 0}, "num_experts = 0: a whole number"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok = 200: is more than the 128 experts"),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5: does not divide 32"),
        ({"layer_types": ["full_attention"]}, "layer_types = ['full_attention']: has 1 entries"),
        ({"layer_types": ["linear_attention"] * 48}, "linear_attention: their state is not"),
        ({"torch_dtype": "int8"}, "torch_dtype = 'int8': known: bfloat16"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': true or false"),
        ({"mlp_only_layers": 3}, "mlp_only_layers = 3: a list is wanted"),
        ({"quantization_config": {"quant_method": "awq"}}, "its quant_method is not known here"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weight_block_size = [128]: two whole numbers",
        ),
    ],
)
def test_what_cannot_be_read_is_named(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=r"^config.json: ") as caught:
        shape_of({**QWEN3_30B, **changed})
    assert said in str(caught.value)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_shape(tmp_path)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="is not an object"):
        read_shape(tmp_path)
    file.write_text(json.dumps(MIXTRAL))
    assert read_shape(tmp_path) == read_shape(file) == shape_of(MIXTRAL)
