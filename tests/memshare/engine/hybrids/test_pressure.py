"""Hybrid models under memory pressure: reclaiming, preemptions and aborts leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.memshare.engine.harness import Engine, StartEngine
from tests.memshare.engine.hybrids.test_exactness import CHECKED, KINDS, started

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

POLICIES: dict[str, dict[str, Any]] = {
    "compaction": {"name": "compaction", "scorer": "recency", "min_round": 1},
    "twins": {"name": "twins", "min_coverage": 0.0},
    "oldest": {"name": "oldest"},
}
STAGED = {
    "steps": {"similarity_threshold": 0.0, "min_tokens": 4, "max_tokens": 32},
    "protect": {"recent_tokens": 32},
    "budget": {"max_shared_fraction": 0.5, "max_dropped_fraction": 0.5},
}
PROMPTS = [f"Problem {i}: add one to the number, and one more." for i in range(12)]
TOKENS = 300


def run(engine: Engine, abort_after: int) -> dict[str, int]:
    """Run all requests, of which two are ended from outside after so many steps; tokens of each."""
    from vllm import SamplingParams

    vllm, written, steps = engine.llm.llm_engine, {}, 0
    for number, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        vllm.add_request(str(number), prompt, params)
    while vllm.has_unfinished_requests():
        for output in vllm.step():
            written[output.request_id] = len(output.outputs[0].token_ids)
        steps += 1
        if steps == abort_after:
            vllm.abort_request(["0", "5"])
    return written


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_pressure_preemption_and_abort(
    kind: str, policy: str, start_engine: StartEngine, tmp_path: Path
) -> None:
    blocks = {"gpt_oss": 90, "gemma3": 190, "qwen3_next": 70}[kind]
    options = CHECKED | STAGED | {"policy": POLICIES[policy]}
    with started(start_engine, tmp_path, kind, options, num_gpu_blocks_override=blocks) as engine:
        written = run(engine, abort_after=120)
        totals = engine.totals
        assert totals["applied"] + totals["compactions"] > 0
        assert totals["blocks_reclaimed"] > 0
        assert engine.metric("vllm:num_preemptions") > 0
        assert totals["integrity_checks:passed"] > 100
        assert totals["integrity_checks:failed"] == 0
        assert {name for name, tokens in written.items() if tokens < TOKENS} <= {"0", "5"}
        assert len(written) >= len(PROMPTS) - 2
        assert engine.is_clean()
        assert list(engine.side.tracker) == []
