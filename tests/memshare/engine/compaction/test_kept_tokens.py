"""``budget.max_kept_tokens``: a request keeps so many tokens, whatever memory there is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from memshare.lab.simulate.harness import SchedulerHarness
from tests.memshare.engine.harness import BLOCK, StartEngine
from tests.memshare.engine.test_state_machine import CHECKED, assert_clean, step

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KEPT, OUTPUT, PLENTY = 192, 400, 400
BUDGETED: dict[str, Any] = CHECKED | {
    "policy": {"name": "compaction", "scorer": "recency"},
    "protect": {"prompt_tokens": 16, "recent_tokens": 32},  # the first tokens and the newest
    "budget": {"max_kept_tokens": KEPT},
}


def rig_of(
    folder: Path, options: dict[str, Any], blocks: int, tokens_per_step: int = 2048
) -> SchedulerHarness:
    return SchedulerHarness(
        folder, options, blocks, max_num_seqs=16, max_num_batched_tokens=tokens_per_step
    )


def run(rig: SchedulerHarness, *, requests: int, prompt: int = 40, **asked: Any) -> int:
    """Run requests to their ends; returns the most blocks that one has held after a step."""
    rng, most = random.Random(0), 0
    for i in range(requests):
        rig.add(f"r{i}", [rng.randrange(250) for _ in range(prompt)], OUTPUT, extra_args=asked)
    while rig.scheduler.requests:
        step(rig)
        for name in list(rig.scheduler.requests):
            table = rig.side.tables.table(name) or ()
            most = max(most, sum(not block.is_null for block in table))
    return most


@pytest.mark.parametrize(("prompt", "chunk"), [(40, 0), (700, 128)])
def test_a_request_keeps_its_tokens_and_no_more(folder: Path, prompt: int, chunk: int) -> None:
    """Memory is plenty. A long prompt is compacted while it is computed, too: what a step computes
    comes on top."""
    rig = rig_of(folder, BUDGETED, PLENTY, chunk or 2048)
    try:
        assert run(rig, requests=8, prompt=prompt) <= (KEPT + chunk) // BLOCK
        totals = rig.side.recorder.counters.totals
        assert totals["compactions"] > 8
        assert totals["preemptions"] == 0
        # Whole rounds: two blocks at a time or more.
        assert totals["blocks_reclaimed"] >= 2 * totals["compactions"]
        assert_clean(rig)
    finally:
        rig.close()


def test_without_the_budget_it_would_keep_everything(folder: Path) -> None:
    """The control: nothing is dropped while memory is plenty."""
    rig = rig_of(folder, BUDGETED | {"budget": {}}, PLENTY)
    try:
        assert run(rig, requests=8) == -(-(40 + OUTPUT) // BLOCK)
        assert rig.side.recorder.counters.totals["compactions"] == 0
    finally:
        rig.close()


@pytest.mark.parametrize(
    ("asked", "most"),
    [
        ({"memshare_max_kept_tokens": 320}, 10),
        ({"memshare_max_kept_tokens": 64}, 6),  # the server's is more
        ({"memshare_max_shared_fraction": 0.0}, 14),  # it loses nothing, so that it keeps all
        ({"memshare": "off"}, 14),
    ],
)
def test_a_request_may_ask_to_keep_more(folder: Path, asked: dict[str, Any], most: int) -> None:
    rig = rig_of(folder, BUDGETED, PLENTY)
    try:
        assert run(rig, requests=2, **asked) == most
        assert_clean(rig)
    finally:
        rig.close()


def test_what_is_protected_stays_whatever_the_budget(folder: Path) -> None:
    options = BUDGETED | {"protect": {"prompt_tokens": "all", "recent_tokens": 32}}
    rig = rig_of(folder, options, PLENTY)
    try:
        # 13 blocks of the prompt, the last one in part, the recent window, and what is written.
        assert 13 < run(rig, requests=2, prompt=400) <= 13 + 4
        assert_clean(rig)
    finally:
        rig.close()


def test_more_requests_run_in_the_same_memory(folder: Path) -> None:
    """Sixteen requests of 14 blocks in a cache of 100: all at once, and none is preempted."""
    budgeted, dense = rig_of(folder, BUDGETED, 101), rig_of(folder, {"mode": "observe"}, 101)
    try:
        run(budgeted, requests=16)
        steps = budgeted.side.recorder.step
        totals = budgeted.side.recorder.counters.totals
        assert totals["preemptions"] == 0
        run(dense, requests=16)
        assert dense.side.recorder.counters.totals["preemptions"] > 0
        assert dense.side.recorder.step >= 1.5 * steps
    finally:
        budgeted.close()
        dense.close()


def test_in_a_real_engine(start_engine: StartEngine, tiny: str) -> None:
    """Beside requests that are compacted, one that opted out writes vLLM's own tokens."""
    from vllm import SamplingParams

    small: dict[str, Any] = {"load_format": "dummy", "num_gpu_blocks_override": 120}
    prompts = [f"Problem {i}: " + "add one to the number, " * 3 for i in range(16)]
    tokens = 320
    with start_engine(tiny, BUDGETED, **small) as engine:
        exact = engine.generate(prompts[:1], tokens, {"memshare": "off"})[0]
        assert engine.totals["compactions"] == 0
        vllm, outputs, most = engine.llm.llm_engine, {}, 0
        for i, prompt in enumerate(prompts):
            asked = {"memshare": "off"} if i == 0 else None
            params = SamplingParams(
                max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=asked
            )
            vllm.add_request(f"r{i}", prompt, params)
        while vllm.has_unfinished_requests():
            outputs |= {done.request_id: done for done in vllm.step() if done.finished}
            for name in engine.scheduler.requests:
                table = engine.side.tables.table(name) or ()
                held = sum(not block.is_null for block in table)
                most = max(most, held) if not name.startswith("r0") else most
        assert most <= KEPT // BLOCK + 1  # one more while a step is in flight
        assert tuple(outputs["r0"].outputs[0].token_ids) == exact
        assert engine.metric("vllm:num_preemptions") == 0
        assert engine.totals["compactions"] > 16
        assert engine.is_clean()
