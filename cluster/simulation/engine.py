"""One simulated replica: vLLM's batch and KV cache as a fluid, event by event.

All running requests get a token in every step, so that one counter, *depth*, tells how far each of
them is: a request that joined at depth d and has n tokens to write leaves at depth d + n. Nothing
is done for single tokens, and an event costs O(log batch).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from functools import cache

from cluster.routing.load import Load, LoadMeter


@dataclass(frozen=True)
class ExpertMix:
    """How kinds of requests use a mixture of experts.

    Attributes:
        popularity: of each kind, in each layer, the probability that a token chooses each expert.
        step_s: seconds that a step takes for one distinct expert in all layers.
    """

    popularity: tuple[tuple[tuple[float, ...], ...], ...]
    step_s: float = 0.0004

    def distinct(self, running: tuple[int, ...]) -> float:
        """Distinct experts of a step that runs so many requests of each kind: expected, mean over
        layers."""
        return _distinct(self, running)


@cache
def _distinct(mix: ExpertMix, running: tuple[int, ...]) -> float:
    layers = list(zip(*mix.popularity, strict=True))  # each with the kinds' probabilities
    touched = 0.0
    for kinds in layers:
        for chances in zip(*kinds, strict=True):
            untouched = 1.0
            for chance, count in zip(chances, running, strict=True):
                untouched *= (1.0 - chance) ** count
            touched += 1.0 - untouched
    return touched / len(layers)


@dataclass(frozen=True, slots=True)
class SimulatedMachine:
    """What a replica can do."""

    kv_tokens: int = 400_000
    """Token slots of its KV cache."""
    slots: int = 256
    """Requests that run at once, at most."""
    step_s: float = 0.015
    """Seconds of a step of one request."""
    step_per_request_s: float = 0.00005
    """Seconds that each further request adds."""
    prefill_per_s: float = 20_000.0
    """Prompt tokens computed in a second; others stand still meanwhile."""
    experts: ExpertMix | None = None
    """Of a mixture of experts; their time is added to a step's."""


@dataclass(slots=True)
class SimulatedRequest:
    """One request.

    Attributes:
        session: number of the one it belongs to.
        prompt: its tokens.
        cached: those of them that the session's home has computed already.
        output: tokens that it writes.
        arrived: when, seconds.
        written: tokens written before the latest preemption.
        proxy: index of the one that routed it.
        kind: index of its kind.
        began: when its prompt was computed and its first token written, seconds.
    """

    session: int
    prompt: int
    cached: int
    output: int
    arrived: float
    written: int = 0
    proxy: int = 0
    kind: int = 0
    began: float = 0.0


@dataclass(order=True, slots=True)
class _Running:
    ends_at: float  # depth
    number: int  # in the order of admission, which is what vLLM preempts by
    joined_at: float = field(compare=False)
    tokens: int = field(compare=False)  # in the cache when it joined
    request: SimulatedRequest = field(compare=False)
    is_out: bool = field(compare=False, default=False)


class SimulatedEngine:
    """Admits in order of arrival, preempts the latest when the KV cache is full."""

    def __init__(self, machine: SimulatedMachine, now: float) -> None:
        """Start empty at ``now``, seconds."""
        self._machine = machine
        self._time = now
        self._clock = lambda: self._time
        self._meter = LoadMeter(clock=self._clock)
        self._depth = 0.0
        self._stalled_until = now  # prefill
        self._queue: deque[SimulatedRequest] = deque()
        self._by_end: list[_Running] = []
        self._by_admission: list[_Running] = []  # the latest last; some have left already
        self._running = 0
        self._offset = 0.0  # used = offset + running * depth
        self._admitted = 0
        self.preemptions = 0
        self.prefilled = 0
        """Prompt tokens computed, those of preempted requests again."""
        self.used_seconds = 0.0
        """Integral of the used fraction of the KV cache over time."""
        self.allocated = 0.0
        """Tokens that were ever put into the cache."""
        self._by_kind = [0] * (len(machine.experts.popularity) if machine.experts else 1)
        self.steps = 0.0
        """Steps with requests."""
        self.distinct = 0.0
        """Distinct experts of those steps, summed."""

    @property
    def used(self) -> float:
        """Tokens in the KV cache."""
        return self._offset + self._running * self._depth

    @property
    def ongoing(self) -> int:
        """Requests in the engine."""
        return self._running + len(self._queue)

    @property
    def forgets_at(self) -> float:
        """``allocated`` at which what ends now is cached no more: the free blocks, oldest first."""
        return self.allocated + self._machine.kv_tokens - self.used

    def load(self, now: float) -> Load:
        """What the replica reports."""
        self._advance(now)
        self._meter.record(
            used=min(1.0, self.used / self._machine.kv_tokens),
            running=self._running,
            waiting=len(self._queue),
            slots=self._machine.slots,
        )
        load = self._meter.read()
        assert load is not None
        return load

    def add_request(self, request: SimulatedRequest, now: float) -> None:
        """A request arrives. It must fit into an empty cache, or vLLM would refuse it."""
        assert request.prompt + request.output < self._machine.kv_tokens
        self._advance(now)
        self._queue.append(request)
        self._admit()

    def next_event(self) -> float | None:
        """When the next request ends or the cache is full, seconds; None if nothing runs."""
        self._drop_ended()
        if not self._by_end:
            return None
        ahead = self._by_end[0].ends_at - self._depth
        room = (self._machine.kv_tokens - self.used) / self._running
        start = max(self._time, self._stalled_until)
        return start + max(0.0, min(ahead, room)) * self._step_s()

    def step(self, now: float) -> list[SimulatedRequest]:
        """Do what was due at ``now``; returns the requests that ended."""
        self._advance(now)
        ended = []
        self._drop_ended()
        while self._by_end and self._by_end[0].ends_at <= self._depth + 1e-6:
            entry = heapq.heappop(self._by_end)
            self._leave(entry)
            ended.append(entry.request)
            self._drop_ended()
        if not ended and self.used >= self._machine.kv_tokens - self._running - 1e-6:
            self._preempt()
        self._admit()
        return ended

    def _advance(self, now: float) -> None:
        self.used_seconds += (now - self._time) * min(1.0, self.used / self._machine.kv_tokens)
        runs_from = min(max(self._time, self._stalled_until), now)
        if self._running:
            steps = (now - runs_from) / self._step_s()
            self._depth += steps
            self.steps += steps
            self.distinct += steps * self._touched()
            self.allocated += steps * self._running
        self._time = now

    def _step_s(self) -> float:
        machine = self._machine
        step_s = machine.step_s + machine.step_per_request_s * self._running
        return step_s + machine.experts.step_s * self._touched() if machine.experts else step_s

    def _touched(self) -> float:
        experts = self._machine.experts
        return experts.distinct(tuple(self._by_kind)) if experts else 0.0

    def _admit(self) -> None:
        machine = self._machine
        while self._queue and self._running < machine.slots:
            request = self._queue[0]
            tokens = request.prompt + request.written
            # One step's growth of everybody stays free, as vLLM's allocation in that step wants.
            if self._running and self.used + tokens + self._running + 1 > machine.kv_tokens:
                return
            self._queue.popleft()
            self._admitted += 1
            left = request.output - request.written
            entry = _Running(self._depth + left, self._admitted, self._depth, tokens, request)
            heapq.heappush(self._by_end, entry)
            self._by_admission.append(entry)
            self._running += 1
            self._by_kind[request.kind] += 1
            self._offset += tokens - self._depth
            computed = tokens - request.cached
            self.prefilled += computed
            self.allocated += computed
            self._stalled_until = (
                max(self._stalled_until, self._time) + computed / machine.prefill_per_s
            )
            request.began = request.began or self._stalled_until + self._step_s()

    def _preempt(self) -> None:
        """The latest admitted gives up its cache and waits again, before all others."""
        while self._by_admission and self._by_admission[-1].is_out:
            self._by_admission.pop()
        entry = self._by_admission.pop()
        self._leave(entry)
        request = entry.request
        request.written += int(self._depth - entry.joined_at)
        request.cached = 0
        self._queue.appendleft(request)
        self.preemptions += 1
        self._meter.preempted(1)

    def _leave(self, entry: _Running) -> None:
        entry.is_out = True
        self._running -= 1
        self._by_kind[entry.request.kind] -= 1
        self._offset -= entry.tokens - entry.joined_at
        if not self._running:  # nothing of rounding errors stays
            self._by_admission.clear()
            self._by_end.clear()
            self._offset = self._depth = 0.0

    def _drop_ended(self) -> None:
        """Forget preempted requests at the head of the heap."""
        while self._by_end and self._by_end[0].is_out:
            heapq.heappop(self._by_end)
