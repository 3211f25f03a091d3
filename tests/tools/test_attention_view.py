"""The program that measures compaction on a worker, on shapes too small to measure anything."""

from __future__ import annotations

import pytest
import torch

from tools.bench.attention_view import Shape, build, measure, pack

pytestmark = pytest.mark.engine


def test_tables_are_squeezed_and_tokens_packed() -> None:
    """A program that nobody runs falls behind what it calls."""
    device = torch.device("cpu")
    for rows in (0, 2):
        build(rows, device)()
    step = pack(Shape("tiny", 1, 2, 64, torch.float32), 2, device)
    median, best = measure(step, device, repeats=1)
    assert 0 < float(best) <= float(median)
