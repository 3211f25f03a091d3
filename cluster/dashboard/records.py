"""What replicas, board and browser say to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.guard.guard import GuardState
from memshare.telemetry.stats import RequestRow


class ReplicaSample(NamedTuple):
    """What one replica did in one interval. A browser gets them as arrays, in this order.

    Attributes:
        time: end of the interval, seconds since the epoch.
        usage: KV blocks in use at that time, 0..1 of all.
        running: requests that hold KV.
        waiting: requests that don't.
        tokens: generated in the interval.
        preempted: preemptions in the interval, of all requests (vLLM's count).
        reclaimed: blocks returned to the free pool by remaps or compaction.
        avoided: preemptions avoided.
        shared: table entries that are re-pointed now, or holes.
        queued: verified pairs in the reclaim queue now.
        lag: longest time from a step to its candidates in the interval, seconds; None if none came.
    """

    time: float
    usage: float
    running: int
    waiting: int
    tokens: int
    preempted: int
    reclaimed: int
    avoided: int
    shared: int
    queued: int
    lag: float | None


class AdapterTokens(NamedTuple):
    """Tokens that requests of an adapter have found in the cache since the engine started.

    Attributes:
        found: and did not compute.
        shared: those of them that another adapter wrote.
    """

    found: int
    shared: int


class ExpertUse(NamedTuple):
    """How the experts of one layer were used since the engine started.

    Attributes:
        steps: that were counted, and in which every request wrote one token.
        touched: distinct experts, summed over those steps.
        tokens: of those steps, each as often as it chose an expert.
        skew: tokens of the busiest expert as a multiple of the mean, lately.
    """

    steps: int
    touched: int
    tokens: int
    skew: float


class Reuse(NamedTuple):
    """A block of a request that was given up, and the block that is read instead.

    ``donor_request`` is None if that is one of the same request.
    """

    target: int
    donor: int
    donor_request: str | None
    time: float


class Thinned(NamedTuple):
    """Blocks ``first`` to before ``end`` of a request, of which compaction has dropped as many
    tokens as fill ``dropped`` blocks. Each layer and KV head has lost others."""

    first: int
    end: int
    dropped: int
    time: float


@dataclass(frozen=True)
class BlockTrace:
    """What became of one request's blocks.

    Attributes:
        request: the engine's id of it.
        live: whether it still runs or waits.
        block_size: token slots in a block.
        prompt_tokens: tokens of its prompt.
        tokens: of prompt and output, so far.
        reused: blocks that were given up since its last preemption.
        preempted: when it was preempted, seconds since the epoch.
        texts: the text of each block; None unless the operator allows it.
        thinned: what compaction has dropped since its last preemption; None if nothing.
    """

    request: str
    live: bool
    block_size: int
    prompt_tokens: int
    tokens: int
    reused: list[Reuse]
    preempted: list[float]
    texts: list[str] | None
    thinned: Thinned | None = None


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica tells the board, once in an interval.

    Attributes:
        replica: Ray Serve's id of it.
        node: the machine.
        started: when its engine was ready, seconds since the epoch.
        blocks: KV blocks in all; 0 if unknown.
        samples: new ones, in order.
        kinds: KV blocks by kind (``memshare.telemetry.metrics.BLOCKS``); empty if not known.
        requests: those with most blocks, as last looked at.
        ended: requests that have ended lately and whose trace can still be asked for.
        adapters: what each has found, where adapters share a cache.
        experts: by layer, where they are counted.
        guard: on quality, where there is one.
    """

    replica: str
    node: str
    started: float
    blocks: int
    samples: list[ReplicaSample]
    kinds: dict[str, int]
    requests: list[RequestRow]
    ended: list[str] = field(default_factory=list)
    adapters: dict[str, AdapterTokens] = field(default_factory=dict)
    experts: dict[str, ExpertUse] = field(default_factory=dict)
    guard: GuardState | None = None


class Wishes(NamedTuple):
    """What the board answers to a report.

    Attributes:
        traces: requests whose traces browsers wait for.
        go_on: whether an operator lets MemShare go on after an alarm of the replica's guard.
    """

    traces: list[str]
    go_on: bool
