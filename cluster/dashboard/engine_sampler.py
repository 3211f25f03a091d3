"""What a replica's engine reports with every step, folded into samples and traces."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.dashboard.records import (
    AdapterTokens,
    BlockTrace,
    ExpertUse,
    ReplicaReport,
    ReplicaSample,
    Reuse,
    Thinned,
)
from cluster.guard.guard import GuardState
from cluster.telemetry.step_sample import StepSample
from memshare.telemetry.stats import (
    CompactionNote,
    Payload,
    PreemptionNote,
    RemapNote,
    RequestRow,
)

_ENDED = 32  # requests that have ended and whose trace is kept
_GIVEN_UP = ("shared_entries", "holes")  # gauges, whichever the policy has
_UNSENT = 120  # samples that are kept while the board can't be reached


class LiveRequest(Protocol):
    """A request in the front end."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids of the prompt."""

    @property
    def output(self) -> Sequence[int]:
        """Token ids of the output so far."""


@dataclass
class _Followed:
    """What is known of a request whose blocks were touched."""

    request: LiveRequest
    reused: dict[int, Reuse] = field(default_factory=dict)  # by target
    thinned: Thinned | None = None
    preempted: list[float] = field(default_factory=list)


@dataclass
class _Interval:
    """What adds up until the next sample."""

    tokens: int = 0
    preempted: int = 0
    reclaimed: int = 0
    avoided: int = 0
    lag: float | None = None


class EngineSampler:
    """Folds engine steps. Everything is called on the front end's event loop, and is short."""

    def __init__(
        self,
        replica: str,
        node: str,
        blocks: int,
        block_size: int,
        find: Callable[[str], LiveRequest | None],
        unfinished: Callable[[], int],
        decode: Callable[[Sequence[int]], str] | None,
        clock: Callable[[], float] = time.time,
        guard: Callable[[], GuardState] | None = None,
    ) -> None:
        """Begin with nothing.

        Args:
            replica: Ray Serve's id.
            node: the machine.
            blocks: KV blocks in all; 0 if unknown.
            block_size: token slots in a block.
            find: the live request of an engine's id; None if there is none.
            unfinished: how many requests there are now. An engine that does nothing reports
                nothing, so this tells that its last report is out of date.
            decode: token ids to text, called in another thread; None keeps texts to the replica.
            clock: seconds since the epoch.
            guard: the state of the guard on quality, if there is one.
        """
        self._replica = replica
        self._node = node
        self._blocks = blocks
        self._block_size = block_size
        self._find = find
        self._unfinished = unfinished
        self._decode = decode
        self._clock = clock
        self._guard = guard
        self._started = clock()
        self._last = StepSample(0.0, 0, 0, 0, 0, None)
        self._interval = _Interval()
        self._told_before = 0  # preemptions that MemShare has told, and vLLM has not yet
        self._gauges: dict[str, float] = {}
        self._kinds: dict[str, int] = {}
        self._found: Counter[str] = Counter()  # tokens, by adapter
        self._shared: Counter[str] = Counter()
        self._experts: dict[str, ExpertUse] = {}  # by layer
        self._requests: list[RequestRow] = []
        self._unsent: deque[ReplicaSample] = deque(maxlen=_UNSENT)
        self._followed: dict[str, _Followed] = {}
        self._ended: OrderedDict[str, _Followed] = OrderedDict()

    def record(self, step: StepSample) -> None:
        """Take an engine step's report. Keeps nothing of the payload that vLLM may change later."""
        self._last = step
        interval = self._interval
        interval.tokens += step.tokens
        payload = step.payload
        interval.preempted += self._preemptions(
            step.preempted, payload["counters"].get("preemptions", 0) if payload else 0
        )
        if payload is None:
            return
        interval.reclaimed += payload["counters"].get("blocks_reclaimed", 0)
        interval.avoided += payload["counters"].get("preemptions_avoided", 0)
        if payload["lags"]:
            interval.lag = max(interval.lag or 0.0, *payload["lags"])
        self._gauges.update(payload["gauges"])
        self._found.update(payload["labelled"].get("agent_tokens_found", {}))
        self._shared.update(payload["labelled"].get("agent_tokens_shared", {}))
        self._add_experts(payload)
        if payload["blocks"]:
            self._kinds = dict(payload["blocks"])
            self._requests = list(payload["requests"])
        for preempted in map(PreemptionNote._make, payload["preempted"]):
            followed = self._follow(preempted.request)
            if followed is not None:
                followed.reused.clear()
                followed.thinned = None
                followed.preempted.append(preempted.time)
        for remap in map(RemapNote._make, payload["remaps"]):
            followed = self._follow(remap.request)
            if followed is not None:
                donor = None if remap.donor_request == remap.request else remap.donor_request
                followed.reused[remap.target] = Reuse(remap.target, remap.donor, donor, remap.time)

        for note in map(CompactionNote._make, payload["compactions"]):
            followed = self._follow(note.request)
            if followed is not None:
                followed.thinned = Thinned(note.first, note.end, note.holes, note.time)

    def _add_experts(self, payload: Payload) -> None:
        steps = payload["counters"].get("expert_steps", 0)
        touched = payload["labelled"].get("experts_touched", {})
        tokens = payload["labelled"].get("expert_tokens", {})
        for layer, skew in payload["skews"].items():
            use = self._experts.get(layer, ExpertUse(0, 0, 0, 1.0))
            self._experts[layer] = ExpertUse(
                use.steps + steps,
                use.touched + touched.get(layer, 0),
                use.tokens + tokens.get(layer, 0),
                skew,
            )

    def _preemptions(self, by_vllm: int, by_memshare: int) -> int:
        """New ones. MemShare tells at once, but only of requests that it follows; vLLM of each when
        the request runs again, for which there has to be memory."""
        self._told_before += by_memshare
        again = min(self._told_before, by_vllm)
        self._told_before -= again
        return by_memshare + by_vllm - again

    def sample(self) -> None:
        """End the interval."""
        last, interval, idle = self._last, self._interval, self._unfinished() == 0
        self._interval = _Interval()
        self._retire()
        if idle and self._kinds:
            self._kinds = {**dict.fromkeys(self._kinds, 0), "free": sum(self._kinds.values())}
            self._requests = []
        self._unsent.append(
            ReplicaSample(
                time=round(self._clock(), 2),
                usage=0.0 if idle else round(last.usage, 4),
                running=0 if idle else last.running,
                waiting=0 if idle else last.waiting,
                tokens=interval.tokens,
                preempted=interval.preempted,
                reclaimed=interval.reclaimed,
                avoided=interval.avoided,
                shared=0 if idle else int(sum(self._gauges.get(name, 0) for name in _GIVEN_UP)),
                queued=0 if idle else int(self._gauges.get("queue_length", 0)),
                lag=None if interval.lag is None else round(interval.lag, 4),
            )
        )

    def report(self) -> ReplicaReport:
        """What the board has not been told yet."""
        return ReplicaReport(
            replica=self._replica,
            node=self._node,
            started=self._started,
            blocks=sum(self._kinds.values()) or self._blocks,
            samples=list(self._unsent),
            kinds=self._kinds,
            requests=self._requests,
            ended=list(self._ended),
            adapters={n: AdapterTokens(f, self._shared[n]) for n, f in self._found.items()},
            experts=dict(self._experts),
            guard=self._guard() if self._guard is not None else None,
        )

    def sent(self, report: ReplicaReport) -> None:
        """The board has got it."""
        for sample in report.samples:
            if self._unsent and self._unsent[0] is sample:
                self._unsent.popleft()

    async def trace(self, request: str) -> BlockTrace | None:
        """What became of a request's blocks; None if it is not known."""
        followed = self._followed.get(request) or self._ended.get(request)
        if followed is None:
            found = self._find(request)
            if found is None:
                return None
            followed = _Followed(found)
        prompt = followed.request.prompt
        tokens = [*prompt, *followed.request.output]
        trace = BlockTrace(
            request=request,
            live=self._find(request) is not None,
            block_size=self._block_size,
            prompt_tokens=len(prompt),
            tokens=len(tokens),
            reused=sorted(followed.reused.values()),
            thinned=followed.thinned,
            preempted=list(followed.preempted),
            texts=None,
        )
        if self._decode is None:
            return trace
        # Milliseconds, which tokens of other requests would wait for.
        return replace(trace, texts=await asyncio.to_thread(self._texts, self._decode, tokens))

    def _texts(self, decode: Callable[[Sequence[int]], str], tokens: list[int]) -> list[str]:
        size = self._block_size
        return [decode(tokens[i : i + size]) for i in range(0, len(tokens), size)]

    def _follow(self, request: str) -> _Followed | None:
        followed = self._followed.get(request)
        if followed is None:
            found = self._find(request)
            if found is None:
                return None  # it ended in the same step
            followed = self._followed[request] = _Followed(found)
        return followed

    def _retire(self) -> None:
        """Put aside what has ended, and forget what ended long ago."""
        for request in [name for name in self._followed if self._find(name) is None]:
            self._ended[request] = self._followed.pop(request)
        while len(self._ended) > _ENDED:
            self._ended.popitem(last=False)
