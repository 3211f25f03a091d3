"""Compaction in engines of other kinds: compiled, in bfloat16, on an fp8 KV cache, with drafts.

A small model with weights of its own, which starts at once; `test_compaction_exactness.py` has the
cases.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memshare.engine.harness import StartEngine, forget_numba
from tests.memshare.engine.scripted import NAME, Plan, Reference, Watched, registered
from tests.memshare.engine.speculation.drafts import DRAFTS, METHODS, write_draft

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

KINDS: dict[str, dict[str, Any]] = {
    "compiled": {"dtype": "float32", "enforce_eager": False},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "float32", "kv_cache_dtype": "fp8"},
    "n-gram": {
        "dtype": "float32",
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": DRAFTS,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    },
    "draft_model": {"dtype": "float32"},
    "eagle": {"dtype": "float32"},
}
SCALES = (0.04, 0.02)  # of keys and values, as a calibrated checkpoint brings them


@pytest.fixture(scope="module")
def weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with weights large enough for attention to prefer some tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("weights") / "model"
    shutil.copytree(folder, made)
    config = AutoConfig.from_pretrained(made)
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config)
    # What both hold is the same numbers, whatever the engine's type.
    model.to(torch.bfloat16).to(torch.float32).save_pretrained(made)
    return str(made)


@contextmanager
def scaled() -> Iterator[None]:
    """Models that load have these scales, without a checkpoint that was made for it."""
    from vllm.model_executor.layers.attention import attention

    default = attention.set_default_quant_scales

    def scale(layer: Any, register_buffer: bool = False) -> None:
        default(layer, register_buffer)
        layer._k_scale.fill_(SCALES[0])
        layer._v_scale.fill_(SCALES[1])
        layer._k_scale_float, layer._v_scale_float = SCALES

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "set_default_quant_scales", scale)
        yield


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=() if kind == "bfloat16" else pytest.mark.complete)
        for kind in KINDS
    ],
)
def watched(
    request: pytest.FixtureRequest, start_engine: StartEngine, weights: str, tmp_path_factory: Any
) -> Iterator[Any]:
    memshare = {
        "policy": {"name": NAME, "position_weight": 0.0},
        "integrity": {"check_every": 1, "on_failure": "raise"},
    }
    options = {"num_gpu_blocks_override": 80, "max_num_batched_tokens": 128, "max_num_seqs": 4}
    kind = KINDS[request.param]
    if request.param in METHODS:
        folder = tmp_path_factory.mktemp("draft") / request.param
        kind |= {"speculative_config": write_draft(request.param, Path(weights), folder)}
    if request.param == "fp8" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's fp8 KV cache needs a CPU with AVX-512")
    try:
        with registered(), scaled(), start_engine(weights, memshare, **options | kind) as engine:
            part = engine.core.model_executor.driver_worker.worker._memshare.parts[NAME]
            assert part._layouts[0].scales == (SCALES if request.param == "fp8" else (1.0, 1.0))
            yield Watched(engine)
            assert engine.is_clean()
            if "speculative_config" in kind:
                assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0
    finally:
        forget_numba()


def settle(watched: Watched) -> None:
    """Forget logits of drafts behind a text's end, which the model never wrote. Those within were
    computed again."""
    for name, position in list(watched.logits):
        if position >= len(watched.tokens[name]) - 1 - DRAFTS:
            del watched.logits[name, position]


@pytest.mark.proves("compaction compiled", case="compiled")
@pytest.mark.proves("compaction bfloat16", "compaction eager", case="bfloat16")
@pytest.mark.proves("compaction fp8", "cache fp8", case="fp8")
@pytest.mark.proves("ngram", case="n-gram")
@pytest.mark.proves("drafts", case="eagle")
def test_sets_of_its_own_in_each_layer_and_head(watched: Watched, weights: str) -> None:
    reference = Reference(weights)
    watched.add("plain", reference.text(0, 300), 60)
    watched.run()
    settle(watched)
    noise = watched.worst("plain", reference.logits(watched.tokens["plain"], []))
    bound = 1.5 * noise
    # What fp8 cuts off moves this model's logits so far that a wrong cache is just out of bounds.
    apart = 4 if noise < 1 else 1
    watched.add("a", reference.text(300, 400), 60)
    watched.add("b", reference.text(900, 200), 60)
    watched.part.plans = [
        Plan("a", 260, list(range(6)), 3),  # between chunks of its prompt
        Plan("a", 420, [0, 1, 2, 6, 7, 8, 9, 10], 4),
        Plan("b", 210, list(range(1, 6)), 2),
    ]
    watched.run()
    settle(watched)
    assert watched.part.freed == {"a": 7, "b": 3}
    for name in "ab":
        tokens, events = watched.tokens[name], watched.events[name]
        assert watched.worst(name, reference.logits(tokens, events)) <= bound
        start = events[0].start
        for control in ({"swap": True}, {"shift": 1}):
            wrong = reference.logits(tokens, events, **control)  # type: ignore[arg-type]
            assert watched.worst(name, wrong, start) > apart * bound, control
