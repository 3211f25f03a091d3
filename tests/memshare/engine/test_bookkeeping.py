"""Invariants on a real engine under real memory pressure, checked at every step (design: 1-6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from memshare.config import ReportConfig
from memshare.telemetry.stats import Payload
from tests.memshare.engine.harness import Engine, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHECKED = {
    "integrity": {"check_every": 1, "on_failure": "raise"},
    "budget": {"max_shared_fraction": 0.4},  # enough that every test shares something
}
LOOSE = {
    "steps": {"similarity_threshold": 0.0, "min_tokens": 8, "max_tokens": 32, "max_matches": 4},
    "distance": {"similarity_threshold": 0.0, "max_jobs_per_step": 64},
    "protect": {"recent_tokens": 64},
}
POLICIES: dict[str, dict[str, Any]] = {
    "oldest": CHECKED | {"policy": {"name": "oldest"}},
    "random": CHECKED | {"policy": {"name": "random"}},
    "twins": CHECKED | {"policy": {"name": "twins", "min_coverage": 0.0}, "steps": LOOSE["steps"]},
    "paper": CHECKED | LOOSE | {"policy": {"name": "paper"}},
    "paper, newest, eager": CHECKED
    | LOOSE
    | {"policy": {"name": "paper", "survivor": "newest"}, "trigger": {"kind": "eager"}},
    "paper, tenant": CHECKED | LOOSE | {"policy": {"name": "paper"}, "scope": "tenant"},
}
MAKE_TEST = ("oldest", "twins", "paper")  # one of every mechanism; the others take their time later
CASES = [
    pytest.param(name, marks=() if name in MAKE_TEST else pytest.mark.complete) for name in POLICIES
]
PROMPTS = [f"Problem {i}: " + "add one to the number, " * 3 for i in range(16)]


@pytest.fixture(scope="module", params=CASES)
def engine(
    request: pytest.FixtureRequest, start_engine: StartEngine, tiny: str
) -> Iterator[Engine]:
    options = {"load_format": "dummy", "num_gpu_blocks_override": 80}
    with start_engine(tiny, POLICIES[request.param], **options) as engine:
        yield engine


def test_shares_under_pressure_and_leaves_nothing_behind(engine: Engine) -> None:
    outputs = engine.generate(PROMPTS, max_tokens=320)
    totals = engine.totals
    assert all(len(tokens) == 320 for tokens in outputs)
    assert totals["applied"] > 20
    assert totals["blocks_reclaimed"] > 20
    assert totals["integrity_checks:passed"] > 320
    assert "integrity_checks:failed" not in totals
    assert totals["remap_misses"] == 0
    assert engine.is_clean()


def test_what_is_reported_agrees_with_the_books(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, payloads = engine.side, []
    take_stats = side.take_stats

    def keep() -> Payload | None:
        payload = take_stats()
        if payload is not None:
            payloads.append(payload)
            if payload["blocks"]:
                assert payload["blocks"]["free"] == side.tables.free
                assert sum(payload["blocks"].values()) == side.tables.total
                assert min(payload["blocks"].values()) >= 0
                tables = side.tables.block_ids()
                for row in payload["requests"]:
                    assert row["blocks"] == len(tables.get(row["request"], []))
                    assert row["shared"] == len(side.tracker.get(row["request"]).repointed)
        return payload

    monkeypatch.setattr(side, "take_stats", keep)
    monkeypatch.setattr(side._census, "_next", 0.0)
    monkeypatch.setattr("memshare.telemetry.block_census._SHARE_OF_TIME", 0.05)
    monkeypatch.setattr(
        side._census, "_config", ReportConfig.model_validate({"every_s": 0.001, "requests": 4})
    )
    before = engine.totals
    engine.generate(PROMPTS, max_tokens=320)
    counted = engine.totals - before
    assert counted["applied"] > 0
    looks = [payload for payload in payloads if payload["blocks"]]
    remaps = [note for payload in payloads for note in payload["remaps"]]
    assert len(looks) > 20
    assert any(payload["blocks"]["shared"] for payload in looks)
    assert max(len(payload["requests"]) for payload in looks) == 4
    assert looks[-1]["requests"] == [], "the end is reported at once"
    assert looks[-1]["blocks"]["free"] == side.tables.total
    assert len(remaps) == counted["applied"]
    assert all(note.target != note.donor or note.request != note.donor_request for note in remaps)
    assert sum(len(payload["preempted"]) for payload in payloads) == counted["preemptions"]


@pytest.mark.parametrize("engine", ["twins"], indirect=True)
def test_every_token_pair_is_resolved_once(engine: Engine) -> None:
    engine.generate(PROMPTS, max_tokens=200)
    totals, verifier = engine.totals, engine.side.part.stages.verifier
    assert totals["verified"] > 100
    dropped = sum(count for name, count in totals.items() if name.startswith("dropped:"))
    assert totals["compared"] == totals["verified"] + totals["rejected"]
    assert totals["candidates"] == totals["compared"] + dropped + len(verifier) + verifier.running


@pytest.mark.parametrize(
    "engine", [case for case in CASES if "paper" in str(case.values[0])], indirect=True
)
def test_every_pair_is_resolved_once(engine: Engine) -> None:
    part = engine.side.part
    verifier = part.stages.verifier
    engine.generate(PROMPTS, max_tokens=200)
    totals = engine.totals
    assert totals["candidates"] > 0
    dropped = sum(count for name, count in totals.items() if name.startswith("dropped:"))
    # Matches whose requests are gone are dropped before they become candidates.
    dropped -= totals["dropped:unknown_request"]
    held = len(verifier) + verifier.running + len(part)
    assert totals["compared"] == totals["verified"] + totals["rejected"]
    assert totals["candidates"] == totals["rejected"] + totals["applied"] + dropped + held


def test_aborts_in_the_middle(engine: Engine) -> None:
    from vllm import SamplingParams

    vllm = engine.llm.llm_engine
    before = engine.totals["applied"]
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=480, temperature=0, ignore_eos=True)
        vllm.add_request(f"abort-{i}", prompt, params)
    steps = 0
    while vllm.has_unfinished_requests():
        vllm.step()
        steps += 1
        if steps % 40 == 0:
            vllm.abort_request([f"abort-{(steps // 40 * 7) % len(PROMPTS)}"])
        if steps == 500:
            vllm.abort_request([f"abort-{i}" for i in range(len(PROMPTS))])
    assert engine.totals["applied"] > before
    assert "integrity_checks:failed" not in engine.totals
    assert engine.is_clean()
    assert len(list(engine.side.tracker)) == 0
    assert engine.side.part.remapper.shared_entries == 0
    assert len(engine.side.part) == 0


def test_opted_out_requests_stay_exact(engine: Engine) -> None:
    before = engine.totals
    engine.generate(PROMPTS, max_tokens=160, extra_args={"memshare": "off"})
    engine.generate(PROMPTS[:2], max_tokens=8, extra_args={"memshare_blok_threshold": 1})
    after = engine.totals
    assert after["applied"] == before["applied"]
    assert after["opted_out:requested"] == len(PROMPTS)
    assert after["opted_out:invalid_options"] == 2


@pytest.mark.proves("exact requests")
def test_prompt_logprobs_stay_exact(engine: Engine) -> None:
    from vllm import SamplingParams

    engine.llm.generate(PROMPTS[0], SamplingParams(max_tokens=4, prompt_logprobs=1), use_tqdm=False)
    assert engine.totals["opted_out:prompt_logprobs"] == 1


def test_a_check_on_demand_reaches_every_worker(engine: Engine) -> None:
    before = engine.totals["integrity_checks:passed"]
    answers = engine.llm.collective_rpc("check_memshare_integrity")
    engine.generate(PROMPTS[:1], max_tokens=4)
    assert all("requested" in answer for answer in answers)
    assert engine.totals["integrity_checks:passed"] > before


def test_usage_is_what_the_tables_were_seen_to_hold(engine: Engine) -> None:
    from vllm import SamplingParams

    vllm = engine.llm.llm_engine
    tables = engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
    asked = {"memshare_usage": "on"}
    extra: dict[str, dict[str, Any] | None] = {f"usage-{i}": asked for i in range(len(PROMPTS))}
    extra |= {"usage-0": asked | {"memshare": "off"}, "usage-1": None}
    for name, prompt in zip(extra, PROMPTS, strict=True):
        params = SamplingParams(
            max_tokens=320, temperature=0, ignore_eos=True, extra_args=extra[name]
        )
        vllm.add_request(name, prompt, params)
    before = engine.totals["applied"]
    seen: Counter[str] = Counter()
    returned: dict[str, Any] = {}
    while vllm.has_unfinished_requests():
        for output in vllm.step():
            if output.finished:
                returned[output.request_id] = output.kv_transfer_params
        for internal, blocks in tables.items():
            name = internal.rpartition("-")[0]
            seen[name] = max(seen[name], len({block.block_id for block in blocks}))
    assert returned.pop("usage-1") is None, "it has not asked"
    usages = {name: usage["memshare"] for name, usage in returned.items()}
    shared = sum(usage["blocks_shared"] for usage in usages.values())
    assert 0 < shared <= engine.totals["applied"] - before
    assert usages["usage-0"]["blocks_shared"] == 0
    own = engine.side.config.scope == "request"  # else some of a table's blocks are other requests'
    for name, usage in usages.items():
        # Looked at between two steps, when a block of the last one may be gone already.
        assert usage["peak_kv_blocks"] - seen[name] <= 1, name
        assert usage["peak_kv_blocks"] >= seen[name] or not own, name
