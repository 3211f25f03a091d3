"""What tests of compaction under memory pressure have in common."""

from __future__ import annotations

from typing import Any

from tests.memshare.engine.harness import Engine

CHECKED: dict[str, Any] = {
    "policy": {"name": "compaction"},
    "protect": {"recent_tokens": 64},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}
SMALL: dict[str, Any] = {"load_format": "dummy", "num_gpu_blocks_override": 80}
PROMPTS = [f"Problem {i}: " + "add one to the number, " * 3 for i in range(16)]
TOKENS = 320
OFF = {"memshare": "off"}


def assert_clean(engine: Engine) -> None:
    assert engine.is_clean()
    assert "integrity_checks:failed" not in engine.totals
    assert engine.totals["integrity_checks:passed"] > 0
    assert list(engine.side.tracker) == []
    assert engine.side.part.holes == {}
    engine.generate(PROMPTS[:1], 1)  # what has ended is told with the next step
    worker = engine.core.model_executor.driver_worker.worker
    assert worker._memshare.parts["compaction"].slots._entries == {}


def finished(engine: Engine, names: dict[str, Any], **params: Any) -> dict[str, Any]:
    """Add requests, run them to their ends, and return their last outputs by name."""
    from vllm import SamplingParams

    vllm, outputs = engine.llm.llm_engine, {}
    for name, prompt in names.items():
        options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        vllm.add_request(name, prompt, SamplingParams(**options | params.get(name, {})))
    while vllm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in vllm.step() if output.finished}
    return outputs
