"""Requests with a ``seed`` on a CPU engine (memshare/engine/vllm_0_32/cpu_worker.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.memshare.engine.harness import Engine, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PART = 64
PROMPT = "Twelve plus thirty is forty-two, and forty-two minus twelve is thirty. " * 4


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, tiny: str) -> Iterator[Engine]:
    """Prefills in parts of 64 tokens; two long requests do not fit beside each other."""
    options = {
        "load_format": "dummy",
        "max_num_batched_tokens": PART,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 40,
    }
    with start_engine(tiny, {"mode": "off"}, **options) as engine:
        yield engine


def sample(engine: Engine, seeds: list[int], tokens: int) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    prompts = [f"{seed} {PROMPT}" for seed in seeds]
    params = [
        SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, seed=seed)
        for seed in seeds
    ]
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def test_a_prompt_in_parts_leaves_its_generator_alone(engine: Engine) -> None:
    engine.scheduler.reset_prefix_cache()
    (in_parts,) = sample(engine, [7], 24)
    hits = engine.metric("vllm:prefix_cache_hits")
    (in_one,) = sample(engine, [7], 24)  # what is left behind the cached prefix
    assert engine.metric("vllm:prefix_cache_hits") - hits >= len(PROMPT) - PART
    assert in_parts == in_one
    assert sample(engine, [7, 8], 24)[0] == in_one, "beside another that is prefilled in parts"


@pytest.mark.proves("sampling")
def test_a_preempted_request_goes_on_with_its_seed(engine: Engine) -> None:
    alone = [sample(engine, [seed], 500)[0] for seed in (1, 2)]
    engine.scheduler.reset_prefix_cache()
    before = engine.metric("vllm:num_preemptions")
    together = sample(engine, [1, 2], 500)
    assert engine.metric("vllm:num_preemptions") > before
    assert together == alone
