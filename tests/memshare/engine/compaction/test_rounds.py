"""Compaction in a real engine under memory pressure, checked at every step (design: 1-5, 7, 10)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.memshare.engine.harness import BLOCK, Engine, StartEngine, forget_numba

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CHECKED: dict[str, Any] = {
    "policy": {"name": "compaction"},
    "protect": {"recent_tokens": 64},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}
SMALL: dict[str, Any] = {"load_format": "dummy", "num_gpu_blocks_override": 80}
PROMPTS = [f"Problem {i}: " + "add one to the number, " * 3 for i in range(16)]
TOKENS = 320
OFF = {"memshare": "off"}


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


EAGER = CHECKED | {
    "trigger": {"kind": "eager"},
    "policy": {"name": "compaction", "scorer": "recency", "min_round": 1},
    "protect": {"recent_tokens": 32},
    "budget": {"max_thinning": 0.5},
}


def test_a_later_turn_is_served_exact_blocks_alone(
    dense: list[tuple[int, ...]], start_engine: StartEngine, tiny: str
) -> None:
    """A whole answer is compacted as soon as it may be; its conversation goes on, exactly."""
    with start_engine(tiny, EAGER, **SMALL | {"num_gpu_blocks_override": 200}) as engine:
        prompt = engine.llm.get_tokenizer().encode(PROMPTS[0])
        turn = {"prompt_token_ids": [*prompt, *dense[0]]}
        finished(engine, {"first": PROMPTS[0]})
        assert engine.totals["compactions"] > 0

        asked = {"extra_args": OFF, "max_tokens": 8}
        later = finished(engine, {"later": turn}, later=asked)["later"]
        # Blocks that hold any of the prompt are found. The first behind them was packed.
        assert later.num_cached_tokens == -(-len(prompt) // BLOCK) * BLOCK
        engine.llm.reset_prefix_cache()
        alone = finished(engine, {"alone": turn}, alone=asked)["alone"]
        assert alone.num_cached_tokens == 0
        assert later.outputs[0].token_ids == alone.outputs[0].token_ids
        assert engine.is_clean()

        # Negative control: packed blocks that stay published are found, and are wrong.
        engine.side.tables.make_writable = lambda request_id, indexes: True
        finished(engine, {"again": PROMPTS[0]})
        wrong = finished(engine, {"wrong": turn}, wrong=asked)["wrong"]
        assert wrong.num_cached_tokens > later.num_cached_tokens


def test_observe_drops_nothing(start_engine: StartEngine, tiny: str) -> None:
    with start_engine(tiny, CHECKED | {"mode": "observe"}, **SMALL) as engine:
        outputs = engine.generate(PROMPTS, TOKENS)
        assert all(len(tokens) == TOKENS for tokens in outputs)
        assert engine.totals["compactions"] == 0
        assert engine.metric("vllm:num_preemptions") > 0, "memory was short"
        assert engine.is_clean()


def test_drafted_tokens(start_engine: StartEngine, tiny: str) -> None:
    options: dict[str, Any] = {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    }  # fmt: skip
    try:
        with start_engine(tiny, CHECKED, **SMALL | options) as engine:
            outputs = engine.generate(PROMPTS, TOKENS)
            assert all(len(tokens) == TOKENS for tokens in outputs)
            assert engine.totals["compactions"] > 10
            assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0
            assert_clean(engine)
    finally:
        forget_numba()
