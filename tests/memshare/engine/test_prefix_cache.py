"""Approximate KV never enters the prefix cache (design: 5)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.memshare.engine.harness import BLOCK, Engine, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

EAGER = {
    "policy": {"name": "oldest"},
    "trigger": {"kind": "eager"},
    "protect": {"recent_tokens": 64},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}
FIRST_TURN = "List ten fruits, and say one sentence about each of them."
TOKENS = 224


def turn(engine: Engine, prompt: list[int], max_tokens: int) -> tuple[list[int], int]:
    """Generated token ids, and how many prompt tokens came from the prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    [output] = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids), int(output.num_cached_tokens)


@pytest.mark.proves("prefix caching")
def test_a_later_turn_is_served_no_tainted_block(start_engine: StartEngine, model: str) -> None:
    options: dict[str, Any] = {"enable_prefix_caching": True, "num_gpu_blocks_override": 200}
    with start_engine(model, EAGER, **options) as engine:
        prompt = engine.llm.get_tokenizer().encode(FIRST_TURN)
        tainted_from: list[int] = []
        stop_publishing = engine.side.tables.stop_publishing

        def note(request_id: str) -> None:
            tainted_from.append(engine.side.tracker.get(request_id).tainted_from)
            stop_publishing(request_id)

        engine.side.tables.stop_publishing = note
        answer, _ = turn(engine, prompt, TOKENS)
        conversation = prompt + answer + engine.llm.get_tokenizer().encode(" Now sort them.")
        assert engine.totals["applied"] > 0
        assert len(tainted_from) == 1
        second, cached = turn(engine, conversation, 32)

        # Exact blocks are still served, approximate ones are not.
        assert 0 < cached <= tainted_from[0] * BLOCK < len(prompt) + TOKENS - BLOCK

        # Negative control: without the taint, the same conversation is served approximate blocks.
        engine.llm.reset_prefix_cache()
        engine.side.tables.stop_publishing = lambda request_id: None
        engine.side.check_integrity = list
        polluted, _ = turn(engine, prompt, TOKENS)
        assert polluted == answer
        _, cached_wrongly = turn(engine, conversation, 32)
        assert cached_wrongly > tainted_from[0] * BLOCK

    with start_engine(model, None, **options) as dense:
        expected, _ = turn(dense, conversation, 32)
    # The second turn runs under MemShare too, but its prompt is protected and its answer is short.
    assert second == expected
