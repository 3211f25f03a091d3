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


class Fp8Layer:
    """A backend that stores fp8, divided by the layer's scales, K beside V."""

    head_size, dtype, rotary = CHANNELS, torch.bfloat16, None

    def __init__(self, cache_dtype: str, scales: tuple[float, float], cuts: bool) -> None:
        self.cache_dtype, self.scales, self.cuts = cache_dtype, scales, cuts
        self.stored = torch.float8_e5m2 if "e5m2" in cache_dtype else torch.float8_e4m3fn

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        scaled = [x.float() / scale for x, scale in zip((keys, values), self.scales, strict=True)]
        exact = torch.cat(scaled, -1)
        stored = exact.to(self.stored).view(torch.uint8)
        if self.cuts:  # as vLLM's CPU kernels do: the next byte is the next number towards zero
            stored -= (stored.view(self.stored).float().abs() > exact.abs()).to(torch.uint8)
        cache[slots // SLOTS, :, slots % SLOTS] = stored


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.0173, 3.1), (40.0, 0.003)])
@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_is_read_times_its_scale(
    cache_dtype: str, scales: tuple[float, float], cuts: bool
) -> None:
    torch.manual_seed(0)
    layer = Fp8Layer(cache_dtype, scales, cuts)
    cache = torch.zeros(BLOCKS, HEADS, SLOTS, 2 * CHANNELS, dtype=torch.uint8)
    layout = KVLayout.learn(layer, cache)
    given = [torch.randn(SLOTS, HEADS, CHANNELS) * scale for scale in scales]
    slots = torch.arange(SLOTS) + 2 * SLOTS
    layer.write(given[0].bfloat16(), given[1].bfloat16(), cache, slots)
    by_block = layout.gather(cache, torch.tensor([2]))
    by_token = layout.gather_tokens(cache, torch.full((SLOTS,), 2), torch.arange(SLOTS))
    for wanted, block, tokens, scale in zip(given, by_block, by_token, scales, strict=True):
        assert torch.equal(block[0].transpose(0, 1), tokens)
        rounding = (0.13 if "e5m2" in cache_dtype else 0.07) * (1 + cuts)
        assert ((tokens - wanted).abs() <= rounding * wanted.abs() + 0.01 * scale).all()
