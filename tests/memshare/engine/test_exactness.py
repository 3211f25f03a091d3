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
    with start_engine(model, CHECKED, **options(ranks)) as engine:
        outputs = copies(engine)
        totals = engine.totals
        assert engine.is_clean()
        assert outputs == expected
        assert totals["applied"] >= COPIES
        assert totals["blocks_reclaimed"] >= COPIES
        assert totals["integrity_checks:failed"] == 0

    if ranks == 1:  # in a process of its own, by the code that people with GPUs run
        asked = exactness.ExactnessEngine(model, DTYPE, 1, True, False)
        wrong = exactness.ask(asked, IDENTICAL_ONLY, forget=True)
        assert wrong.applied >= COPIES
        assert wrong.outputs != [list(output) for output in expected], "a wrong table is not seen"


def copies(engine: Engine) -> list[tuple[int, ...]]:
    """Outputs of the ten copies; the others' blocks must never get into them."""
    return engine.generate([PROMPT] * COPIES + OTHERS, TOKENS)[:COPIES]
