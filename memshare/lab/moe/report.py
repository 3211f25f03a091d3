"""What a model's experts tell of domains, and what each way to route by them gains, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from memshare.lab.markdown import table_head, table_row
from memshare.lab.moe.affinity import (
    AffinityOutcome,
    AffinitySetup,
    ByWords,
    Fewest,
    Nearest,
    Predictor,
    Rule,
    Vector,
    round_robin,
    simulate,
    two_choices,
)
from memshare.lab.moe.traces import ExpertTrace, distinct_experts, mutual_information, popularity

_BATCHES = (4, 8, 16, 32)
_BUCKETS = 4096
_HEADS = [
    "replicas", "known of a request", "rule", "distinct experts a step", "of round robin",
    "requests, max/mean", "over all time", "p99 requests of a replica",
]  # fmt: skip


def specialisation(
    traces: Sequence[ExpertTrace], experts: int, domains: Sequence[str]
) -> Iterator[str]:
    """Lines: how much a chosen expert tells of its domain, and experts of mixed and pure steps."""
    bits = ", ".join(f"{value:.2f}" for value in mutual_information(traces, experts))
    most = np.log2(len(domains))
    yield f"a choice tells {bits} bits of the domain, by layer; {most:.2f} would be all"
    yield ""
    yield table_head(["tokens of a step", "mixed", *domains, "pure / mixed"])
    for batch in _BATCHES:
        draws = np.random.default_rng(0)
        mixed = distinct_experts(traces, batch, draws).mean()
        pure = [
            distinct_experts([t for t in traces if t.domain == d], batch, draws).mean()
            for d in range(len(domains))
        ]
        cells = [f"{value:.2f}" for value in (mixed, *pure, np.mean(pure) / mixed)]
        yield table_row([str(batch), *cells])


def domain_popularity(traces: Sequence[ExpertTrace], experts: int) -> list[list[list[float]]]:
    """``[domains, layers, experts]``: the probability that a token chooses each."""
    count = 1 + max(trace.domain for trace in traces)
    together = [np.concatenate([t.experts for t in traces if t.domain == d]) for d in range(count)]
    return [popularity(ids, experts).round(5).tolist() for ids in together]


def rules(
    traces: Sequence[ExpertTrace], experts: int, setup: AffinitySetup, seeds: int
) -> Iterator[str]:
    """Lines: what each rule gains with each thing that a router may know."""
    prompt = setup.prompt
    by_domain = [np.array(rows).ravel() for rows in domain_popularity(traces, experts)]
    mean = np.mean(by_domain, axis=0)
    near = Nearest(setup.bound)
    size = len(mean)

    def prompt_experts(trace: ExpertTrace) -> Vector:
        return popularity(trace.experts[:prompt], experts).ravel()

    def own_experts(trace: ExpertTrace) -> Vector:
        return popularity(trace.experts[prompt:], experts).ravel()

    fixed: list[tuple[str, str, Rule, Predictor]] = [
        ("nothing", "round robin", round_robin, lambda trace: mean),
        ("nothing", "emptier of two", two_choices, lambda trace: mean),
        ("its domain", "fewest added", Fewest(setup.bound), lambda trace: by_domain[trace.domain]),
        ("its domain", "most alike", near, lambda trace: by_domain[trace.domain]),
        ("experts of its prompt", "most alike", near, prompt_experts),
        ("experts of its answer", "most alike", near, own_experts),
    ]
    first = 0.0
    for known, name, rule, predict in fixed:
        outcome = _mean(
            simulate(traces, experts, setup, rule, predict, seed=seed) for seed in range(seeds)
        )
        first = first or outcome.distinct
        yield _row(setup, known, name, outcome, first)
    for known, is_words in (("tokens of its prompt", False), ("words of its prompt", True)):
        outcome = _mean(
            _learning(traces, experts, setup, near, ByWords(size, _BUCKETS, is_words), seed)
            for seed in range(seeds)
        )
        yield _row(setup, known, "most alike", outcome, first)


def heads() -> str:
    """The head of the table of :func:`rules`."""
    return table_head(_HEADS)


def _learning(
    traces: Sequence[ExpertTrace],
    experts: int,
    setup: AffinitySetup,
    rule: Rule,
    table: ByWords,
    seed: int,
) -> AffinityOutcome:
    """A router that knows nothing at first, and learns from each request that ends."""
    predict: Predictor = lambda trace: table.expect(trace, setup.prompt)  # noqa: E731
    ended: Callable[[ExpertTrace, Vector], object] = lambda trace, chose: table.learn(  # noqa: E731
        trace, setup.prompt, chose
    )
    return simulate(traces, experts, setup, rule, predict, ended, seed)


def _mean(outcomes: Iterator[AffinityOutcome]) -> AffinityOutcome:
    rows = [(o.distinct, o.skew, o.long_skew, o.most) for o in outcomes]
    return AffinityOutcome(*(float(value) for value in np.mean(rows, axis=0)))


def _row(
    setup: AffinitySetup, known: str, rule: str, outcome: AffinityOutcome, first: float
) -> str:
    return table_row(
        [
            str(setup.replicas), known, rule, f"{outcome.distinct:.2f}",
            f"{outcome.distinct / first:.2f}", f"{outcome.skew:.2f}", f"{outcome.long_skew:.2f}",
            f"{outcome.most:.0f}",
        ]
    )  # fmt: skip
