"""Moving tokens in caches of any arrangement and element type."""

from __future__ import annotations

import pytest
import torch

from memshare.kv.layout import KVLayout
from memshare.kv.moves import TokenMover

LAYERS, BLOCKS, HEADS, SLOTS, CHANNELS = 3, 6, 2, 4, 8
WIDTH = 2 * CHANNELS
ARRANGED = {
    # What a backend may do with a cache of logical shape [blocks, heads, slots, K|V].
    "heads first": (0, 1, 2, 3, 4),
    "tokens first": (0, 1, 3, 2, 4),
    "blocks outermost": (1, 0, 2, 3, 4),
}


def layout(kind: str, stored_as: torch.dtype) -> KVLayout:
    """Of a plain cache, or of one that keeps K of a block as [channels, slots], before all V."""
    numbers = torch.arange(SLOTS * WIDTH)
    if kind == "plain":
        keys, values = numbers.view(SLOTS, WIDTH).split(CHANNELS, 1)
    else:
        keys, values = numbers.chunk(2)
        keys, values = keys.view(CHANNELS, SLOTS).T, values.view(SLOTS, CHANNELS)
    return KVLayout(SLOTS, CHANNELS, keys.flatten(), values.flatten(), stored_as)


def caches(arranged: str, dtype: torch.dtype, shared: bool = True) -> list[torch.Tensor]:
    """All layers' caches, in one allocation or in one each, of different numbers (as bytes)."""
    order = ARRANGED[arranged]
    shape = (LAYERS, BLOCKS, HEADS, SLOTS, WIDTH)
    count = LAYERS * BLOCKS * HEADS * SLOTS * WIDTH
    memory = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    inverse = [order.index(dim) for dim in range(5)]
    made = memory.view([shape[dim] for dim in order]).permute(inverse)
    return [layer if shared else layer.clone(memory_format=torch.preserve_format) for layer in made]


def bytes_of(cache: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """[blocks, heads, slots, K then V as bytes], however they are stored."""
    region = cache.contiguous().view(BLOCKS, HEADS, -1)
    places = torch.cat((layout.keys.view(SLOTS, -1), layout.values.view(SLOTS, -1)), 1)
    return region[:, :, places].contiguous().view(torch.uint8).clone()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8]
)
@pytest.mark.parametrize("kind", ["plain", "keys transposed"])
@pytest.mark.parametrize("arranged", ARRANGED)
def test_each_layer_and_head_moves_its_own_tokens(
    arranged: str, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    made = caches(arranged, dtype)
    how = layout(kind, dtype)
    if kind != "plain" and arranged == "tokens first":
        pytest.skip("heads lie between slots there, so a block has no region to transpose")
    raw = [cache.view(torch.uint8) if dtype.itemsize == 1 else cache for cache in made]
    before = [bytes_of(cache, how) for cache in raw]
    mover = TokenMover(made, [how] * LAYERS, SLOTS)
    assert mover.launches == (1 if kind == "plain" else 2), "for all layers"
    blocks = torch.tensor([4, 1, 3])
    moves = 5
    order = torch.rand(LAYERS, HEADS, 3 * SLOTS).argsort(-1)
    sources, targets = order[..., :moves].clone(), order[..., moves : 2 * moves].clone()
    sources[1, 0, -1] = targets[1, 0, -1]  # a move onto itself
    mover.move(blocks, sources, targets)
    for layer in range(LAYERS):
        wanted = before[layer].clone()
        for head in range(HEADS):
            for source, target in zip(
                sources[layer, head].tolist(), targets[layer, head].tolist(), strict=True
            ):
                to, at = blocks[target // SLOTS], blocks[source // SLOTS]
                wanted[to, head, target % SLOTS] = before[layer][at, head, source % SLOTS]
        assert torch.equal(bytes_of(raw[layer], how), wanted)


def test_caches_of_their_own_allocations_are_moved_one_by_one() -> None:
    torch.manual_seed(0)
    made = caches("tokens first", torch.float32, shared=False)
    how = layout("plain", torch.float32)
    mover = TokenMover(made, [how] * LAYERS, SLOTS)
    assert mover.launches == LAYERS
    expected = [cache.clone() for cache in made]
    for cache in expected:
        cache[2, :, 1] = cache[5, :, 3]
    at = torch.zeros(LAYERS, HEADS, 1, dtype=torch.int64)
    mover.move(torch.tensor([2, 5]), at + SLOTS + 3, at + 1)
    for cache, wanted in zip(made, expected, strict=True):
        assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))


def test_a_backend_may_split_the_engines_blocks() -> None:
    """Blocks of 8 tokens for the engine, of 4 in the cache."""
    torch.manual_seed(0)
    made = caches("heads first", torch.float32)
    mover = TokenMover(made, [layout("plain", torch.float32)] * LAYERS, 2 * SLOTS)
    expected = [cache.clone() for cache in made]
    for cache in expected:
        cache[2 * 1 + 1, :, 2] = cache[2 * 2, :, 3]
    at = torch.zeros(LAYERS, HEADS, 1, dtype=torch.int64)
    mover.move(torch.tensor([1, 2]), at + 8 + 3, at + SLOTS + 2)
    for cache, wanted in zip(made, expected, strict=True):
        assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))


def test_much_is_moved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from memshare.kv import moves

    torch.manual_seed(0)
    made, how = caches("blocks outermost", torch.bfloat16), layout("plain", torch.bfloat16)
    expected = [cache.clone() for cache in made]
    at = torch.zeros(LAYERS, HEADS, 1, dtype=torch.int64)
    for cache in expected:
        cache[0, :, 0] = cache[3, :, 2]
    monkeypatch.setattr(moves, "_BYTES_AT_ONCE", 1)
    TokenMover(made, [how] * LAYERS, SLOTS).move(torch.tensor([0, 3]), at + SLOTS + 2, at)
    for cache, wanted in zip(made, expected, strict=True):
        assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("arranged", ARRANGED)
def test_a_gpu_moves_what_a_cpu_moves(arranged: str) -> None:
    torch.manual_seed(0)
    here = caches(arranged, torch.bfloat16)
    how = layout("plain", torch.bfloat16)
    storage = here[0].untyped_storage()
    memory = torch.empty(0, dtype=torch.bfloat16, device="cuda").set_(storage.cuda())
    there = [
        memory.as_strided(cache.shape, cache.stride(), cache.storage_offset()) for cache in here
    ]
    order = torch.rand(LAYERS, HEADS, 3 * SLOTS).argsort(-1)
    sources, targets, blocks = order[..., :5], order[..., 5:10], torch.tensor([4, 1, 3])
    TokenMover(here, [how] * LAYERS, SLOTS).move(blocks, sources, targets)
    mover = TokenMover(there, [how] * LAYERS, SLOTS)
    assert mover.launches == 1
    mover.move(blocks.cuda(), sources.cuda(), targets.cuda())
    for cpu, gpu in zip(here, there, strict=True):
        assert torch.equal(cpu.view(torch.uint8), gpu.cpu().view(torch.uint8))
