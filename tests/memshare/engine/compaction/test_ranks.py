"""Compaction on two ranks, under pressure: each chooses and moves the tokens of its own KV heads.

What both compute together is what transformers computes from what both have kept.

The real model, padded so that two ranks divide its heads; the mechanism decides by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.memshare.engine.harness import BLOCK, Engine, StartEngine
from tests.memshare.engine.scripted import Event, RankNotes, Reference, event, worst

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(900)]

MEMSHARE: dict[str, Any] = {
    "policy": {"name": "compaction", "scorer": "random", "position_weight": 0.0},
    "protect": {"recent_tokens": 32, "prompt_tokens": 64},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}
LOGITS = 2048  # of a row: they travel from process to process
TOKENS = 120


def watch(worker: Any) -> None:
    worker.notes = RankNotes(worker, "compaction", LOGITS)


def notes(worker: Any) -> tuple[Any, Any]:
    return worker.notes.logits, worker.notes.packings


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, smollm2_tp2: str) -> Iterator[Engine]:
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(2))
    options = {
        "tensor_parallel_size": 2, "num_gpu_blocks_override": 60, "max_model_len": 1024,
        "dtype": "float32",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # On one NUMA node vLLM wants to be told which core is whose.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
        with start_engine(smollm2_tp2, MEMSHARE, **options) as engine:
            engine.core.model_executor.collective_rpc(watch)
            yield engine


class Starts:
    """How many tokens of a request were computed when it was compacted, round by round."""

    def __init__(self, part: Any) -> None:
        self.of: dict[str, list[int]] = {}
        compact = part._compact

        def noted(each: Any, cause: Any) -> int:
            request = each.room.state.request
            committed = request.num_computed_tokens - request.num_in_flight_tokens
            freed: int = compact(each, cause)
            if freed:
                self.of.setdefault(request.request_id.split("-")[0], []).append(committed)
            return freed

        part._compact = noted


def test_two_ranks_compute_what_is_left_in_both(engine: Engine, smollm2_tp2: str) -> None:
    from vllm import SamplingParams

    reference, starts, llm = Reference(smollm2_tp2), Starts(engine.side.part), engine.llm.llm_engine
    prompts = {f"r{i}": reference.text(900 * i, 330 + 20 * i) for i in range(5)}
    for name, prompt in prompts.items():
        extra = {"memshare": "off"} if name == "r0" else None
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args=extra)
        llm.add_request(name, {"prompt_token_ids": prompt}, params)
    tokens = {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            name = output.request_id
            tokens[name] = prompts[name] + list(output.outputs[0].token_ids)
    assert engine.is_clean()
    assert engine.totals["integrity_checks:failed"] == 0
    assert engine.totals["integrity_checks:passed"] > TOKENS, "tables of both ranks"
    assert engine.totals["preemptions"] == 0

    (logits, first), (_, second) = engine.core.model_executor.collective_rpc(notes)
    assert [name for name, _ in first] == [name for name, _ in second]
    events: dict[str, list[Event]] = {name: [] for name in prompts}
    for (request, seen), (_, others) in zip(first, second, strict=True):
        name = request.split("-")[0]
        start = starts.of[name][len(events[name])]
        halves = [event(rank, start, BLOCK).kept for rank in (seen, others)]
        events[name].append(Event(start, torch.cat(halves, 1)))
    compacted = sorted((name for name in prompts if events[name]), key=lambda n: len(events[n]))
    assert len(compacted) >= 2, "memory was short"
    assert not events["r0"], "it has opted out"
    name = compacted[-1]
    exact = reference.logits(tokens[name], events[name])
    ours, theirs = events[name][0].kept[0].chunk(2)
    assert not torch.equal(ours, theirs), "ranks keep tokens of their own"
    noise = worst(logits, "r0", reference.logits(tokens["r0"], []))
    assert noise < 2e-4
    assert worst(logits, name, exact) <= 1.5 * noise
    start = events[name][0].start
    for control in ({"swap": True}, {"shift": 1}):
        wrong = reference.logits(tokens[name], events[name], **control)  # type: ignore[arg-type]
        assert worst(logits, name, wrong, start) > 1000 * noise, control
