"""What ranks send each other, by hand, and by playing it through."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memshare.moe.placement.model_config import shape_of
from memshare.moe.placement.parallelism import Parallelism
from memshare.moe.placement.ranks import expert_range
from memshare.moe.placement.traffic import Traffic, distinct_ranks, traffic_of
from tests.memshare.moe.placement.published import DEEPSEEK_V3, LLAMA_8B, MIXTRAL, QWEN3_30B

TOKENS = 64


def sent(config: dict[str, object], tokens: int = TOKENS, **division: int | bool) -> Traffic:
    return traffic_of(shape_of(config), Parallelism.model_validate(division), tokens)


def test_one_rank_sends_nothing() -> None:
    assert sent(QWEN3_30B).sent == sent(QWEN3_30B).routed_sent == 0


def test_tensor_parallelism_sums_twice_in_a_layer() -> None:
    """A ring of four: three quarters of the vectors to sum them, and again to tell all."""
    vectors = TOKENS * 4096 * 2
    found = sent(LLAMA_8B, tensor_parallel_size=4)
    assert found.attention == found.dense == 32 * 2 * 3 * vectors // 4
    assert found.sent == 2 * found.attention


def test_experts_behind_data_parallel_attention() -> None:
    """Eight ranks, each with its own tokens: all of them go to the seven others."""
    found = sent(QWEN3_30B, data_parallel_size=8, enable_expert_parallel=True)
    assert found.attention == found.experts == found.context == 0
    assert found.dispatch == 48 * 7 * TOKENS * (2048 * 2 + 8 * 8)
    assert found.combine == 48 * 7 * TOKENS * 2048 * 2


def test_tensor_parallel_ranks_divide_tokens_before_experts() -> None:
    shared = {"tensor_parallel_size": 4, "data_parallel_size": 2}
    found = sent(QWEN3_30B, **shared, enable_expert_parallel=True)
    assert found.combine == 48 * 7 * (TOKENS // 4) * 2048 * 2
    assert found.experts == 48 * 3 * (TOKENS // 4) * 2048 * 2
    # Mixtral's layers in vLLM do not: every rank sends all its replica's tokens to one other.
    found = sent(MIXTRAL, **shared, enable_expert_parallel=True)
    assert found.combine == 32 * 1 * TOKENS * 4096 * 2
    assert found.experts == 32 * 2 * 3 * TOKENS * 4096 * 2 // 4


def test_without_data_parallelism_experts_need_no_dispatch() -> None:
    found = sent(QWEN3_30B, tensor_parallel_size=4, enable_expert_parallel=True)
    assert (found.dispatch, found.combine) == (0, 0)
    assert found == sent(QWEN3_30B, tensor_parallel_size=4)


def test_ranks_that_divide_tokens_exchange_queries_and_results() -> None:
    found = sent(DEEPSEEK_V3, tensor_parallel_size=8, decode_context_parallel_size=8)
    # 16 heads of a rank: their latent queries to 7 others, 7 times their latent results, and a
    # number for each of the 128 heads.
    assert found.context == 61 * TOKENS * 7 * (16 * 576 * 2 + 16 * 512 * 2 + 128 * 4)


@pytest.mark.parametrize(("count", "chosen", "ranks"), [(8, 2, 4), (8, 3, 8), (7, 2, 3), (6, 6, 4)])
def test_ranks_that_a_token_reaches(count: int, chosen: int, ranks: int) -> None:
    """Against every choice, one by one."""
    home = {e: r for r in range(ranks) for e in expert_range(count, ranks, r)}
    ways = list(combinations(range(count), chosen))
    mean = sum(len({home[expert] for expert in way}) for way in ways) / len(ways)
    assert float(distinct_ranks(count, chosen, ranks)) == pytest.approx(mean)


@given(st.sampled_from([2, 4, 8, 16, 32, 64, 128]), st.integers(1, 300))
@settings(max_examples=60)
def test_an_all_to_all_never_sends_more(replicas: int, tokens: int) -> None:
    found = sent(QWEN3_30B, tokens, data_parallel_size=replicas, enable_expert_parallel=True)
    assert 0 < found.routed_dispatch <= found.dispatch
    assert found.routed_sent <= found.sent
    # Eight experts are on eight ranks at most.
    assert found.routed_combine <= 48 * tokens * 8 * 2048 * 2
