"""What ranks send each other in one step, in bytes, counted over vLLM's own collectives.

Counted for algorithms that send least: rings. A rank of a group of g sends (g - 1) / g of what is
gathered or scattered, and twice that of what is reduced for all. Activations have 16 bits; kernels
that quantise them before they send, send half of what is called *dispatch* here. Not counted: the
logits of a step's last tokens, and what the engine processes tell each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from memshare.moe.placement.parallelism import Parallelism
from memshare.moe.placement.ranks import expert_range
from memshare.moe.placement.shape import ModelShape

ACTIVATION_BYTES = 2
_CHOICE_BYTES = 8  # of one chosen expert: its number and its weight
_LSE_BYTES = 4  # of a query head's softmax, for combining parts


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends in a step, over all layers; the mean of the ranks.

    Attributes:
        attention: sums of what tensor-parallel ranks computed (all-reduce).
        context: queries, and parts of results, among ranks that divide tokens (all-gather,
            reduce-scatter).
        dense: sums of dense MLPs (all-reduce).
        dispatch: tokens to all ranks of the experts (all-gather), with the router's choice.
        combine: what experts made of them, back (reduce-scatter).
        experts: sums of what ranks with the same tokens computed (all-reduce), or, where
            tensor-parallel ranks divided the tokens, all results to each (all-gather).
        routed_dispatch: an all-to-all in place of ``dispatch``: each token to those ranks alone
            that hold an expert it chose, if all experts are chosen equally often.
        routed_combine: the same for ``combine``: one vector back from each of them.
    """

    attention: int
    context: int
    dense: int
    dispatch: int
    combine: int
    experts: int
    routed_dispatch: int
    routed_combine: int

    @property
    def sent(self) -> int:
        """All that is sent with vLLM's default, ``allgather_reducescatter``."""
        return (
            self.attention + self.context + self.dense
            + self.dispatch + self.combine + self.experts
        )  # fmt: skip

    @property
    def routed_sent(self) -> int:
        """All that is sent where tokens go only where their experts are."""
        return self.sent - self.dispatch - self.combine + self.routed_dispatch + self.routed_combine


def traffic_of(shape: ModelShape, parallelism: Parallelism, tokens: int) -> Traffic:
    """Count one step.

    Args:
        shape: the model.
        parallelism: that :func:`~memshare.moe.placement.parallelism.refusals` has nothing against.
        tokens: of each data-parallel replica in the step.
    """
    size = parallelism.tensor_parallel_size
    vectors = tokens * shape.hidden * ACTIVATION_BYTES
    reduced = 2 * Fraction(size - 1, size) * vectors
    dispatch, combine, sums, routed_dispatch, routed_combine = _of_experts(
        shape, parallelism, tokens
    )
    layers = shape.experts.layers if shape.experts else 0
    return Traffic(
        attention=round(shape.layers * reduced),
        context=round(shape.layers * _of_context(shape, parallelism, tokens)),
        dense=round(shape.dense_layers * reduced),
        dispatch=round(layers * dispatch),
        combine=round(layers * combine),
        experts=round(layers * sums),
        routed_dispatch=round(layers * routed_dispatch),
        routed_combine=round(layers * routed_combine),
    )


def distinct_ranks(count: int, chosen: int, ranks: int) -> Fraction:
    """Mean number of ranks that hold an expert of a token which chooses ``chosen`` of ``count``
    experts, all sets being equally likely."""
    ways = math.comb(count, chosen)
    missed = sum(
        math.comb(count - len(expert_range(count, ranks, rank)), chosen) for rank in range(ranks)
    )
    return ranks - Fraction(missed, ways)


def _of_experts(
    shape: ModelShape, parallelism: Parallelism, tokens: int
) -> tuple[Fraction, Fraction, Fraction, Fraction, Fraction]:
    """Of one layer: dispatch, combine, what follows; and the first two as an all-to-all."""
    experts = shape.experts
    size, replicas = parallelism.tensor_parallel_size, parallelism.data_parallel_size
    if experts is None or parallelism.ranks == 1:
        return (Fraction(0),) * 5
    vector = shape.hidden * ACTIVATION_BYTES
    choice = experts.per_token * _CHOICE_BYTES
    divided = parallelism.divides_tokens(shape)
    # vLLM rounds up, so that every rank has as many.
    own = -(-tokens // size) if divided else tokens
    others = parallelism.ranks - 1 if divided else replicas - 1
    dispatch = Fraction(others * own * (vector + choice))
    combine = Fraction(others * own * vector)
    if divided:
        sums = Fraction((size - 1) * own * vector)
    else:
        sums = 2 * Fraction(size - 1, size) * tokens * vector
    if not (parallelism.enable_expert_parallel and others):
        return dispatch, combine, sums, dispatch, combine
    # Its own rank holds some of them, too: by symmetry one part in `ranks` of those it goes to.
    reached = distinct_ranks(experts.count, experts.per_token, parallelism.ranks)
    away = reached * Fraction(parallelism.ranks - 1, parallelism.ranks)
    each = Fraction(tokens, size)  # a token is sent once, whoever of its replica sends it
    return dispatch, combine, sums, each * away * (vector + choice), each * away * vector


def _of_context(shape: ModelShape, parallelism: Parallelism, tokens: int) -> Fraction:
    """Of one layer: a rank has the queries of all heads of its group meet the tokens it holds."""
    size = parallelism.decode_context_parallel_size
    attention = shape.attention
    heads = attention.heads // parallelism.tensor_parallel_size
    queries = (size - 1) * heads * attention.query_width * ACTIVATION_BYTES
    results = (size - 1) * heads * attention.result_width * ACTIVATION_BYTES
    weights = (size - 1) * heads * size * _LSE_BYTES
    return Fraction(tokens * (queries + results + weights))
