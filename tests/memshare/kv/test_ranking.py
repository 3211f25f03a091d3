"""Order of values: NumPy's way on a CPU is torch's."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from memshare.kv.ranking import stable_order

FLOATS = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("nan")])
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(FLOATS, min_size=7, max_size=7), min_size=1, max_size=4))
def test_of_floats_with_ties_signs_and_no_numbers(rows: list[list[float]]) -> None:
    values = torch.tensor(rows, dtype=torch.float32)
    assert torch.equal(stable_order(values), values.argsort(dim=-1, stable=True))
    negative_nan = torch.where(values.isnan(), -values, values)
    assert torch.equal(stable_order(negative_nan), values.argsort(dim=-1, stable=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
def test_of_many(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randint(-50, 50, (3, 2, 400)).to(dtype)
    assert torch.equal(stable_order(values), values.argsort(dim=-1, stable=True))
    some = values.transpose(0, 1)[:, ::2].expand(2, -1, 400)  # not contiguous
    assert torch.equal(stable_order(some), some.argsort(dim=-1, stable=True))
