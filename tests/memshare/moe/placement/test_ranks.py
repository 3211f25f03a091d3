"""Every head, token and expert lies where it should, and bytes add up, however a model is cut."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memshare.config import ConfigError
from memshare.moe.placement.model_config import shape_of
from memshare.moe.placement.parallelism import Parallelism, refusals
from memshare.moe.placement.ranks import Placement, expert_range, place
from memshare.moe.placement.shape import LatentHeads
from tests.memshare.moe.placement.published import (
    ALL,
    DEEPSEEK_V3,
    GPT_OSS_20B,
    LLAMA_8B,
    QWEN3_30B,
)

SHAPES = {name: shape_of(config) for name, config in ALL.items()}


def parallelism(tp: int = 1, dp: int = 1, ep: bool = False, dcp: int = 1) -> Parallelism:
    return Parallelism(
        tensor_parallel_size=tp,
        data_parallel_size=dp,
        enable_expert_parallel=ep,
        decode_context_parallel_size=dcp,
    )


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any division that nothing is against."""
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    division = parallelism(
        draw(st.sampled_from([1, 2, 3, 4, 8, 16, 32])),
        draw(st.sampled_from([1, 2, 3, 5, 8])),
        draw(st.booleans()),
        draw(st.sampled_from([1, 2, 4, 8])),
    )
    assume(not any(refusals(shape, division)))
    return place(shape, division, draw(st.sampled_from([1, 2])))


@given(placements())
@settings(max_examples=60)
def test_every_head_token_and_expert_is_held_as_often_as_it_should(placement: Placement) -> None:
    shape, division = placement.shape, placement.parallelism
    size, context = division.tensor_parallel_size, division.decode_context_parallel_size
    for replica in range(division.data_parallel_size):
        ranks = [rank for rank in placement.ranks if rank.replica == replica]
        assert len(ranks) == size
        heads = Counter(head for rank in ranks for head in rank.heads)
        assert heads == Counter(range(shape.attention.heads))
        kept = Counter((head, rank.tokens) for rank in ranks for head in rank.kv_heads)
        assert set(kept.values()) == {placement.kv_copies}, "KV is copied evenly"
        cached = shape.attention.cached_heads
        assert kept.keys() == {(head, part) for head in range(cached) for part in range(context)}
        if not isinstance(shape.attention, LatentHeads):  # queries find their keys on their rank
            group = shape.attention.heads // cached
            for rank in ranks:
                assert {head // group for head in rank.heads} == {*rank.kv_heads}
    if shape.experts is not None:
        parts = Counter(
            (expert, channel)
            for rank in placement.ranks
            for expert in rank.experts
            for channel in (rank.slice.start, rank.slice.stop - 1)  # enough: slices are ranges
        )
        assert {expert for expert, _ in parts} == {*range(shape.experts.count)}
        assert set(parts.values()) == ({1} if len(placement.ranks[0].slice) > 1 else {2})
        width = sum(len(rank.experts) * len(rank.slice) for rank in placement.ranks)
        assert width == shape.experts.count * shape.experts.width


@given(placements())
@settings(max_examples=60)
def test_bytes_add_up(placement: Placement) -> None:
    """Over all ranks: what is divided once, what is copied as often as there are copies."""
    shape, division = placement.shape, placement.parallelism
    replicas, ranks = division.data_parallel_size, len(placement.ranks)
    size = division.tensor_parallel_size
    wanted: Counter[str] = Counter()
    for weight in shape.weights():
        count = shape.experts.count if weight.split == "expert" and shape.experts else 1
        whole = weight.numbers * weight.layers * weight.size * count
        copies = {
            "copied": ranks,
            "tensor": replicas,
            "kv_heads": replicas * max(1, size // shape.attention.cached_heads),
            "shared": ranks if division.divides_tokens(shape) else replicas,
            "expert": 1,
        }[weight.split]
        wanted[weight.part] += whole * copies  # type: ignore[assignment]
    padding = (2 - shape.tied) * (shape.padded_vocabulary - shape.vocabulary) * shape.hidden
    wanted["embeddings"] += padding * replicas * shape.plain_size  # type: ignore[assignment]
    for part, expected in wanted.items():
        found = sum(rank.weight_bytes.get(part, 0) for rank in placement.ranks)  # type: ignore[call-overload]
        assert abs(found - expected) <= ranks  # each is rounded to bytes
    kv = sum(rank.kv_bytes + rank.window_bytes for rank in placement.ranks)
    once = shape.layers * shape.attention.cached_heads * shape.attention.cached
    assert kv == once * placement.kv_number_bytes * placement.kv_copies * replicas


@given(st.integers(1, 300), st.integers(1, 64))
def test_experts_of_ranks_follow_each_other(count: int, ranks: int) -> None:
    assume(ranks <= count)
    found = [expert_range(count, ranks, rank) for rank in range(ranks)]
    assert [expert for numbers in found for expert in numbers] == list(range(count))
    assert {len(numbers) for numbers in found} <= {count // ranks, count // ranks + 1}
    assert [len(n) for n in found] == sorted((len(n) for n in found), reverse=True)


# ---- by hand ----


def test_qwen3_on_four_ranks_by_hand() -> None:
    """TP 4: eight query heads and one KV head on each rank."""
    placement = place(SHAPES["qwen3"], parallelism(tp=4, ep=True))
    rank = placement.ranks[2]
    assert (rank.heads, rank.kv_heads) == (range(16, 24), range(2, 3))
    assert (rank.experts, rank.slice) == (range(64, 96), range(768))
    assert rank.kv_bytes == 48 * 2 * 128 * 2  # layers, K and V, channels, bytes
    assert rank.weight_bytes["experts"] == 48 * 32 * 3 * 2048 * 768 * 2
    attention = 48 * ((2048 * (8 + 1 + 1) * 128 + 8 * 128 * 2048) + 2 * 128 + 2 * 2048) * 2
    assert rank.weight_bytes["attention"] == attention
    assert rank.request_bytes(placement.shape, 1000) == 1000 * 24_576


def test_deepseek_keeps_one_vector_on_every_rank_unless_tokens_are_divided() -> None:
    vector = 61 * 576 * 2  # 70 272 bytes of a token
    for division, copies in ((parallelism(tp=8), 8), (parallelism(tp=8, dcp=8), 1)):
        placement = place(SHAPES["deepseek"], division)
        assert placement.kv_copies == copies
        assert {rank.kv_bytes for rank in placement.ranks} == {Fraction(vector * copies, 8)}
    assert [rank.tokens for rank in placement.ranks] == list(range(8))


def test_deepseek_copies_shared_experts_where_ranks_divide_tokens() -> None:
    whole = 58 * 3 * 7168 * 2048 * (1 + Fraction(4, 128 * 128))
    apart = place(SHAPES["deepseek"], parallelism(tp=4, dp=2, ep=True)).ranks[0]
    together = place(SHAPES["deepseek"], parallelism(tp=4, ep=True)).ranks[0]
    assert apart.weight_bytes["shared experts"] == round(whole)
    assert together.weight_bytes["shared experts"] == round(whole / 4)


def test_gpt_oss_forgets_what_is_outside_of_its_windows() -> None:
    placement = place(SHAPES["gpt-oss"], parallelism(tp=2))
    rank = placement.ranks[0]
    layer = 4 * 2 * 64 * 2
    assert (rank.kv_bytes, rank.window_bytes) == (12 * layer, 12 * layer)
    assert rank.request_bytes(placement.shape, 100) == 100 * 24 * layer
    assert rank.request_bytes(placement.shape, 10_000) == (10_000 + 128) * 12 * layer


def test_dense_models_have_no_experts() -> None:
    rank = place(SHAPES["llama"], parallelism(tp=16)).ranks[5]
    assert (rank.experts, rank.slice, rank.kv_heads) == (range(0), range(0), range(2, 3))
    assert "experts" not in rank.weight_bytes


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("config", "division", "said"),
    [
        (QWEN3_30B, parallelism(tp=5), "tensor_parallel_size = 5: does not divide the model's 32"),
        (QWEN3_30B, parallelism(tp=6), "neither divides the model's 4 KV heads nor is a multiple"),
        (GPT_OSS_20B, parallelism(tp=16), "gpt-oss has no copies of KV heads; give at most 8"),
        (
            {**QWEN3_30B, "mlp_only_layers": [0], "intermediate_size": 6143},
            parallelism(tp=4),
            "does not divide the width of the dense MLP, 6143",
        ),
        (LLAMA_8B, parallelism(tp=2, ep=True), "enable_expert_parallel: the model (llama) has no"),
        (LLAMA_8B, parallelism(dp=2), "data_parallel_size = 2: replicas of a dense model share"),
        (QWEN3_30B, parallelism(ep=True), "enable_expert_parallel: one rank holds all experts"),
        (QWEN3_30B, parallelism(4, 64, True), "256 ranks (tensor_parallel_size x data_parallel"),
        (QWEN3_30B, parallelism(dp=9), "= 9: does not divide the width of an expert, 768; set"),
        (
            {**DEEPSEEK_V3, "n_shared_experts": 1, "moe_intermediate_size": 2050},
            parallelism(tp=4, ep=True),
            "does not divide the width of the shared experts, 2050",
        ),
        (QWEN3_30B, parallelism(tp=4, dcp=2), "with 4 of them and tensor_parallel_size 4, no two"),
        (QWEN3_30B, parallelism(tp=8, dcp=4), "tensor_parallel_size 8, 2 ranks do, which it must"),
        (QWEN3_30B, parallelism(tp=8, dcp=3), "= 3: does not divide tensor_parallel_size, 8"),
        (GPT_OSS_20B, parallelism(tp=8, dcp=2), "does not divide the tokens of windowed layers"),
        (
            {**QWEN3_30B, "num_key_value_heads": 32},
            parallelism(tp=64, dcp=2),
            "does not divide the 1 query heads of a KV head",
        ),
        (
            QWEN3_30B,
            Parallelism(cp_kv_cache_interleave_size=16),
            "cp_kv_cache_interleave_size = 16: without decode_context_parallel_size above 1",
        ),
    ],
)
def test_what_cannot_be_divided_is_named(
    config: dict[str, object], division: Parallelism, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        place(shape_of(config), division)
    assert said in str(caught.value)
