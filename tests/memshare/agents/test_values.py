"""Values with low-rank columns against plain sums."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from memshare.agents.values import apply_up, pad_heads, widen_values


def test_padding_changes_no_product() -> None:
    query, key = torch.randn(5, 3 * 8), torch.randn(5, 3 * 8)
    wide_query, wide_key = pad_heads(query, 3, 12), pad_heads(key, 3, 12)
    assert wide_query.shape == (5, 36)
    products = torch.einsum("ihd,jhd->hij", wide_query.view(5, 3, 12), wide_key.view(5, 3, 12))
    assert torch.allclose(
        products, torch.einsum("ihd,jhd->hij", query.view(5, 3, 8), key.view(5, 3, 8)), atol=1e-6
    )
    assert torch.equal(pad_heads(query, 3, 8), query)


def test_every_head_gets_all_of_the_low_rank_part() -> None:
    values, low_rank = torch.randn(5, 2 * 8), torch.randn(5, 3)
    wide = widen_values(values, low_rank, 2, 16).view(5, 2, 16)
    assert torch.equal(wide[..., :8], values.view(5, 2, 8))
    for head in (0, 1):
        assert torch.equal(wide[:, head, 8:11], low_rank)
    assert not wide[..., 11:].any()


@given(
    tokens=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
    slots=st.integers(1, 4),
    rank=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_token_meets_its_own_adapter(
    tokens: int, heads: int, group: int, slots: int, rank: int, seed: int
) -> None:
    """Whatever is mixed in a batch. Numbers that name no slot add nothing: vLLM's -1 for the base
    model, and what stands in the buffers of a captured graph behind the batch."""
    make = torch.Generator().manual_seed(seed)
    head_dim, width = 6, 11
    attended = torch.randn(tokens, heads * group, width, generator=make)
    up = torch.randn(slots, heads * head_dim, rank, generator=make)
    columns = torch.randint(0, width, (slots, rank), generator=make)
    chosen = torch.randint(-1, slots + 1, (tokens,), generator=make)
    expected = torch.zeros(tokens, heads * group, head_dim)
    for token, slot in enumerate(chosen.tolist()):
        if 0 <= slot < slots:
            for head in range(heads * group):
                own = up[slot].view(heads, head_dim, rank)[head // group]
                expected[token, head] = own @ attended[token, head, columns[slot]]
    added = apply_up(attended, chosen, columns, up, heads)
    assert torch.allclose(added, expected, atol=1e-4)


def test_attention_over_low_rank_columns_is_attention_over_whole_values() -> None:
    """The identity that sharing rests on: ``P (V + L B) = P V + (P L) B``."""
    make = torch.Generator().manual_seed(0)
    tokens, heads, group, head_dim, rank = 7, 2, 3, 8, 4
    weights = torch.rand(heads * group, tokens, tokens, generator=make).softmax(-1)
    base = torch.randn(tokens, heads * head_dim, generator=make)
    low_rank = torch.randn(tokens, rank, generator=make)
    up = torch.randn(1, heads * head_dim, rank, generator=make)

    def attend(values: torch.Tensor) -> torch.Tensor:
        by_head = values.view(tokens, heads, -1).repeat_interleave(group, dim=1)
        return torch.einsum("hij,jhd->ihd", weights, by_head)

    wide = attend(widen_values(base, low_rank, heads, head_dim + rank))
    slots, columns = torch.zeros(tokens, dtype=torch.long), torch.arange(rank)[None]
    shared = wide[..., :head_dim] + apply_up(wide[..., head_dim:], slots, columns, up, heads)
    assert torch.allclose(shared, attend(base + low_rank @ up[0].T), atol=1e-4)
    shifted = apply_up(wide[..., head_dim:], slots, columns.roll(1), up, heads)
    assert not torch.allclose(wide[..., :head_dim] + shifted, shared, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_stay_what_they_are(dtype: torch.dtype) -> None:
    attended = torch.randn(3, 4, 8, dtype=dtype)
    added = apply_up(
        attended, torch.tensor([0, -1, 1]), torch.zeros(2, 8, dtype=torch.long),
        torch.randn(2, 2 * 16, 8, dtype=dtype), 2,
    )  # fmt: skip
    assert added.dtype == dtype
    assert widen_values(torch.randn(3, 32, dtype=dtype), attended[:, 0], 2, 32).dtype == dtype
