"""Sessions, proxies and simulated replicas, driven by one queue of events."""

from __future__ import annotations

import heapq
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from random import Random

from cluster.config import RoutingConfig, ScalingConfig
from cluster.evaluator_pool import seat_of
from cluster.routing.choice import Routing
from cluster.routing.load import Load
from cluster.routing.scaling import decide
from cluster.simulation.engine import SimulatedEngine, SimulatedMachine, SimulatedRequest


@dataclass(frozen=True, slots=True)
class ChatWorkload:
    """Chats with a reasoning model. All lengths are in tokens, all times in seconds."""

    sessions: int
    """Chats."""
    duration_s: float = 300.0
    """Within which they start, evenly."""
    turns: float = 3.0
    """Mean requests of one."""
    think_s: float = 20.0
    """Mean time from an answer to the next request."""
    system: int = 500
    """System prompt, the same for all."""
    question: float = 150.0
    """Mean length of what the user adds."""
    documents: float = 0.0
    """Fraction of the chats that are about a document."""
    document: int = 8_000
    """Its length, in the first prompt."""
    output: float = 1200.0
    """Median length of an answer. They are log-normal."""
    spread: float = 0.9
    """Standard deviation of the logarithm of an answer's length."""
    longest: int = 16_384
    """Answers are cut off there."""
    kinds: tuple[float, ...] = (1.0,)
    """Shares of kinds of chats."""
    has_sessions: bool = True
    """Whether clients name sessions."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated."""

    replicas: int
    """At first."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """How requests are routed."""
    scaling: ScalingConfig | None = None
    """How replicas come and go, if they do."""
    machine: SimulatedMachine = field(default_factory=SimulatedMachine)
    """Each replica."""
    proxies: int = 4
    """Each routes on its own, by what it knows itself."""
    start_s: float = 60.0
    """Seconds until a new replica serves."""
    evaluators: int = 0
    """Actors of the evaluator pool."""


@dataclass(slots=True)
class SimulatedOutcome:
    """What happened.

    Attributes:
        requests: that were answered.
        simulated_s: simulated time.
        cpu_s: CPU time that the simulation took.
        decision_s: of it, time within :meth:`cluster.routing.choice.Routing.rank`.
        scaling_s: of it, the longest call of :func:`cluster.routing.scaling.decide`.
        update_s: of it, the longest update of one router to a new set of replicas.
        events: all events.
        latencies: of the requests, from arrival to their last token, by token.
        kv_means: mean used fraction of every replica's KV cache.
        per_replica: requests of each.
        preemptions: of all replicas.
        prefilled: prompt tokens computed.
        prompts: prompt tokens sent.
        returned: turns after a session's first that went where the one before went.
        later_turns: turns after a session's first.
        replicas_over_time: (seconds, serving replicas) after each change.
        per_evaluator: output tokens that each evaluator looked at.
        first_tokens: seconds from each request's arrival to its first token.
        steps: of all replicas.
        distinct: distinct experts of those steps, summed.
    """

    requests: int = 0
    simulated_s: float = 0.0
    cpu_s: float = 0.0
    decision_s: float = 0.0
    scaling_s: float = 0.0
    update_s: float = 0.0
    events: int = 0
    latencies: list[float] = field(default_factory=list)
    kv_means: list[float] = field(default_factory=list)
    per_replica: list[int] = field(default_factory=list)
    preemptions: int = 0
    prefilled: int = 0
    prompts: int = 0
    returned: int = 0
    later_turns: int = 0
    replicas_over_time: list[tuple[float, int]] = field(default_factory=list)
    per_evaluator: list[int] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    steps: float = 0.0
    distinct: float = 0.0

    def first_token(self, quantile: float) -> float:
        """Seconds."""
        ordered = sorted(self.first_tokens)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]

    def latency(self, quantile: float) -> float:
        """Seconds per token."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


def imbalance(values: list[int] | list[float]) -> float:
    """The largest as a multiple of the mean."""
    mean = statistics.fmean(values)
    return max(values) / mean if mean else 1.0


def deviation(values: list[float]) -> float:
    """The standard deviation as a fraction of the mean."""
    mean = statistics.fmean(values)
    return statistics.pstdev(values) / mean if mean else 0.0


@dataclass(slots=True)
class _Session:
    turns_left: int
    history: int  # tokens of all turns so far
    at: str = ""  # replica of the latest turn
    cached_until: float = 0.0  # of that engine's ``allocated``
    kind: int = 0


class _SimulatedReplica:
    def __init__(self, name: str, machine: SimulatedMachine, now: float) -> None:
        self.name = name
        self.engine = SimulatedEngine(machine, now)
        self.born = now
        self.requests = 0
        self.wakes_at = math.inf  # other wake-ups are out of date
        self.reported: Load | None = None
        self.loads: deque[Load] = deque()


class _Proxy:
    """A router and what it knows: as Ray Serve's, it learns a queue's length with each answer."""

    def __init__(self, config: RoutingConfig, random: Random) -> None:
        self.routing = Routing(config, random)
        self.known: dict[str, int] = {}

    def ended(self, replica: str) -> None:
        self.known[replica] = max(0, self.known.get(replica, 0) - 1)


class World:
    """One run. The same seed gives the same events."""

    def __init__(self, cluster: Cluster, workload: ChatWorkload, seed: int = 0) -> None:
        """Nothing runs before :meth:`run`."""
        self._cluster = cluster
        self._workload = workload
        self._random = Random(seed)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0
        self._outcome = SimulatedOutcome(per_evaluator=[0] * cluster.evaluators)
        self._proxies = [
            _Proxy(cluster.routing, Random(seed * 1000 + i)) for i in range(cluster.proxies)
        ]
        self._replicas: list[_SimulatedReplica] = []  # that ever were
        self._serving: dict[str, _SimulatedReplica] = {}
        self._target = cluster.replicas
        self._since: tuple[bool, float] | None = None  # whether up is wanted, since when
        self._sessions: list[_Session] = []
        self._open = workload.sessions

    def run(self) -> SimulatedOutcome:
        """Run until every session is over."""
        began = time.thread_time()
        # First, so that the same seed makes the same sessions for every cluster.
        for number in range(self._workload.sessions):
            self._sessions.append(self._new_session())
            start = self._random.uniform(0.0, self._workload.duration_s)
            self._at(start, partial(self._turn, number))
        self._add_replicas(self._cluster.replicas)
        if self._cluster.scaling:
            self._at(0.0, self._scale)
        while self._open:
            self._now, _, event = heapq.heappop(self._events)
            self._outcome.events += 1
            event()
        return self._finished(time.thread_time() - began)

    # ---- sessions ----

    def _new_session(self) -> _Session:
        goes_on = 1.0 - 1.0 / self._workload.turns
        turns = 1
        while self._random.random() < goes_on:
            turns += 1
        work = self._workload
        has_document = self._random.random() < work.documents
        kind = 0
        if len(work.kinds) > 1:
            (kind,) = self._random.choices(range(len(work.kinds)), work.kinds)
        return _Session(turns, work.system + has_document * work.document, kind=kind)

    def _turn(self, number: int) -> None:
        work, random, outcome = self._workload, self._random, self._outcome
        session = self._sessions[number]
        if session.history > self._cluster.machine.kv_tokens // 2:
            session.history = work.system  # too long to go on: the chat begins anew
        prompt = session.history + 1 + int(random.expovariate(1.0 / work.question))
        output = int(random.lognormvariate(math.log(work.output), work.spread))
        output = min(max(output, 1), work.longest, self._cluster.machine.kv_tokens - prompt - 1)
        proxy_number = random.randrange(len(self._proxies))
        name = f"session-{number}" if work.has_sessions else ""
        replica = self._route(self._proxies[proxy_number], name, f"kind-{session.kind}")
        cached = work.system
        if session.at:
            outcome.later_turns += 1
            if replica.name == session.at:
                outcome.returned += 1
                if replica.engine.allocated <= session.cached_until:
                    cached = session.history
        outcome.prompts += prompt
        if outcome.per_evaluator:
            seat = seat_of(
                f"{replica.name}/{number}/{session.turns_left}", len(outcome.per_evaluator)
            )
            outcome.per_evaluator[seat] += output
        session.at = replica.name
        session.history = prompt + output
        session.turns_left -= 1
        replica.requests += 1
        replica.engine.add_request(
            SimulatedRequest(
                number, prompt, cached, output, self._now, proxy=proxy_number, kind=session.kind
            ),
            self._now,
        )
        self._wake(replica)

    def _route(self, proxy: _Proxy, session: str, kind: str) -> _SimulatedReplica:
        began = time.thread_time()
        best = proxy.routing.rank(session, proxy.known.get, kind)[0]
        self._outcome.decision_s += time.thread_time() - began
        # Of equally good ones Ray Serve takes that with the shorter queue.
        name = min(best, key=lambda name: proxy.known.get(name, 0))
        replica = self._serving[name]
        proxy.known[name] = replica.engine.ongoing + 1
        return replica

    def _ended(self, replica: _SimulatedReplica, request: SimulatedRequest) -> None:
        self._proxies[request.proxy].ended(replica.name)
        self._outcome.requests += 1
        self._outcome.latencies.append((self._now - request.arrived) / request.output)
        self._outcome.first_tokens.append(request.began - request.arrived)
        session = self._sessions[request.session]
        session.cached_until = replica.engine.forgets_at
        if session.turns_left:
            pause = self._random.expovariate(1.0 / self._workload.think_s)
            self._at(self._now + pause, partial(self._turn, request.session))
        else:
            self._open -= 1

    # ---- replicas ----

    def _add_replicas(self, count: int) -> None:
        for _ in range(count):
            replica = _SimulatedReplica(
                f"replica-{len(self._replicas)}", self._cluster.machine, self._now
            )
            self._replicas.append(replica)
            self._serving[replica.name] = replica
            first = self._random.uniform(0.0, self._cluster.routing.report_period_s)
            self._at(self._now + first, partial(self._report, replica))
        self._changed()

    def _remove_replicas(self, count: int) -> None:
        for name in list(self._serving)[-count:]:
            del self._serving[name]  # what runs there ends there
        self._changed()

    def _changed(self) -> None:
        for proxy in self._proxies:
            began = time.thread_time()
            proxy.routing.set_replicas(self._serving)
            self._outcome.update_s = max(self._outcome.update_s, time.thread_time() - began)
        self._outcome.replicas_over_time.append((self._now, len(self._serving)))

    def _report(self, replica: _SimulatedReplica) -> None:
        if replica.name not in self._serving:
            return
        load = replica.engine.load(self._now)
        if load != replica.reported:  # Ray Serve sends proxies what has changed
            replica.reported = load
            for proxy in self._proxies:
                proxy.routing.report(replica.name, load)
        self._at(self._now + self._cluster.routing.report_period_s, partial(self._report, replica))

    def _wake(self, replica: _SimulatedReplica) -> None:
        due = replica.engine.next_event()
        if due is None or due == replica.wakes_at:
            return
        replica.wakes_at = due
        self._at(due, partial(self._step, replica, due))

    def _step(self, replica: _SimulatedReplica, due: float) -> None:
        if due != replica.wakes_at:
            return
        replica.wakes_at = math.inf
        for request in replica.engine.step(self._now):
            self._ended(replica, request)
        self._wake(replica)

    # ---- scaling ----

    def _scale(self) -> None:
        """As Ray Serve does: loads averaged over a while, wishes carried out once they last."""
        scaling = self._cluster.scaling
        assert scaling is not None
        for replica in self._serving.values():
            replica.loads.append(replica.engine.load(self._now))
            while len(replica.loads) * scaling.report_period_s > scaling.look_back_s:
                replica.loads.popleft()
        loads = [_mean(replica.loads) for replica in self._serving.values()]
        began = time.thread_time()
        wanted = decide(scaling, loads, len(self._serving)).replicas
        self._outcome.scaling_s = max(self._outcome.scaling_s, time.thread_time() - began)
        self._follow(scaling, wanted)
        self._at(self._now + scaling.report_period_s, self._scale)

    def _follow(self, scaling: ScalingConfig, wanted: int) -> None:
        if wanted == self._target:
            self._since = None
            return
        is_up = wanted > self._target
        if self._since is None or self._since[0] != is_up:
            self._since = (is_up, self._now)
        if self._now - self._since[1] < (scaling.up_delay_s if is_up else scaling.down_delay_s):
            return
        change = wanted - self._target
        self._target, self._since = wanted, None
        if is_up:
            self._at(self._now + self._cluster.start_s, partial(self._add_replicas, change))
        else:
            self._remove_replicas(-change)

    # ---- events ----

    def _at(self, when: float, event: Callable[[], None]) -> None:
        self._scheduled += 1  # ties in the order in which they were made
        heapq.heappush(self._events, (when, self._scheduled, event))

    def _finished(self, cpu_s: float) -> SimulatedOutcome:
        outcome = self._outcome
        outcome.cpu_s = cpu_s
        outcome.simulated_s = self._now
        for replica in self._replicas:
            engine = replica.engine
            outcome.per_replica.append(replica.requests)
            outcome.kv_means.append(engine.used_seconds / max(self._now - replica.born, 1e-9))
            outcome.preemptions += engine.preemptions
            outcome.prefilled += engine.prefilled
            outcome.steps += engine.steps
            outcome.distinct += engine.distinct
        return outcome


def _mean(loads: Collection[Load]) -> Load:
    return Load(*(sum(column) / len(loads) for column in zip(*loads, strict=True)))
