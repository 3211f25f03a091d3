"""Compaction in a real engine under memory pressure, checked at every step (design: 1-5, 7, 10)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.memshare.engine.compaction.rounds import (
    CHECKED,
    OFF,
    PROMPTS,
    SMALL,
    TOKENS,
    assert_clean,
    finished,
)
from tests.memshare.engine.harness import BLOCK, Engine, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def dense(start_engine: StartEngine, tiny: str) -> list[tuple[int, ...]]:
    """What plain vLLM answers, one request at a time: nothing is short, nothing is preempted."""
    with start_engine(tiny, None, **SMALL) as engine:
        return [engine.generate([prompt], TOKENS)[0] for prompt in PROMPTS[:4]]


@pytest.fixture(
    scope="module", params=["recency", pytest.param("random", marks=pytest.mark.complete)]
)
def engine(
    request: pytest.FixtureRequest,
    dense: list[tuple[int, ...]],
    start_engine: StartEngine,
    tiny: str,
) -> Iterator[Engine]:
    """After the plain one has ended: two engines in one process disturb each other."""
    options = CHECKED | {"policy": {"name": "compaction", "scorer": request.param}}
    with start_engine(tiny, options, **SMALL) as engine:
        yield engine


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        assert_clean(request.getfixturevalue("engine"))


def test_under_pressure_requests_are_compacted_and_leave_nothing_behind(engine: Engine) -> None:
    before = engine.totals
    outputs = engine.generate(PROMPTS, TOKENS)
    counted = engine.totals - before
    assert all(len(tokens) == TOKENS for tokens in outputs)
    assert counted["compactions"] > 10
    assert counted["tokens_dropped"] == BLOCK * counted["blocks_reclaimed"] > 0


def test_without_pressure_nothing_is_dropped_and_every_token_is_vllms(
    engine: Engine, dense: list[tuple[int, ...]]
) -> None:
    before = engine.totals["compactions"]
    assert [engine.generate([prompt], TOKENS)[0] for prompt in PROMPTS[:4]] == dense
    assert engine.totals["compactions"] == before


def test_requests_that_must_stay_exact_do_beside_compacted_ones(
    engine: Engine, dense: list[tuple[int, ...]]
) -> None:
    before = engine.totals
    exact = {f"exact-{i}": PROMPTS[i] for i in range(2)}
    crowd = {f"crowd-{i}": prompt for i, prompt in enumerate(PROMPTS[2:])}
    outputs = finished(
        engine,
        exact | crowd,
        **{"exact-0": {"extra_args": OFF}, "exact-1": {"prompt_logprobs": 1}},
    )
    counted = engine.totals - before
    assert counted["compactions"] > 10
    assert counted["opted_out:requested"] == counted["opted_out:prompt_logprobs"] == 1
    for i, name in enumerate(exact):
        assert tuple(outputs[name].outputs[0].token_ids) == dense[i], name


def test_aborts_and_preemptions_in_the_middle(engine: Engine) -> None:
    from vllm import SamplingParams

    vllm, before = engine.llm.llm_engine, engine.totals
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        vllm.add_request(f"abort-{i}", prompt, params)
    steps = preempted = 0
    while vllm.has_unfinished_requests():
        vllm.step()
        steps += 1
        if steps % 60 == 0:
            vllm.abort_request([f"abort-{(steps // 60 * 7) % len(PROMPTS)}"])
        if steps in (150, 300):
            holed = [state for state in engine.side.tracker if state.holes]
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            vllm.step()
            preempted += len(holed)
            assert not any(state.holes for state in holed), "dense again"
    counted = engine.totals - before
    assert counted["compactions"] > 10
    assert preempted > 2


def test_usage_says_what_was_dropped(engine: Engine) -> None:
    before = engine.totals["tokens_dropped"]
    asked = {"extra_args": {"memshare_usage": "on"}}
    names = {f"usage-{i}": prompt for i, prompt in enumerate(PROMPTS)}
    outputs = finished(engine, names, **dict.fromkeys(names, asked))
    usages = [output.kv_transfer_params["memshare"] for output in outputs.values()]
    dropped = sum(usage["tokens_dropped"] for usage in usages)
    assert dropped == engine.totals["tokens_dropped"] - before > 0
    assert all(usage["tokens_dropped"] == BLOCK * usage["blocks_shared"] for usage in usages)


def test_a_request_may_ask_to_lose_less(engine: Engine) -> None:
    least = {"extra_args": {"memshare_max_shared_fraction": 0.1, "memshare_usage": "on"}}
    names = {f"least-{i}": prompt for i, prompt in enumerate(PROMPTS)}
    outputs = finished(engine, names, **{"least-0": least, "least-1": least})
    for name in ("least-0", "least-1"):
        usage = outputs[name].kv_transfer_params["memshare"]
        lives = 1 + usage["preemptions"]
        assert usage["blocks_shared"] <= 0.1 * lives * (TOKENS + 100) / BLOCK


def test_what_is_reported_agrees_with_the_books(engine: Engine) -> None:
    """Gauges, the census of blocks, and vLLM's own metrics."""
    from vllm import SamplingParams

    vllm, seen = engine.llm.llm_engine, 0
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        vllm.add_request(f"report-{i}", prompt, params)
    while vllm.has_unfinished_requests():
        vllm.step()
        holes = sum(len(state.holes) for state in engine.side.tracker)
        assert engine.side.part.gauges() == {"holes": holes}
        seen = max(seen, holes)
    assert seen > 10
    assert engine.metric("vllm:memshare_tokens_dropped") == engine.totals["tokens_dropped"]
    assert engine.metric("vllm:memshare_compactions") == engine.totals["compactions"]
