"""Sharing truly identical blocks changes no token; forgetting the workers' edit does (design: 9).

Ten copies of one prompt write the same text, so every block has nine identical twins at the same
position in other requests. With the tenant's scope and a threshold of exactly 1 only those are
shared; the memory is far too small for ten copies without sharing.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from memshare.lab.bench import exactness
from memshare.lab.bench.exactness import COPIES, IDENTICAL_ONLY, OTHERS, PROMPT
from tests.machine import DTYPE
from tests.memshare.engine.harness import Engine, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CHECKED = IDENTICAL_ONLY | {"integrity": {"check_every": 1, "on_failure": "raise"}}
TOKENS = 128


def options(tensor_parallel_size: int = 1) -> dict[str, Any]:
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "num_gpu_blocks_override": 50,
        "max_model_len": 1024,
    }


@pytest.fixture(scope="module")
def expected(model: str, start_engine: StartEngine) -> list[tuple[int, ...]]:
    """What plain vLLM writes."""
    with start_engine(model, None, **options()) as dense:
        return copies(dense)


@pytest.mark.proves("x86", "full attention", "cache auto")
def test_identical_blocks_share_exactly(
    model: str, expected: list[tuple[int, ...]], start_engine: StartEngine
) -> None:
    with start_engine(model, CHECKED, **options()) as engine:
        assert_exact(engine, expected)


def test_blocks_that_no_worker_is_told_of_are_seen(
    model: str, expected: list[tuple[int, ...]]
) -> None:
    """Negative control, in a process of its own, by the code that people with GPUs run."""
    asked = exactness.ExactnessEngine(model, DTYPE, 1, True, False)
    wrong = exactness.ask(asked, IDENTICAL_ONLY, forget=True)
    assert wrong.applied >= COPIES
    assert wrong.outputs != [list(output) for output in expected], "a wrong table is not seen"


@pytest.mark.proves("tensor parallel", "executor mp")
@pytest.mark.complete
def test_two_ranks_share_exactly(
    smollm2_tp2: str, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On one NUMA node vLLM wants to be told which core is whose.
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(2))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    with start_engine(smollm2_tp2, None, **options(2)) as dense:
        expected = copies(dense)
    with start_engine(smollm2_tp2, CHECKED, **options(2)) as engine:
        assert_exact(engine, expected)


def assert_exact(engine: Engine, expected: list[tuple[int, ...]]) -> None:
    outputs = copies(engine)
    totals = engine.totals
    assert engine.is_clean()
    assert outputs == expected
    assert totals["applied"] >= COPIES
    assert totals["blocks_reclaimed"] >= COPIES
    assert totals["integrity_checks:failed"] == 0


def copies(engine: Engine) -> list[tuple[int, ...]]:
    """Outputs of the ten copies; the others' blocks must never get into them."""
    return engine.generate([PROMPT] * COPIES + OTHERS, TOKENS)[:COPIES]
