"""A placement for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from memshare.moe.placement.parallelism import Parallelism
from memshare.moe.placement.proposal import Candidate, Load
from memshare.moe.placement.ranks import Placement, RankShare
from memshare.moe.placement.shape import PARTS, GroupedHeads, ModelShape
from memshare.moe.placement.traffic import Traffic, traffic_of

_GIB = 1 << 30
_SHOWN = 16  # ranks, and candidates


def describe(shape: ModelShape) -> str:
    """A model in a line."""
    attention = shape.attention
    if isinstance(attention, GroupedHeads):
        heads = f"{attention.heads} heads, {attention.kv_heads} KV heads of {attention.head_dim}"
    else:
        heads = f"{attention.heads} heads on one latent vector of {attention.cached}"
    if shape.windowed_layers:
        heads += f"; {shape.windowed_layers} layers see {shape.window} tokens"
    if (experts := shape.experts) is None:
        return f"{shape.model_type}: {shape.layers} layers, {heads}; dense"
    return (
        f"{shape.model_type}: {shape.layers} layers, {heads}; {experts.count} experts of width "
        f"{experts.width} in {experts.layers} layers, {experts.per_token} per token"
    )


def title(parallelism: Parallelism) -> str:
    """A division in a few words, with the option names of vLLM's command line."""
    words = [f"--tensor-parallel-size {parallelism.tensor_parallel_size}"]
    if parallelism.data_parallel_size > 1:
        words.append(f"--data-parallel-size {parallelism.data_parallel_size}")
    if parallelism.enable_expert_parallel:
        words.append("--enable-expert-parallel")
    if parallelism.decode_context_parallel_size > 1:
        words.append(f"--decode-context-parallel-size {parallelism.decode_context_parallel_size}")
    return " ".join(words)


def placement_lines(placement: Placement, context: int, tokens: int) -> Iterator[str]:
    """The report for a terminal.

    Args:
        placement: what is shown.
        context: tokens of a request, whose KV is shown.
        tokens: of each replica in a step, whose messages are shown.
    """
    shape = placement.shape
    yield describe(shape)
    yield (
        f"{shape.parameters / 1e9:.2f} billion parameters, {gib(shape.weight_bytes)}; "
        f"a token meets {shape.active_parameters / 1e9:.2f} billion"
    )
    yield ""
    yield f"{len(placement.ranks)} ranks: {title(placement.parallelism)}"
    yield from _aligned(*_rank_rows(placement, context))
    hidden = len(placement.ranks) - _SHOWN
    if hidden > 0:
        yield f"  and {hidden} more; --json lists all"
    yield ""
    yield from _memory_lines(placement, context)
    yield ""
    yield f"sent by a rank in a step of {tokens:,} tokens of each replica"
    yield from _traffic_lines(traffic_of(shape, placement.parallelism, tokens))


def candidate_lines(candidates: Sequence[Candidate], load: Load) -> Iterator[str]:
    """The ways to divide a model, for a terminal; the first is the proposed one."""
    heads = ["", "copies", "held at once", "weights of a rank", "step", "tokens/s", "options"]
    rows = [
        [
            "take" if i == 0 else "", str(one.copies), f"{one.requests:,}",
            gib(one.weight_bytes), f"{1e3 * one.step_s:.1f} ms", f"{one.tokens_s:,.0f}",
            title(one.parallelism),
        ]
        for i, one in enumerate(candidates[:_SHOWN])
    ]  # fmt: skip
    yield (
        f"ways to divide it, for requests of {load.context:,} tokens, of which at most "
        f"{load.max_num_seqs:,} run in a replica"
    )
    yield from _aligned(heads, rows)
    if len(candidates) > _SHOWN:
        yield f"  and {len(candidates) - _SHOWN} more; --json lists all"
    yield "  step and tokens/s are bounds by memory and links alone: they rank, and predict nothing"


def as_object(placement: Placement, context: int, tokens: int) -> dict[str, object]:
    """The same for programs: sizes in bytes, ranges as first and last."""
    traffic = traffic_of(placement.shape, placement.parallelism, tokens)
    return {
        "model": describe(placement.shape),
        "parameters": placement.shape.parameters,
        "active_parameters": placement.shape.active_parameters,
        "weight_bytes": placement.shape.weight_bytes,
        "parallelism": placement.parallelism.model_dump(),
        "kv_copies": placement.kv_copies,
        "ranks": [_rank_object(rank, placement, context) for rank in placement.ranks],
        "traffic": {**asdict(traffic), "sent": traffic.sent, "routed_sent": traffic.routed_sent},
    }


def candidate_object(candidate: Candidate) -> dict[str, object]:
    """One way to divide a model, for programs."""
    found = {name: getattr(candidate, name) for name in candidate.__slots__}
    return {**found, "parallelism": candidate.parallelism.model_dump()}


def gib(size: float) -> str:
    """A size in GiB."""
    return f"{size / _GIB:.2f} GiB"


def _rank_object(rank: RankShare, placement: Placement, context: int) -> dict[str, object]:
    return {
        "rank": rank.rank,
        "replica": rank.replica,
        "heads": _ends(rank.heads),
        "kv_heads": _ends(rank.kv_heads),
        "token_part": rank.tokens,
        "experts": _ends(rank.experts),
        "expert_channels": _ends(rank.slice),
        "weight_bytes": rank.weight_bytes,
        "kv_bytes_per_token": float(rank.kv_bytes),
        "kv_window_bytes_per_token": float(rank.window_bytes),
        "kv_bytes_of_a_request": rank.request_bytes(placement.shape, context),
    }


def _ends(numbers: range) -> list[int]:
    return [numbers[0], numbers[-1]] if numbers else []


def _span(numbers: range) -> str:
    if not numbers:
        return "-"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _rank_rows(placement: Placement, context: int) -> tuple[list[str], list[list[str]]]:
    shape, divided = placement.shape, placement.parallelism.decode_context_parallel_size
    parts = [part for part in PARTS if part in placement.ranks[0].weight_bytes]
    heads = ["rank", "replica", "heads", "KV heads", "tokens"]
    heads += ["experts", "channels"] if shape.experts else []
    heads += [*parts, "KV per token", "of a request"]
    rows = []
    for rank in placement.ranks[:_SHOWN]:
        tokens = "all" if divided == 1 else f"{rank.tokens} of {divided}"
        row = [str(rank.rank), str(rank.replica), _span(rank.heads), _span(rank.kv_heads), tokens]
        row += [_span(rank.experts), _span(rank.slice)] if shape.experts else []
        row += [gib(rank.weight_bytes[part]) for part in parts]
        per_token = f"{float(rank.kv_bytes + rank.window_bytes):,.0f} B"
        rows.append([*row, per_token, gib(rank.request_bytes(shape, context))])
    return heads, rows


def _memory_lines(placement: Placement, context: int) -> Iterator[str]:
    shape, parallelism = placement.shape, placement.parallelism
    times = placement.weight_bytes / shape.weight_bytes
    yield f"weights of all ranks: {gib(placement.weight_bytes)}, {times:.2f} times the model"
    if placement.kv_copies > 1:
        yield (
            f"KV of a token lies on {placement.kv_copies} ranks of its replica: a larger "
            "tensor_parallel_size does not make it smaller"
        )
    else:
        yield "KV of a token lies on its replica's ranks once"
    if shape.windowed_layers:
        yield (
            f"KV per token counts all layers; of the {shape.windowed_layers} windowed ones a "
            f"request of {context:,} tokens keeps {min(context, shape.window):,}"
        )
    if shape.experts and parallelism.enable_expert_parallel:
        most = max(len(rank.experts) for rank in placement.ranks)
        least = min(len(rank.experts) for rank in placement.ranks)
        if most > least:
            yield f"experts do not divide: some ranks hold {most}, others {least}"


_MEANINGS = {
    "attention": "attention, summed over a replica's ranks",
    "context": "queries and results between ranks that divide tokens",
    "dense": "dense MLPs, summed over a replica's ranks",
    "dispatch": "tokens to all ranks with experts",
    "combine": "results of experts, back",
    "experts": "results of experts, to all ranks of a replica",
}


def _traffic_lines(traffic: Traffic) -> Iterator[str]:
    for name, meaning in _MEANINGS.items():
        if size := getattr(traffic, name):
            yield f"  {mib(size):>12}  {meaning}"
    yield f"  {mib(traffic.sent):>12}  in all (allgather_reducescatter)"
    if traffic.routed_sent != traffic.sent:
        routed = traffic.routed_dispatch + traffic.routed_combine
        yield (
            f"  {mib(traffic.routed_sent):>12}  in all, if an all-to-all takes tokens only where "
            f"their experts are ({mib(routed)} for dispatch and combine)"
        )


def mib(size: float) -> str:
    """A size in MiB."""
    return f"{size / (1 << 20):,.2f} MiB"


def _aligned(heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        if heads[-1] == "options":  # words, not numbers
            cells[-1] = row[-1]
        yield "  " + "  ".join(cells)
