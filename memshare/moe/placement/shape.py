"""Sizes of a model, as far as they decide who holds what: its weights, its KV, its experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

Part = Literal["attention", "experts", "shared experts", "dense MLP", "router", "embeddings"]
"""What a weight belongs to. Norms of a layer count as attention, the last one as embeddings."""

PARTS: tuple[Part, ...] = (
    "attention", "experts", "shared experts", "dense MLP", "router", "embeddings",
)  # fmt: skip

Split = Literal["tensor", "kv_heads", "shared", "expert", "copied"]
"""How ranks divide a weight: by tensor parallelism; the same, but never below one KV head; as
``tensor``, or not at all where ranks divide the tokens instead; by expert or, without expert
parallelism, over all ranks; not at all."""

VOCABULARY_PADDING = 64  # rows: vLLM's DEFAULT_VOCAB_PADDING_SIZE


class Weight(NamedTuple):
    """A kind of weight.

    Attributes:
        part: what it belongs to.
        numbers: in one layer; of a weight that is split as ``expert``, in one expert of one layer.
        layers: that have it.
        size: bytes of a number, scales of quantised ones included.
        split: how ranks divide it.
    """

    part: Part
    numbers: int
    layers: int
    size: Fraction
    split: Split


@dataclass(frozen=True, slots=True)
class GroupedHeads:
    """Attention whose KV heads each serve a group of query heads.

    Attributes:
        heads: query heads.
        kv_heads: KV heads.
        head_dim: channels of a head.
        input_bias: whether the projections of queries, keys and values have biases.
        output_bias: whether the output projection has one.
        norms: numbers in norms of queries and keys.
        sinks: whether each query head has a sink.
    """

    heads: int
    kv_heads: int
    head_dim: int
    input_bias: bool = False
    output_bias: bool = False
    norms: int = 0
    sinks: bool = False

    @property
    def cached(self) -> int:
        """Numbers that one KV head of one layer keeps of a token."""
        return 2 * self.head_dim

    @property
    def cached_heads(self) -> int:
        """Heads of the cache that ranks can divide."""
        return self.kv_heads

    @property
    def query_width(self) -> int:
        """Numbers of a query head that attention compares with the cache."""
        return self.head_dim

    @property
    def result_width(self) -> int:
        """Numbers that a query head reads from the cache."""
        return self.head_dim

    def weights(self, hidden: int, layers: int, dense: Fraction, plain: Fraction) -> list[Weight]:
        """Those of all layers; ``dense``: bytes of a number in a matrix, ``plain``: elsewhere."""
        query, keys = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        copied = self.norms + self.output_bias * hidden
        divided = self.input_bias * query + self.sinks * self.heads
        return [
            Weight("attention", 2 * query * hidden, layers, dense, "tensor"),
            Weight("attention", keys * hidden, layers, dense, "kv_heads"),
            Weight("attention", divided, layers, plain, "tensor"),
            Weight("attention", self.input_bias * keys, layers, plain, "kv_heads"),
            Weight("attention", copied, layers, plain, "copied"),
        ]


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """Attention whose heads all read one latent vector of a token (MLA, arXiv 2405.04434).

    Attributes:
        heads: query heads.
        query_rank: of the factored projection of queries; None if it is one matrix.
        rank: of the latent vector.
        plain_dim: channels of a query head without positions.
        rotary_dim: channels with positions; the key's are shared by all heads.
        value_dim: channels of a value head.
    """

    heads: int
    query_rank: int | None
    rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int

    @property
    def cached(self) -> int:
        """Numbers that a layer keeps of a token."""
        return self.rank + self.rotary_dim

    @property
    def cached_heads(self) -> int:
        """One, for all query heads: tensor parallelism copies it."""
        return 1

    @property
    def query_width(self) -> int:
        """Numbers of a query head that attention compares with the cache."""
        return self.rank + self.rotary_dim

    @property
    def result_width(self) -> int:
        """Numbers that a query head reads from the cache."""
        return self.rank

    def weights(self, hidden: int, layers: int, dense: Fraction, plain: Fraction) -> list[Weight]:
        """Those of all layers; ``dense``: bytes of a number in a matrix, ``plain``: elsewhere."""
        query = self.heads * (self.plain_dim + self.rotary_dim)
        first = 0 if self.query_rank is None else self.query_rank
        into = hidden if self.query_rank is None else self.query_rank
        values = self.heads * self.value_dim
        latent = self.rank * (self.heads * self.plain_dim + values)
        return [
            # vLLM keeps the two projections into low ranks whole on every rank.
            Weight("attention", hidden * (first + self.cached), layers, dense, "copied"),
            Weight("attention", into * query + latent + values * hidden, layers, dense, "tensor"),
            Weight("attention", first + self.rank, layers, plain, "copied"),
        ]


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts.

    Attributes:
        count: in a layer.
        per_token: that the router chooses for a token.
        width: between an expert's two projections.
        layers: that have experts.
        bias: whether experts and router have biases.
        shared_width: of the experts that every token passes; 0 if there are none.
        balanced: whether the router has a number for each expert that balances their load.
        by_tokens: whether vLLM's model divides the tokens of a step among tensor-parallel ranks
            before its experts (``use_sequence_parallel_moe``).
    """

    count: int
    per_token: int
    width: int
    layers: int
    bias: bool = False
    shared_width: int = 0
    balanced: bool = False
    by_tokens: bool = True


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model.

    Attributes:
        model_type: as its configuration names it.
        hidden: width of the residual stream.
        layers: decoder layers.
        vocabulary: tokens.
        tied: whether embeddings and output are one matrix.
        attention: of every layer.
        experts: None in a dense model.
        dense_width: of the MLP in layers without experts.
        dense_bias: whether it has biases.
        windowed_layers: whose attention sees a window only.
        window: tokens that they see; 0 if no layer is windowed.
        plain_size: bytes of a number that is not quantised.
        dense_size: bytes of a number in matrices of attention, dense MLP and shared experts.
        expert_size: bytes of a number in an expert's matrices.
    """

    model_type: str
    hidden: int
    layers: int
    vocabulary: int
    tied: bool
    attention: GroupedHeads | LatentHeads
    experts: Experts | None
    dense_width: int
    dense_bias: bool
    windowed_layers: int
    window: int
    plain_size: Fraction
    dense_size: Fraction
    expert_size: Fraction

    @property
    def dense_layers(self) -> int:
        """Layers without experts."""
        return self.layers - (self.experts.layers if self.experts else 0)

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding as vLLM lays it out."""
        return -(-self.vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING

    def weights(self) -> Iterator[Weight]:
        """All weights, as in the checkpoint. Draft layers (MTP) are not among them."""
        hidden, plain = self.hidden, self.plain_size
        yield from self.attention.weights(hidden, self.layers, self.dense_size, plain)
        yield Weight("attention", 2 * hidden, self.layers, plain, "copied")  # norms
        yield from self._mlp("dense MLP", self.dense_width, self.dense_layers, self.dense_bias)
        yield Weight("embeddings", (2 - self.tied) * self.vocabulary * hidden, 1, plain, "tensor")
        yield Weight("embeddings", hidden, 1, plain, "copied")
        if (experts := self.experts) is not None:
            routing = experts.count * hidden + experts.bias * experts.count
            yield Weight("router", routing, experts.layers, plain, "copied")
            if experts.balanced:  # vLLM keeps them in 32 bits
                yield Weight("router", experts.count, experts.layers, Fraction(4), "copied")
            matrices = 3 * hidden * experts.width
            yield Weight("experts", matrices, experts.layers, self.expert_size, "expert")
            bias = experts.bias * (2 * experts.width + hidden)
            yield Weight("experts", bias, experts.layers, plain, "expert")
            shared = 3 * hidden * experts.shared_width
            yield Weight("shared experts", shared, experts.layers, self.dense_size, "shared")

    def _mlp(self, part: Part, width: int, layers: int, bias: bool) -> Iterator[Weight]:
        yield Weight(part, 3 * self.hidden * width, layers, self.dense_size, "tensor")
        yield Weight(part, bias * 2 * width, layers, self.plain_size, "tensor")
        yield Weight(part, bias * self.hidden, layers, self.plain_size, "copied")

    @property
    def parameters(self) -> int:
        """Numbers of the whole model."""
        return sum(w.numbers * w.layers * self._times(w) for w in self.weights())

    @property
    def active_parameters(self) -> int:
        """Numbers that a token meets: those of the chosen experts, and all others."""
        chosen = self.experts.per_token if self.experts else 0
        return sum(
            w.numbers * w.layers * (chosen if w.split == "expert" else 1) for w in self.weights()
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model."""
        return round(sum(w.numbers * w.layers * w.size * self._times(w) for w in self.weights()))

    def _times(self, weight: Weight) -> int:
        return self.experts.count if weight.split == "expert" and self.experts else 1
