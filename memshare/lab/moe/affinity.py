"""What it gains to send requests that choose the same experts to the same replica.

A request's experts are unknown before it runs. What a router may know of them is a *predictor*; how
it uses that is a *rule*. Both are simulated on the experts that a model really chose, token by
token: all replicas step together, and each running request takes its next token in each step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from memshare.lab.moe.traces import ExpertTrace, popularity

Vector = npt.NDArray[np.float64]

_CHARACTERS = 3  # of a token, about, with a small vocabulary


@dataclass(frozen=True, slots=True)
class AffinitySetup:
    """What is simulated.

    Attributes:
        replicas: engines.
        running: requests that a replica runs at once, on average.
        prompt: tokens of a trace that are the prompt; the others are written.
        shares: of the domains among the requests.
        steps: of the simulation; those of the first quarter are not counted.
        report: steps from one report of a replica to the next.
        bound: a replica with more than so many times the mean requests gets none by affinity.
    """

    replicas: int
    running: int = 8
    prompt: int = 96
    shares: tuple[float, ...] = (0.5, 0.5)
    steps: int = 4000
    report: int = 100
    bound: float = 1.25


@dataclass(slots=True)
class AffinityOutcome:
    """What happened.

    Attributes:
        distinct: mean distinct experts of a step, over layers and replicas that ran any.
        skew: running requests of the fullest replica as a multiple of the mean, averaged over time.
        long_skew: the same of each replica's mean over time.
        most: the 99th percentile of running requests of a replica.
    """

    distinct: float
    skew: float
    long_skew: float
    most: float


@dataclass(slots=True)
class Running:
    """A request that runs."""

    trace: ExpertTrace
    at: int
    expected: Vector


@dataclass(slots=True)
class View:
    """What a router knows of the replicas.

    Attributes:
        load: ``[replicas]``, requests: as last reported, and what was sent since.
        use: ``[replicas, layers * experts]``, tokens of a step that choose each expert.
    """

    load: Vector
    use: Vector
    turn: int = 0


Rule = Callable[[View, Vector, np.random.Generator], int]
Predictor = Callable[[ExpertTrace], Vector]


def round_robin(view: View, expected: Vector, draws: np.random.Generator) -> int:
    """One after the other."""
    view.turn += 1
    return view.turn % len(view.load)


def two_choices(view: View, expected: Vector, draws: np.random.Generator) -> int:
    """The emptier of two: what the product does without affinity."""
    pair = draws.choice(len(view.load), min(2, len(view.load)), replace=False)
    return int(pair[np.argmin(view.load[pair])])


@dataclass(slots=True)
class Fewest:
    """The replica whose step grows by the fewest experts, of those that are not too full.

    If a replica's step has s tokens for an expert on average, it goes without that expert with
    probability exp(-s); a request that chooses it with probability q adds q exp(-s) experts.
    """

    bound: float
    among: int = 4

    def __call__(self, view: View, expected: Vector, draws: np.random.Generator) -> int:
        count = len(view.load)
        some = draws.choice(count, min(self.among, count), replace=False)
        limit = self.bound * (view.load.mean() + 1 / count)
        free = some[view.load[some] < max(limit, view.load[some].min() + 1)]
        added = (expected * np.exp(-view.use[free])).sum(1)
        return int(free[np.argmin(added)])


@dataclass(slots=True)
class Nearest:
    """The replica whose use of experts is most like the request's, of those that are not too full.

    Alike is the cosine of what both have more, or less, of than the mean replica.
    """

    bound: float
    among: int = 4

    def __call__(self, view: View, expected: Vector, draws: np.random.Generator) -> int:
        count = len(view.load)
        some = draws.choice(count, min(self.among, count), replace=False)
        limit = self.bound * view.load.mean()
        free = some[view.load[some] < max(limit, view.load[some].min() + 1)]
        shares = view.use / (view.use.sum(1, keepdims=True) + 1e-9)
        mean = shares.mean(0)
        own = expected / max(expected.sum(), 1e-9) - mean
        theirs = shares[free] - mean
        alike = theirs @ own / (np.linalg.norm(theirs, axis=1) + 1e-9)
        return int(free[np.argmax(alike - 1e-6 * view.load[free])])


@dataclass(slots=True)
class ByWords:
    """Learns online which experts a token's presence in a prompt announces.

    Attributes:
        table: ``[buckets, layers * experts]``, sums of what requests with it chose.
    """

    size: int
    buckets: int
    words: bool
    table: Vector = field(init=False)
    seen: Vector = field(init=False)

    def __post_init__(self) -> None:
        self.table = np.zeros((self.buckets, self.size))
        self.seen = np.zeros(self.buckets)

    def features(self, trace: ExpertTrace, prompt: int) -> npt.NDArray[np.int64]:
        """Buckets of a prompt, each once."""
        if not self.words:
            return np.unique(trace.tokens[:prompt] % self.buckets)
        text = trace.text[: _CHARACTERS * prompt].split()
        hashed = [hashlib.blake2b(word.encode(), digest_size=4).digest() for word in text]
        return np.unique([int.from_bytes(digest) % self.buckets for digest in hashed])

    def learn(self, trace: ExpertTrace, prompt: int, chose: Vector) -> None:
        """A request has ended."""
        found = self.features(trace, prompt)
        self.table[found] += chose
        self.seen[found] += 1

    def expect(self, trace: ExpertTrace, prompt: int) -> Vector:
        """What a new one will choose."""
        found = self.features(trace, prompt)
        rows, seen = self.table[found], self.seen[found, None]
        mean = self.table.sum(0) / max(1.0, self.seen.sum())
        # Those that tell most weigh most: which differ from the mean, and were often seen.
        guesses = (rows + 2 * mean) / (seen + 2)
        weight = np.abs(guesses - mean).sum(1, keepdims=True) + 1e-9
        return np.asarray((guesses * weight).sum(0) / weight.sum())


def simulate(
    traces: Sequence[ExpertTrace],
    experts: int,
    setup: AffinitySetup,
    rule: Rule,
    predict: Predictor,
    ended: Callable[[ExpertTrace, Vector], object] = lambda trace, chose: None,
    seed: int = 0,
) -> AffinityOutcome:
    """Run requests of these texts.

    Args:
        traces: to draw requests from.
        experts: of a layer.
        setup: what is simulated.
        rule: chooses a replica.
        predict: tells what a router knows of a request.
        ended: is told of each request that has ended, and what it chose.
        seed: of arrivals and draws. The same for all rules: so are the requests.
    """
    arrivals, draws = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    layers = traces[0].experts.shape[1]
    written = len(traces[0].experts) - setup.prompt
    rate = setup.replicas * setup.running / written
    by_domain = [[t for t in traces if t.domain == d] for d in range(len(setup.shares))]
    running: list[list[Running]] = [[] for _ in range(setup.replicas)]
    view = View(np.zeros(setup.replicas), np.zeros((setup.replicas, layers * experts)))
    lately = np.zeros_like(view.use)
    distinct, skews, loads = [], [], []
    offset = np.arange(layers)[:, None] * experts
    for step in range(setup.steps):
        for _ in range(arrivals.poisson(rate)):
            domain = arrivals.choice(len(setup.shares), p=setup.shares)
            trace = by_domain[domain][arrivals.integers(len(by_domain[domain]))]
            expected = predict(trace)
            chosen = rule(view, expected, draws)
            view.load[chosen] += 1
            view.use[chosen] += expected
            running[chosen].append(Running(trace, setup.prompt, expected))
        is_counted = step >= setup.steps // 4
        for replica, requests in enumerate(running):
            if not requests:
                lately[replica] *= 0.95
                continue
            chosen_now = np.stack([one.trace.experts[one.at] for one in requests]) + offset
            counts = np.bincount(chosen_now.ravel(), minlength=layers * experts)
            lately[replica] += 0.05 * (counts - lately[replica])
            if is_counted:
                distinct.append(np.count_nonzero(counts) / layers)
            for one in requests:
                one.at += 1
                if one.at == len(one.trace.experts):
                    chose = popularity(one.trace.experts[setup.prompt :], experts).ravel()
                    ended(one.trace, chose)
                    view.load[replica] -= 1  # a router hears of each answer's end
                    view.use[replica] = np.maximum(view.use[replica] - one.expected, 0)
            running[replica] = [one for one in requests if one.at < len(one.trace.experts)]
        now = np.array([len(requests) for requests in running], float)
        if step % setup.report == 0:
            view.use[:] = lately
        if is_counted:
            loads.append(now)
            skews.append(now.max() / max(now.mean(), 1e-9))
    over_time = np.array(loads)
    means = over_time.mean(0)
    return AffinityOutcome(
        float(np.mean(distinct)),
        float(np.mean(skews)),
        float(means.max() / means.mean()),
        float(np.quantile(over_time, 0.99)),
    )
