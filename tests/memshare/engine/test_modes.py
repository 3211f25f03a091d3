"""``off`` and ``observe`` change no token (design: 7), though observe runs both stages."""

from __future__ import annotations

import pytest

from tests.memshare.engine.harness import StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPTS = [
    "What is the capital of France?",
    "Count from one to thirty, one number a line.",
    "Add 3 and 4, then check the result. " * 6,
    "Write a short poem about the sea.",
] * 4  # sixteen requests
SHORT = {
    # Whatever the model writes, steps match, and pairs are compared.
    "policy": {"name": "paper"},
    "steps": {"similarity_threshold": 0.0, "min_tokens": 8, "max_tokens": 32, "max_matches": 4},
    "distance": {"similarity_threshold": 0.0, "max_jobs_per_step": 64},
    "protect": {"recent_tokens": 32},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}


def test_off_and_observe_change_no_token(start_engine: StartEngine, model: str) -> None:
    options = {"num_gpu_blocks_override": 45, "max_model_len": 1024}
    with start_engine(model, None, **options) as dense:
        expected = dense.generate(PROMPTS, 96)
        preemptions = dense.metric("vllm:num_preemptions")
    assert preemptions > 0, "the memory must be short, or nothing could go wrong"

    with start_engine(model, {"mode": "off"}, **options) as off:
        assert off.generate(PROMPTS, 96) == expected
        assert off.side is None
        assert off.core.model_executor.driver_worker.worker._memshare is None

    with start_engine(model, SHORT | {"mode": "observe"}, **options) as observe:
        assert observe.generate(PROMPTS, 96) == expected
        totals = observe.totals
        assert totals["steps"] > 0
        assert totals["compared"] > 0
        assert totals["verified"] > 0
        assert totals["applied"] == 0
        assert observe.metric("vllm:num_preemptions") == preemptions
        assert observe.is_clean()
