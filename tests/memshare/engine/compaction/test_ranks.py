"""Compaction on two ranks, under pressure: each chooses and moves the tokens of its own KV heads.

What both compute together is what transformers computes from what both have kept.

The real model, padded so that two ranks divide its heads; the mechanism decides by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.memshare.engine.harness import BLOCK, Engine, StartEngine
from tests.memshare.engine.scripted import Event, RankNotes, Reference, Seen, event, worst

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(900)]

MEMSHARE: dict[str, Any] = {
    "policy": {"name": "compaction", "scorer": "random", "position_weight": 0.0},
    "protect": {"recent_tokens": 32, "prompt_tokens": 64},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}
LOGITS = 2048  # of a row: they travel from process to process
TOKENS = 120

Packings = list[tuple[str, Seen]]


def watch(worker: Any) -> None:
    worker.notes = RankNotes(worker, "compaction", LOGITS)


def take_notes(worker: Any) -> tuple[Any, Any]:
    """What a rank has seen since they were taken last."""
    taken = dict(worker.notes.logits), list(worker.notes.packings)
    worker.notes.logits.clear()
    worker.notes.packings.clear()
    return taken


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, smollm2_tp2: str) -> Iterator[Engine]:
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(2))
    options = {
        "tensor_parallel_size": 2, "num_gpu_blocks_override": 60, "max_model_len": 1024,
        "dtype": "float32", "max_num_batched_tokens": 256,
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


@pytest.fixture(scope="module")
def reference(smollm2_tp2: str) -> Reference:
    return Reference(smollm2_tp2)


@pytest.fixture(scope="module")
def starts(engine: Engine) -> Starts:
    return Starts(engine.side.part)


class Requests:
    """Requests that run in an engine, and what they have written."""

    def __init__(self, engine: Engine) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int | None] = {}
        self._llm: Any = engine.llm.llm_engine
        self._prompts: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int], exact: bool = False) -> None:
        from vllm import SamplingParams

        extra = {"memshare": "off"} if exact else None
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args=extra)
        self._prompts[name] = prompt
        self._llm.add_request(name, {"prompt_token_ids": prompt}, params)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self._llm.has_unfinished_requests() and not until():
            for output in self._llm.step():
                name = output.request_id
                self.tokens[name] = self._prompts[name] + list(output.outputs[0].token_ids)
                self.cached[name] = output.num_cached_tokens


def events_of(first: Packings, second: Packings, starts: list[int], name: str) -> list[Event]:
    """What packings have left of a request, both ranks' heads side by side."""
    assert [request for request, _ in first] == [request for request, _ in second]
    found: list[Event] = []
    for (request, seen), (_, others) in zip(first, second, strict=True):
        if request.split("-")[0] == name:
            start = starts[len(found)]
            halves = [event(rank, start, BLOCK).kept for rank in (seen, others)]
            found.append(Event(start, torch.cat(halves, 1)))
    return found


@pytest.mark.proves("compaction ranks")
def test_two_ranks_compute_what_is_left_in_both(
    engine: Engine, reference: Reference, starts: Starts
) -> None:
    requests = Requests(engine)
    for i in range(5):
        requests.add(f"r{i}", reference.text(900 * i, 330 + 20 * i), exact=i == 0)
    requests.run()
    tokens = requests.tokens
    assert engine.is_clean()
    assert engine.totals["integrity_checks:failed"] == 0
    assert engine.totals["integrity_checks:passed"] > TOKENS, "tables of both ranks"
    assert engine.totals["preemptions"] == 0

    (logits, first), (_, second) = engine.core.model_executor.collective_rpc(take_notes)
    events = {n: events_of(first, second, starts.of.get(n, []), n) for n in tokens}
    compacted = sorted((name for name in tokens if events[name]), key=lambda n: len(events[n]))
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


def test_what_is_preempted_is_dense_again_on_both_ranks(
    engine: Engine, reference: Reference, starts: Starts
) -> None:
    """It is recomputed in chunks; what others find of it in the prefix cache is exact."""
    requests, rpc = Requests(engine), engine.core.model_executor.collective_rpc
    for i in range(5):
        requests.add(f"s{i}", reference.text(900 * i, 330 + 20 * i), exact=i == 0)
    requests.run(until=lambda: len(starts.of.keys() & {"s1", "s2", "s3", "s4"}) >= 2)
    before = max((name for name in starts.of if name[0] == "s"), key=lambda n: len(starts.of[n]))
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    rpc(take_notes)
    since, rounds = len(requests.tokens[before]), len(starts.of[before])
    requests.run()
    tokens = requests.tokens
    (logits, first), (_, second) = rpc(take_notes)
    again = events_of(first, second, starts.of[before][rounds:], before)
    noise = worst(logits, "s0", reference.logits(tokens["s0"], []))
    assert noise < 2e-4
    assert worst(logits, before, reference.logits(tokens[before], again), since) <= 1.5 * noise

    for name in ("s0", before):
        requests.add(f"{name}again", tokens[name][:-TOKENS], exact=True)
    requests.run()
    (logits, _), _ = rpc(take_notes)
    for name in ("s0", before):
        assert requests.cached[f"{name}again"], "the prefix cache had some of it"
        exact = reference.logits(tokens[f"{name}again"], [])
        assert worst(logits, f"{name}again", exact) <= 1.5 * noise
    assert engine.is_clean()
    assert engine.totals["integrity_checks:failed"] == 0
