"""Compaction under memory pressure in engines that each test starts for itself: vLLM keeps one KV
connector in a process, so no other engine may run there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.memshare.engine.compaction.rounds import (
    CHECKED,
    OFF,
    PROMPTS,
    SMALL,
    TOKENS,
    assert_clean,
    finished,
)
from tests.memshare.engine.harness import BLOCK, StartEngine, forget_numba

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

EAGER = CHECKED | {
    "trigger": {"kind": "eager"},
    "policy": {"name": "compaction", "scorer": "recency", "min_round": 1},
    "protect": {"recent_tokens": 32},
    "budget": {"max_thinning": 0.5},
}


@pytest.fixture(scope="module")
def answer(start_engine: StartEngine, tiny: str) -> tuple[int, ...]:
    """What plain vLLM answers to the first prompt."""
    with start_engine(tiny, None, **SMALL) as engine:
        return engine.generate(PROMPTS[:1], TOKENS)[0]


def test_a_later_turn_is_served_exact_blocks_alone(
    answer: tuple[int, ...], start_engine: StartEngine, tiny: str
) -> None:
    """A whole answer is compacted as soon as it may be; its conversation goes on, exactly."""
    with start_engine(tiny, EAGER, **SMALL | {"num_gpu_blocks_override": 200}) as engine:
        prompt = engine.llm.get_tokenizer().encode(PROMPTS[0])
        turn = {"prompt_token_ids": [*prompt, *answer]}
        finished(engine, {"first": PROMPTS[0]})
        assert engine.totals["compactions"] > 0

        asked = {"extra_args": OFF, "max_tokens": 8}
        later = finished(engine, {"later": turn}, later=asked)["later"]
        # Blocks that hold any of the prompt are found. The first behind them was packed.
        assert later.num_cached_tokens == -(-len(prompt) // BLOCK) * BLOCK
        engine.llm.reset_prefix_cache()
        alone = finished(engine, {"alone": turn}, alone=asked)["alone"]
        assert alone.num_cached_tokens == 0
        assert later.outputs[0].token_ids == alone.outputs[0].token_ids
        assert engine.is_clean()

        # Negative control: packed blocks that stay published are found, and are wrong.
        engine.side.tables.make_writable = lambda request_id, indexes: True
        finished(engine, {"again": PROMPTS[0]})
        wrong = finished(engine, {"wrong": turn}, wrong=asked)["wrong"]
        assert wrong.num_cached_tokens > later.num_cached_tokens


def test_observe_drops_nothing(start_engine: StartEngine, tiny: str) -> None:
    with start_engine(tiny, CHECKED | {"mode": "observe"}, **SMALL) as engine:
        outputs = engine.generate(PROMPTS, TOKENS)
        assert all(len(tokens) == TOKENS for tokens in outputs)
        assert engine.totals["compactions"] == 0
        assert engine.metric("vllm:num_preemptions") > 0, "memory was short"
        assert engine.is_clean()


def test_drafted_tokens(start_engine: StartEngine, tiny: str) -> None:
    options: dict[str, Any] = {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    }  # fmt: skip
    try:
        with start_engine(tiny, CHECKED, **SMALL | options) as engine:
            outputs = engine.generate(PROMPTS, TOKENS)
            assert all(len(tokens) == TOKENS for tokens in outputs)
            assert engine.totals["compactions"] > 10
            assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0
            assert_clean(engine)
    finally:
        forget_numba()
