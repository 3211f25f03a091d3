"""Which rank holds which KV heads, tokens and experts, and the bytes of each."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from memshare.config import ConfigError
from memshare.moe.placement.parallelism import Parallelism, refusals
from memshare.moe.placement.shape import PARTS, LatentHeads, ModelShape, Part, Weight


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank holds.

    Attributes:
        rank: among all, those of a replica one after the other.
        replica: its data-parallel rank.
        heads: query heads, those of the whole model counted from 0.
        kv_heads: KV heads; of latent attention, the one vector that all heads read.
        tokens: its place among the ranks that divide the tokens of those heads: it holds token i
            if ``i // cp_kv_cache_interleave_size % decode_context_parallel_size`` is this.
        experts: that it holds, in every layer that has some.
        slice: channels of each of those experts that it holds, of the expert's width.
        weight_bytes: by part.
        kv_bytes: of a token, in layers that keep all tokens; a mean where tokens are divided.
        window_bytes: of a token, in layers that keep a window.
    """

    rank: int
    replica: int
    heads: range
    kv_heads: range
    tokens: int
    experts: range
    slice: range
    weight_bytes: dict[Part, int]
    kv_bytes: Fraction
    window_bytes: Fraction

    @property
    def all_weight_bytes(self) -> int:
        """Of all parts."""
        return sum(self.weight_bytes.values())

    def request_bytes(self, shape: ModelShape, context: int) -> int:
        """KV bytes of a request of ``context`` tokens, if its replica is this rank's."""
        seen = min(context, shape.window)
        return round(self.kv_bytes * context + self.window_bytes * seen)


@dataclass(frozen=True, slots=True)
class Placement:
    """A model, divided.

    Attributes:
        shape: the model.
        parallelism: how it is divided.
        kv_number_bytes: bytes of a number in the KV cache.
        ranks: what each holds.
    """

    shape: ModelShape
    parallelism: Parallelism
    kv_number_bytes: int
    ranks: tuple[RankShare, ...]

    @property
    def weight_bytes(self) -> int:
        """On all ranks together, copies included."""
        return sum(rank.all_weight_bytes for rank in self.ranks)

    @property
    def kv_copies(self) -> int:
        """Ranks that hold the same KV of a token."""
        ranks = self.parallelism.tensor_parallel_size
        holders = max(1, ranks // self.shape.attention.cached_heads)
        return holders // self.parallelism.decode_context_parallel_size


def place(shape: ModelShape, parallelism: Parallelism, kv_number_bytes: int = 2) -> Placement:
    """Divide a model.

    Args:
        shape: the model.
        parallelism: sizes of the groups.
        kv_number_bytes: bytes of a number in the KV cache.

    Raises:
        ConfigError: it cannot be divided so; a line for each reason.
    """
    if faults := list(refusals(shape, parallelism)):
        raise ConfigError("\n".join(faults))
    shares = [_experts(shape, parallelism, rank) for rank in range(parallelism.ranks)]
    # Ranks differ in how many experts they have, at most.
    sizes = {
        count: _weight_bytes(shape, parallelism, count)
        for count in {len(experts) for experts, _ in shares}
    }
    ranks = tuple(
        _share(shape, parallelism, rank, kv_number_bytes, experts, channels, sizes[len(experts)])
        for rank, (experts, channels) in enumerate(shares)
    )
    return Placement(shape, parallelism, kv_number_bytes, ranks)


def expert_range(count: int, ranks: int, rank: int) -> range:
    """Experts of one rank: consecutive ones; the first ranks have one more where some are left.

    vLLM 0.32: ``determine_expert_map`` with the strategy ``linear``.
    """
    least, more = divmod(count, ranks)
    start = rank * least + min(rank, more)
    return range(start, start + least + (rank < more))


def _share(
    shape: ModelShape,
    parallelism: Parallelism,
    rank: int,
    kv_number_bytes: int,
    experts: range,
    channels: range,
    weight_bytes: dict[Part, int],
) -> RankShare:
    size, context = parallelism.tensor_parallel_size, parallelism.decode_context_parallel_size
    replica, place_in_replica = divmod(rank, size)
    kv_heads = _kv_heads(shape, size, place_in_replica)
    layer = Fraction(len(kv_heads) * shape.attention.cached * kv_number_bytes, context)
    own = shape.attention.heads // size
    return RankShare(
        rank=rank,
        replica=replica,
        heads=range(place_in_replica * own, (place_in_replica + 1) * own),
        kv_heads=kv_heads,
        tokens=place_in_replica % context,
        experts=experts,
        slice=channels,
        weight_bytes=weight_bytes,
        kv_bytes=layer * (shape.layers - shape.windowed_layers),
        window_bytes=layer * shape.windowed_layers,
    )


def _kv_heads(shape: ModelShape, size: int, rank: int) -> range:
    heads = shape.attention.cached_heads
    if isinstance(shape.attention, LatentHeads) or size >= heads:
        first = rank * heads // size  # as QKVParallelLinear: neighbours hold the same
        return range(first, first + 1)
    own = heads // size
    return range(rank * own, (rank + 1) * own)


def _experts(shape: ModelShape, parallelism: Parallelism, rank: int) -> tuple[range, range]:
    """Experts of a rank, and the channels of each that it holds."""
    if (experts := shape.experts) is None:
        return range(0), range(0)
    if parallelism.enable_expert_parallel:
        return expert_range(experts.count, parallelism.ranks, rank), range(experts.width)
    own = experts.width // parallelism.ranks
    return range(experts.count), range(rank * own, (rank + 1) * own)


def _weight_bytes(shape: ModelShape, parallelism: Parallelism, experts: int) -> dict[Part, int]:
    sums = dict.fromkeys(PARTS, Fraction(0))
    for weight in shape.weights():
        times = weight.layers * weight.size * _held(weight, shape, parallelism, experts)
        sums[weight.part] += weight.numbers * times
    # Each rank keeps its part of the rows that pad the vocabulary.
    padding = (2 - shape.tied) * (shape.padded_vocabulary - shape.vocabulary) * shape.hidden
    sums["embeddings"] += padding * shape.plain_size / parallelism.tensor_parallel_size
    return {part: round(size) for part, size in sums.items() if size}


def _held(weight: Weight, shape: ModelShape, parallelism: Parallelism, experts: int) -> Fraction:
    """How much of a weight one rank holds; of an expert's, how many times."""
    size = parallelism.tensor_parallel_size
    match weight.split:
        case "copied":
            return Fraction(1)
        case "tensor":
            return Fraction(1, size)
        case "kv_heads":
            return Fraction(1, min(size, shape.attention.cached_heads))
        case "shared":
            return Fraction(1, 1 if parallelism.divides_tokens(shape) else size)
        case "expert":
            whole = parallelism.enable_expert_parallel
            return Fraction(experts, 1 if whole else parallelism.ranks)
