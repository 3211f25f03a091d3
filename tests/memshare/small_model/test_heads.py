"""Zero-padded attention heads (memshare/small_model/head_padding.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memshare.errors import UserError
from memshare.small_model.head_padding import Heads, ModelShape, pad_heads, padded_heads

pytestmark = pytest.mark.complete  # compares with models of transformers, which load Inductor

SMOLLM2 = ModelShape(
    model_type="llama",
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
)


def save_llama(folder: Path, *, bias: bool = False, shard_size: str = "1GB") -> LlamaForCausalLM:
    """Save a random Llama with 9 query heads, 3 KV heads and 8 channels; return it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        attention_bias=bias,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text("{}")
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens, ``[2, 16, vocabulary]``."""
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("size", "query", "key_value"), [(1, 9, 3), (2, 12, 4), (3, 9, 3), (4, 12, 4), (8, 24, 8)]
)
def test_head_counts(size: int, query: int, key_value: int) -> None:
    assert padded_heads(SMOLLM2, size) == Heads(query, key_value, 64)


def test_fewer_kv_heads_than_ranks_stay_where_vllm_keeps_copies() -> None:
    shape = SMOLLM2.model_copy(update={"num_attention_heads": 16, "num_key_value_heads": 2})

    assert padded_heads(shape, 4) == Heads(16, 2, 64)


@pytest.mark.parametrize(
    ("size", "finding"),
    [(0, "1 or more"), (5, "MLP width 1536"), (-1, "1 or more")],
)
def test_impossible_sizes_are_refused(size: int, finding: str) -> None:
    with pytest.raises(UserError, match=finding):
        padded_heads(SMOLLM2, size)


def test_a_size_that_no_padding_suits_is_refused() -> None:
    shape = SMOLLM2.model_copy(update={"intermediate_size": 1540})

    with pytest.raises(UserError, match="no padding of 9 query and 3 KV heads"):
        padded_heads(shape, 5)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["one-file", "shards"])
def test_logits_do_not_change(tmp_path: Path, bias: bool, shard_size: str) -> None:
    source = tmp_path / "source"
    original = save_llama(source, bias=bias, shard_size=shard_size)

    target = pad_heads(source, tmp_path / "target", 2)

    padded = AutoModelForCausalLM.from_pretrained(target).eval()
    assert (padded.config.num_attention_heads, padded.config.num_key_value_heads) == (12, 4)
    torch.testing.assert_close(logits(padded), logits(original), rtol=0, atol=1e-6)
    assert padded.model.layers[0].self_attn.q_proj.weight.shape == (12 * 8, 72)
    assert (target / "tokenizer.json").read_text() == "{}"


def test_per_head_norms_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
    )
    original = Qwen3ForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "source")

    pad_heads(tmp_path / "source", tmp_path / "target", 2)

    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    assert padded.config.num_key_value_heads == 4
    torch.testing.assert_close(logits(padded), logits(original), rtol=0, atol=1e-6)


def test_a_size_that_divides_copies(tmp_path: Path) -> None:
    save_llama(tmp_path / "source")

    pad_heads(tmp_path / "source", tmp_path / "target", 3)

    before = load_file(tmp_path / "source" / "model.safetensors")
    after = load_file(tmp_path / "target" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def edit_config(folder: Path, **fields: object) -> None:
    """Change fields of a model folder's ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "finding"),
    [
        ({"model_type": "mamba"}, "knows llama, mistral, qwen3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "unquantised weights"),
        ({"num_attention_heads": 18, "num_key_value_heads": 6}, r"has shape \(.*asks for"),
        ({"hidden_size": "wide"}, "does not describe a decoder"),
    ],
)
def test_unsupported_models_are_refused(
    tmp_path: Path, fields: dict[str, object], finding: str
) -> None:
    save_llama(tmp_path / "source")
    edit_config(tmp_path / "source", **fields)

    with pytest.raises(UserError, match=finding):
        pad_heads(tmp_path / "source", tmp_path / "target", 4)
    assert not (tmp_path / "target").exists()


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        pad_heads(tmp_path / "nothing", tmp_path / "target", 2)


def test_an_existing_target_is_kept(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()

    with pytest.raises(UserError, match="exists"):
        pad_heads(tmp_path / "source", tmp_path / "target", 2)
