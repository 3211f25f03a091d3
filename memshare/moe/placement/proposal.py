"""Every way to divide a model over the GPUs of a machine, and which one to take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memshare.moe.placement.parallelism import Parallelism, refusals
from memshare.moe.placement.ranks import Placement, RankShare, place
from memshare.moe.placement.shape import ModelShape
from memshare.moe.placement.traffic import traffic_of

NEARLY_BEST = 0.95
"""Of the most ``tokens_s``: candidates that reach it count as equally good."""


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs, by their vendor's numbers.

    Attributes:
        gpus: how many.
        gpu_bytes: memory of one.
        per_node: that the fast link joins; tensor parallelism does not go beyond.
        utilization: vLLM's ``gpu_memory_utilization``.
        reserve_bytes: of one, for activations and CUDA graphs.
        memory_bytes_s: that one reads from its memory in a second.
        link_bytes_s: that one sends to others of its node in a second.
        network_bytes_s: the same to other nodes.
    """

    gpus: int
    gpu_bytes: int
    per_node: int
    utilization: float
    reserve_bytes: int
    memory_bytes_s: float
    link_bytes_s: float
    network_bytes_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served.

    Attributes:
        context: tokens of a request at its end.
        max_num_seqs: requests of one replica in a step, if as many fit.
        kv_number_bytes: bytes of a number in the KV cache.
    """

    context: int
    max_num_seqs: int
    kv_number_bytes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to divide the model, that fits.

    Attributes:
        copies: of the whole, which share nothing.
        parallelism: of one copy.
        weight_bytes: of the fullest rank.
        requests: that all GPUs hold at once, each with its whole context.
        step_s: seconds that a decode step takes at least, of as many requests as may run.
        tokens_s: tokens that all GPUs write in a second at most.
    """

    copies: int
    parallelism: Parallelism
    weight_bytes: int
    requests: int
    step_s: float
    tokens_s: float


def propose(shape: ModelShape, machine: Machine, load: Load) -> list[Candidate]:
    """All ways that fit and hold one request, the proposed one first.

    It is the one with the most ``tokens_s``; of nearly equal ones, one whose ranks hold experts
    whole: their matrices are larger, and an all-to-all can be switched on.

    The bound counts what a rank reads from its memory (weights of the experts that a step of
    equally likely experts touches, all other weights, the KV of all its requests at their end) and
    what it sends, one after the other. It counts no arithmetic, no launches and no waiting, so that
    it ranks divisions and predicts none.
    """
    found = [
        candidate
        for parallelism in _parallelisms(shape, machine)
        if (candidate := _candidate(shape, machine, load, parallelism)) is not None
    ]
    best = max((candidate.tokens_s for candidate in found), default=0.0)

    def order(candidate: Candidate) -> tuple[bool, float]:
        is_whole = candidate.parallelism.enable_expert_parallel
        nearly_best = candidate.tokens_s >= NEARLY_BEST * best
        return not (is_whole and nearly_best), -candidate.tokens_s

    return sorted(found, key=order)


def least_weight_bytes(shape: ModelShape, machine: Machine) -> int:
    """Weights of the fullest rank where the model is divided most; 0 if it cannot be divided."""
    return min(
        (
            max(rank.all_weight_bytes for rank in place(shape, parallelism).ranks)
            for parallelism in _parallelisms(shape, machine)
        ),
        default=0,
    )


def touched(count: int, chosen: int, tokens: int) -> float:
    """Fraction of ``count`` equally likely experts that ``tokens`` touch, ``chosen`` each."""
    return 1.0 - (1.0 - chosen / count) ** tokens


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _parallelisms(shape: ModelShape, machine: Machine) -> Iterator[Parallelism]:
    """Those whose ranks divide the GPUs, and that nothing is against."""
    for ranks in _divisors(machine.gpus):
        for size in _divisors(ranks):
            if size > machine.per_node:
                continue
            for by_expert in (False, True):
                for context in _divisors(size):
                    parallelism = Parallelism(
                        tensor_parallel_size=size,
                        data_parallel_size=ranks // size,
                        enable_expert_parallel=by_expert,
                        decode_context_parallel_size=context,
                    )
                    if not any(refusals(shape, parallelism)):
                        yield parallelism


def _candidate(
    shape: ModelShape, machine: Machine, load: Load, parallelism: Parallelism
) -> Candidate | None:
    placement = place(shape, parallelism, load.kv_number_bytes)
    available = machine.gpu_bytes * machine.utilization - machine.reserve_bytes
    held = min(
        int(available - rank.all_weight_bytes) // rank.request_bytes(shape, load.context)
        for rank in placement.ranks
    )
    if held < 1:
        return None
    running = min(held, load.max_num_seqs)
    copies = machine.gpus // parallelism.ranks
    step = _step_seconds(placement, machine, load, running)
    return Candidate(
        copies=copies,
        parallelism=parallelism,
        weight_bytes=max(rank.all_weight_bytes for rank in placement.ranks),
        requests=held * parallelism.data_parallel_size * copies,
        step_s=step,
        tokens_s=running * parallelism.data_parallel_size * copies / step,
    )


def _step_seconds(placement: Placement, machine: Machine, load: Load, running: int) -> float:
    parallelism = placement.parallelism
    traffic = traffic_of(placement.shape, parallelism, running)
    between = traffic.dispatch + traffic.combine
    spans_nodes = parallelism.ranks > machine.per_node
    read = max(_read(placement, rank, load, running) for rank in placement.ranks)
    return (
        read / machine.memory_bytes_s
        + (traffic.sent - between) / machine.link_bytes_s
        + between / (machine.network_bytes_s if spans_nodes else machine.link_bytes_s)
    )


def _read(placement: Placement, rank: RankShare, load: Load, running: int) -> float:
    """Bytes that a rank reads in a step."""
    shape = placement.shape
    sizes = rank.weight_bytes
    experts = sizes.get("experts", 0)
    embeddings = sizes["embeddings"] * (0 if shape.tied else 0.5)  # of the input, rows alone
    met = 0.0
    if shape.experts is not None:
        tokens = running * placement.parallelism.data_parallel_size
        met = touched(shape.experts.count, shape.experts.per_token, tokens)
    kept = running * rank.request_bytes(shape, load.context)
    return rank.all_weight_bytes - embeddings - experts * (1.0 - met) + kept
