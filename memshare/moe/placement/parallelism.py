"""How a model is divided among ranks, and which divisions cannot be."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from memshare.config.fields import Section, Whole
from memshare.moe.placement.shape import GroupedHeads, ModelShape


class Parallelism(Section):
    """Sizes of the groups of ranks, as vLLM's options name them."""

    tensor_parallel_size: Whole = Field(default=1, ge=1)
    """Ranks that share every layer of one data-parallel replica."""
    data_parallel_size: Whole = Field(default=1, ge=1)
    """Replicas of attention that share one set of experts."""
    enable_expert_parallel: bool = False
    """Whether each rank holds some experts whole. Otherwise each holds a slice of all of them."""
    decode_context_parallel_size: Whole = Field(default=1, ge=1)
    """Ranks, among those of tensor parallelism that hold the same KV heads, that divide tokens."""
    cp_kv_cache_interleave_size: Whole = Field(default=1, ge=1)
    """Consecutive tokens that go to one rank of decode context parallelism."""

    @property
    def ranks(self) -> int:
        """All of them. Those of one replica come one after the other."""
        return self.tensor_parallel_size * self.data_parallel_size

    def divides_tokens(self, shape: ModelShape) -> bool:
        """Whether tensor-parallel ranks divide the tokens of a step before the experts.

        vLLM 0.32: ``ParallelConfig.use_sequence_parallel_moe``.
        """
        experts = shape.experts
        return (
            experts is not None
            and experts.by_tokens
            and self.enable_expert_parallel
            and self.tensor_parallel_size > 1
            and self.data_parallel_size > 1
        )


def refusals(shape: ModelShape, parallelism: Parallelism) -> Iterator[str]:
    """What cannot be, a line each that begins with the option; nothing if all can.

    As vLLM 0.32 refuses it: ``ModelConfig.verify_with_parallel_config``, ``ParallelConfig``,
    ``FusedMoEConfig``, ``SlidingWindowManager``, and assertions of its models.
    """
    yield from _of_tensor_parallelism(shape, parallelism.tensor_parallel_size)
    yield from _of_experts(shape, parallelism)
    if parallelism.decode_context_parallel_size > 1:
        yield from _of_context_parallelism(shape, parallelism)
    elif parallelism.cp_kv_cache_interleave_size > 1:
        yield (
            f"cp_kv_cache_interleave_size = {parallelism.cp_kv_cache_interleave_size}: without "
            "decode_context_parallel_size above 1 it has no effect; leave it out"
        )


def _of_tensor_parallelism(shape: ModelShape, size: int) -> Iterator[str]:
    name = f"tensor_parallel_size = {size}"
    attention = shape.attention
    if attention.heads % size:
        yield f"{name}: does not divide the model's {attention.heads} attention heads"
    if isinstance(attention, GroupedHeads) and _apart(attention.kv_heads, size):
        yield f"{name}: neither divides the model's {attention.kv_heads} KV heads nor is a multiple"
    if shape.model_type == "gpt_oss" and size > attention.cached_heads:
        yield (
            f"{name}: vLLM's gpt-oss has no copies of KV heads; give at most "
            f"{attention.cached_heads}, and the other ranks to data_parallel_size"
        )
    if shape.padded_vocabulary % size:
        yield f"{name}: does not divide the {shape.padded_vocabulary} rows of the embedding"
    if shape.dense_layers and shape.dense_width % size:
        yield f"{name}: does not divide the width of the dense MLP, {shape.dense_width}"


def _apart(heads: int, size: int) -> bool:
    return bool(heads % size) and bool(size % heads)


def _of_experts(shape: ModelShape, parallelism: Parallelism) -> Iterator[str]:
    ranks, experts = parallelism.ranks, shape.experts
    if experts is None:
        if parallelism.enable_expert_parallel:
            yield f"enable_expert_parallel: the model ({shape.model_type}) has no experts"
        if parallelism.data_parallel_size > 1:
            yield (
                f"data_parallel_size = {parallelism.data_parallel_size}: replicas of a dense model "
                "share nothing; place one, and run several"
            )
        return
    if parallelism.enable_expert_parallel:
        if ranks == 1:
            yield "enable_expert_parallel: one rank holds all experts anyway; leave it out"
        if ranks > experts.count:
            yield (
                f"enable_expert_parallel: {ranks} ranks (tensor_parallel_size x data_parallel_size)"
                f" are more than the model's {experts.count} experts"
            )
    elif experts.width % ranks:
        yield (
            f"tensor_parallel_size x data_parallel_size = {ranks}: does not divide the width of an "
            f"expert, {experts.width}; set enable_expert_parallel"
        )
    if experts.shared_width % parallelism.tensor_parallel_size:
        yield (
            f"tensor_parallel_size = {parallelism.tensor_parallel_size}: does not divide the width "
            f"of the shared experts, {experts.shared_width}"
        )


def _of_context_parallelism(shape: ModelShape, parallelism: Parallelism) -> Iterator[str]:
    size, ranks = parallelism.decode_context_parallel_size, parallelism.tensor_parallel_size
    name = f"decode_context_parallel_size = {size}"
    heads = shape.attention.cached_heads
    if shape.windowed_layers:
        yield f"{name}: vLLM does not divide the tokens of windowed layers; leave it out"
    if ranks % size:
        yield f"{name}: does not divide tensor_parallel_size, {ranks}"
    elif (ranks // heads if ranks % heads == 0 else 1) % size:
        most = max(1, ranks // heads)
        yield (
            f"{name}: ranks that divide tokens must hold the same KV heads: with {heads} of them "
            f"and tensor_parallel_size {ranks}, "
            + (f"{most} ranks do, which it must divide" if most > 1 else "no two ranks do")
        )
    if isinstance(shape.attention, GroupedHeads) and shape.attention.heads // heads % size:
        yield (
            f"{name}: does not divide the {shape.attention.heads // heads} query heads of a KV head"
        )
