"""Reading blocks, however a backend arranges them."""

from __future__ import annotations

import pytest
import torch

from memshare.kv.layout import KVLayout

BLOCKS, HEADS, SLOTS, CHANNELS = 5, 2, 8, 12
COUNT = SLOTS * CHANNELS


def places(kind: str) -> torch.Tensor:
    """[slots, channels] places of one of K and V in its half of a block."""
    numbers = torch.arange(COUNT)
    if kind == "plain":
        return numbers.view(SLOTS, CHANNELS)
    if kind == "transposed":
        return numbers.view(CHANNELS, SLOTS).T
    if kind == "tiled":  # pairs of channels, by tiles of four slots
        return numbers.view(2, CHANNELS // 2, 4, 2).permute(0, 2, 1, 3).reshape(SLOTS, CHANNELS)
    return torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).view(SLOTS, CHANNELS)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["plain", "transposed", "tiled", "in no order"])
def test_each_value_is_found(kind: str, stored: torch.dtype) -> None:
    torch.manual_seed(0)
    keys_at, values_at = places(kind), COUNT + places("plain")
    layout = KVLayout(SLOTS, CHANNELS, keys_at.flatten(), values_at.flatten(), stored)
    has_strides = [strides is not None for strides in layout._strides]
    assert has_strides == [kind != "in no order", True]
    written = torch.randn(BLOCKS, HEADS, SLOTS, 2 * CHANNELS).to(stored)
    cache = written.view(torch.uint8) if stored.itemsize == 1 else written
    blocks = torch.tensor([3, 0, 3])
    found = layout.gather(cache, blocks)
    region = written.float()[blocks].flatten(2)
    for got, at in zip(found, (keys_at, values_at), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, region[:, :, at])
