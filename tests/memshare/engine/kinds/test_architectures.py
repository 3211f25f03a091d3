"""Sharing identical blocks changes no token of models other than Llama, nor on an fp8 KV cache.

Each case is seen to fail when no worker is told of the scheduler's remaps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memshare.lab.bench.exactness import COPIES, IDENTICAL_ONLY, OTHERS, PROMPT, tell_of_no_remap
from tests.machine import DTYPE
from tests.memshare.engine.harness import StartEngine, write_tiny_model
from tests.memshare.engine.test_exactness import CHECKED, TOKENS, assert_exact, copies

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

OPTIONS: dict[str, Any] = {"num_gpu_blocks_override": 50, "max_model_len": 1024}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None,
    },
}  # fmt: skip
KINDS = [
    pytest.param("qwen3", "auto", id="qwen3"),
    pytest.param("qwen3", "fp8", id="qwen3-fp8", marks=pytest.mark.complete),
    pytest.param("qwen2", "auto", id="qwen2", marks=pytest.mark.complete),
    pytest.param("mistral", "auto", id="mistral", marks=pytest.mark.complete),
]


# At these scales attention is sharp, and weighs as much as the token itself.
GAINS = {"q_proj": 2.0, "k_proj": 2.0, "v_proj": 1.5, "o_proj": 1.5, "lm_head": 3.0}


def write_weights(folder: Path, architecture: str, seed: int) -> str:
    """A tiny model whose outputs depend on every block; the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tiny_model(folder, tie_word_embeddings=False, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.to(torch.float32).named_parameters():
        if weight.dim() < 2:
            continue  # norms and biases
        gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
        if "embed" not in name:
            gain *= weight.shape[1] ** -0.5
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * gain)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.proves("full attention")
@pytest.mark.proves("cache fp8", case="fp8")
@pytest.mark.parametrize(("architecture", "cache"), KINDS)
def test_identical_blocks_share_exactly(
    architecture: str,
    cache: str,
    tmp_path: Path,
    start_engine: StartEngine,
) -> None:
    # Some weights on fp8 write a text of three tokens, again and again, whatever they read.
    model = write_weights(tmp_path, architecture, seed=1 if cache == "fp8" else 0)
    options = OPTIONS | {"dtype": DTYPE, "kv_cache_dtype": cache}
    with start_engine(model, None, **options) as dense:
        expected = copies(dense)
    assert len(set(expected[0])) > 5, "the text says something"
    with start_engine(model, CHECKED, **options) as engine:
        assert_exact(engine, expected)
    # The control: workers that are told of no remap read blocks that others have overwritten.
    with start_engine(model, IDENTICAL_ONLY, **options) as engine:
        tell_of_no_remap(engine.worker_side)
        assert copies(engine) != expected
        assert engine.totals["applied"] >= COPIES


@pytest.mark.complete
@pytest.mark.parametrize(
    "policy", [{"name": "twins", "min_coverage": 0.0}, {"name": "oldest"}, {"name": "random"}],
    ids=lambda policy: policy["name"],
)  # fmt: skip
def test_policies_run_on_an_fp8_cache(
    policy: dict[str, Any], tiny_with_weights: str, start_engine: StartEngine
) -> None:
    """Under pressure, with every check in every step."""
    memshare = {
        "policy": policy,
        "integrity": CHECKED["integrity"],
        "steps": CHECKED["steps"],
        "protect": {"recent_tokens": 32},
        "budget": {"max_shared_fraction": 0.5},
    }
    options = OPTIONS | {"kv_cache_dtype": "fp8", "num_gpu_blocks_override": 40}
    with start_engine(tiny_with_weights, memshare, **options) as engine:
        engine.generate([PROMPT] * 4 + OTHERS, TOKENS)
        assert engine.totals["blocks_reclaimed"] > 0
        assert engine.totals["integrity_checks:failed"] == 0
        assert engine.is_clean()
