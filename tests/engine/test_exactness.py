"""Sharing truly identical blocks changes no token; forgetting the workers' edit does (design: 9).

Ten copies of one prompt write the same text, so every block has nine identical twins at the same
position in other requests. With the tenant's scope and a threshold of exactly 1 only those are
shared; the memory is far too small for ten copies without sharing.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.engine.harness import Engine, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPT = (
    "Add the numbers 17, 25, 8, 42 and 13 step by step. Write every step as its own paragraph, "
    "check it, and write the next step."
)
IDENTICAL_ONLY = {
    "policy": {"name": "paper"},
    "scope": "tenant",
    "trigger": {"kind": "eager"},
    "steps": {"similarity_threshold": 1.0, "min_tokens": 8, "max_tokens": 48, "max_matches": 8},
    "distance": {"similarity_threshold": 1.0, "max_jobs_per_step": 64, "layers": "all"},
    "protect": {"recent_tokens": 0},
    "budget": {"max_shared_fraction": 1.0},
    "integrity": {"check_every": 1, "on_failure": "raise"},
    # All at once, so that freed blocks are soon overwritten: the negative control lives on that.
    "admission": {"lookahead_tokens": 0},
}
COPIES, TOKENS = 10, 128
# Others run beside the copies, so that a freed block is soon overwritten with something else.
OTHERS = [f"Tell me a story about {what}." for what in ("a fox", "the sea", "a train", "an owl")]


def models(tensor_parallel_size: int, request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("smollm2" if tensor_parallel_size == 1 else "smollm2_tp2")


def options(tensor_parallel_size: int) -> dict[str, Any]:
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "num_gpu_blocks_override": 50,
        "max_model_len": 1024,
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_identical_blocks_share_exactly(
    ranks: int,
    request: pytest.FixtureRequest,
    start_engine: StartEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models(ranks, request)
    if ranks > 1:  # on one NUMA node vLLM wants to be told which core is whose
        cores = sorted(os.sched_getaffinity(0))
        bind = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    with start_engine(model, None, **options(ranks)) as dense:
        expected = copies(dense)
    with start_engine(model, IDENTICAL_ONLY, **options(ranks)) as engine:
        outputs = copies(engine)
        totals = engine.totals
        assert engine.is_clean()
        assert outputs == expected
        assert totals["applied"] >= COPIES
        assert totals["blocks_reclaimed"] >= COPIES
        assert totals["integrity_checks:failed"] == 0

        if ranks == 1:
            before = engine.totals["applied"]
            wrong = without_the_workers_edit(engine)
            assert engine.totals["applied"] - before >= COPIES
            assert wrong != expected, "the test could not see a wrong table"


def copies(engine: Engine) -> list[tuple[int, ...]]:
    """Outputs of the ten copies; the others' blocks must never get into them."""
    return engine.generate([PROMPT] * COPIES + OTHERS, TOKENS)[:COPIES]


def without_the_workers_edit(engine: Engine) -> list[tuple[int, ...]]:
    """The negative control: the scheduler remaps, but no worker's table is edited."""
    worker = engine.core.model_executor.driver_worker.worker
    before_step = worker._memshare.before_step
    checks = engine.side.config.integrity.__dict__
    worker._memshare.before_step = lambda message: before_step(
        type(message)(batches=message.batches)
    )
    checks["check_every"] = 0  # it would notice at once, and stop the engine
    try:
        return copies(engine)
    finally:
        worker._memshare.before_step = before_step
        checks["check_every"] = 1
