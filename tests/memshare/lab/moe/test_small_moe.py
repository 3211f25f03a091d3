"""The small mixture of experts, and what routing by experts gains: on made-up choices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memshare.errors import UserError
from memshare.lab.moe import train as training
from memshare.lab.moe.affinity import (
    AffinityOutcome,
    AffinitySetup,
    ByWords,
    Nearest,
    Rule,
    round_robin,
    simulate,
    two_choices,
)
from memshare.lab.moe.report import domain_popularity, specialisation
from memshare.lab.moe.texts import DOMAINS, DomainTexts
from memshare.lab.moe.traces import (
    ExpertTrace,
    distinct_experts,
    mutual_information,
    popularity,
    read_traces,
)

EXPERTS, LAYERS, CHOSEN, PROMPT = 16, 2, 2, 32


def made_up(domains: int, own: int, texts: int = 24) -> list[ExpertTrace]:
    """Texts whose tokens choose among ``own`` experts of their domain's, in every layer."""
    draws = np.random.default_rng(0)
    traces = []
    for domain in range(domains):
        for number in range(texts):
            experts = draws.permuted(np.broadcast_to(np.arange(own), (96, LAYERS, own)), axis=2)[
                :, :, :CHOSEN
            ]
            shifted = (experts + domain * (EXPERTS // domains)) % EXPERTS
            tokens = draws.integers(50, size=96) + 50 * domain
            words = " ".join(f"word{domain}{draws.integers(50)}" for _ in range(80))
            traces.append(
                ExpertTrace(domain, f"{number} {words}", tokens, shifted.astype(np.int16))
            )
    return traces


def run(
    traces: list[ExpertTrace], rule: Rule, table: ByWords | None = None, replicas: int = 4
) -> AffinityOutcome:
    setup = AffinitySetup(replicas, running=12, prompt=PROMPT, steps=1200)
    by_domain = [np.array(rows).ravel() for rows in domain_popularity(traces, EXPERTS)]
    if table is None:
        return simulate(traces, EXPERTS, setup, rule, lambda trace: by_domain[trace.domain])
    return simulate(
        traces, EXPERTS, setup, rule,
        lambda trace: table.expect(trace, PROMPT),
        lambda trace, chose: table.learn(trace, PROMPT, chose),
    )  # fmt: skip


def test_popularity_counts_every_choice() -> None:
    ids = np.array([[[0, 1], [3, 2]], [[0, 2], [3, 1]]], dtype=np.int16)
    assert popularity(ids, 4).tolist() == [[1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 1.0]]


def test_experts_tell_domains_apart_as_far_as_they_are_their_own() -> None:
    apart, alike = made_up(2, own=8), made_up(1, own=16)
    assert mutual_information(apart, EXPERTS) == pytest.approx([1.0, 1.0])
    halves = [
        ExpertTrace(i % 2, trace.text, trace.tokens, trace.experts) for i, trace in enumerate(alike)
    ]
    assert mutual_information(halves, EXPERTS) == pytest.approx([0.0, 0.0], abs=0.01)


def test_a_step_of_one_domain_touches_no_more_than_its_experts() -> None:
    traces = made_up(2, own=8)
    draws = np.random.default_rng(0)
    pure = distinct_experts([t for t in traces if t.domain == 0], 32, draws)
    mixed = distinct_experts(traces, 32, draws)
    assert pure.max() <= 8 < mixed.min() <= 16
    lines = list(specialisation(traces, EXPERTS, ("a", "b")))
    assert "1.00, 1.00 bits" in lines[0]


@pytest.mark.parametrize("replicas", [2, 4])
def test_requests_that_are_alike_meet_and_load_stays_even(replicas: int) -> None:
    traces = made_up(2, own=8)
    blind = run(traces, round_robin, replicas=replicas)
    near = run(traces, Nearest(1.25), replicas=replicas)
    assert near.distinct < 0.85 * blind.distinct
    assert near.skew < 1.35
    assert near.long_skew < 1.2
    same = made_up(1, own=16)
    halves = [ExpertTrace(i % 2, t.text, t.tokens, t.experts) for i, t in enumerate(same)]
    blind = run(halves, two_choices, replicas=replicas)
    near = run(halves, Nearest(1.25), replicas=replicas)
    assert near.distinct > 0.93 * blind.distinct, "negative control: nothing to gain"


@pytest.mark.parametrize("words", [False, True])
def test_a_router_learns_from_prompts_what_they_announce(words: bool) -> None:
    traces = made_up(2, own=8)
    blind = run(traces, round_robin)
    learned = run(traces, Nearest(1.25), ByWords(LAYERS * EXPERTS, 4096, words))
    assert learned.distinct < 0.88 * blind.distinct


# ---- training ----

PLAN = training.MoePlan(
    steps=6, batch=3, length=16, vocabulary=280, hidden=64, layers=2, experts=4, width=32
)


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(domain: str) -> DomainTexts:
        seen = tuple(f"{domain} says {number} and {domain}" * 4 for number in range(40))
        return DomainTexts(domain, seen, tuple(f"{text} again" * 9 for text in seen))

    monkeypatch.setattr(training, "domain_texts", texts)
    monkeypatch.setattr("memshare.lab.moe.traces.domain_texts", texts)


def test_training_goes_on_where_it_stopped(
    few_texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    training.train(PLAN, tmp_path / "one", tmp_path / "whole")
    monkeypatch.setattr(training, "_SAVE_EVERY_S", 0.0)
    done = 0
    batch = training._batch

    def interrupt(*args: object) -> torch.Tensor:
        nonlocal done
        done += 1
        if done == 4:
            raise KeyboardInterrupt
        return batch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.train(PLAN, tmp_path / "two", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    training.train(PLAN, tmp_path / "two", tmp_path / "cut")
    assert done == 4 + 3
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    other = training.MoePlan(**{**vars_of(PLAN), "experts": 8})
    with pytest.raises(UserError, match="begun with other options"):
        training.train(other, tmp_path / "two", tmp_path / "never")
    traces, experts, loss = read_traces(tmp_path / "whole", DOMAINS, 2, 24)
    assert (experts, len(traces)) == (4, 6)
    assert traces[0].experts.shape == (24, 2, 2)
    assert 0 < loss < 8


def vars_of(plan: training.MoePlan) -> dict[str, int]:
    return {name: getattr(plan, name) for name in plan.__slots__}  # type: ignore[attr-defined]


def test_balance_is_one_if_all_experts_are_used_alike() -> None:
    even = torch.eye(4).repeat(8, 1) * 9
    assert training.balance_loss([even, even], chosen=1).item() == pytest.approx(1.0)
    one_sided = torch.zeros(8, 4)
    one_sided[:, 0] = 9
    assert training.balance_loss([one_sided], chosen=1).item() == pytest.approx(4.0, rel=0.01)
