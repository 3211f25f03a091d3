"""Stage two's distances against loops over layers, heads and pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memshare.kv.rotary import Rotation
from memshare.kv.similarity import (
    LayerBlocks,
    Norm,
    PairSums,
    TokenScale,
    similarity_sums,
    token_similarity_sums,
)

LAYERS, HEADS, SLOTS, CHANNELS = 2, 3, 4, 8
PAIRS, SAMPLES = 4, 4
POSITIONS = 256
NORMS: tuple[Norm, Norm] = ("paper", "relative")
norms = pytest.mark.parametrize("norm", NORMS)
types = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def rotation() -> Rotation:
    angles = torch.outer(torch.arange(POSITIONS).float(), 0.5 ** torch.arange(CHANNELS // 2))
    return Rotation.from_cache(torch.cat((angles.cos(), angles.sin()), dim=1), neox=True)


@dataclass
class Blocks:
    """What a rank is given to compare."""

    layers: list[tuple[LayerBlocks, LayerBlocks, LayerBlocks]]
    target_positions: Tensor
    donor_positions: Tensor
    sample_positions: Tensor

    def sums(self, norm: Norm) -> PairSums:
        return similarity_sums(
            self.layers,
            self.target_positions,
            self.donor_positions,
            self.sample_positions,
            norm,
        )

    def similarity(self, norm: Norm) -> Tensor:
        sums = self.sums(norm)
        return sums.total / sums.count

    def map(self, change: Callable[[Tensor], Tensor]) -> Blocks:
        """The same with every K and V changed."""

        def of(blocks: LayerBlocks) -> LayerBlocks:
            keys, values = (None if t is None else change(t) for t in (blocks.keys, blocks.values))
            return LayerBlocks(keys, values, blocks.rotation)

        layers = [(of(t), of(d), of(s)) for t, d, s in self.layers]
        return Blocks(layers, self.target_positions, self.donor_positions, self.sample_positions)


def random_blocks(
    seed: int = 0, tensors: str = "kv", rotated: bool = True, dtype: torch.dtype = torch.float32
) -> Blocks:
    draw = torch.Generator().manual_seed(seed)
    turn = rotation() if rotated else None

    def blocks(count: int) -> LayerBlocks:
        def tensor() -> Tensor:
            return torch.randn(count, HEADS, SLOTS, CHANNELS, generator=draw).to(dtype)

        keys, values = tensor(), tensor()
        return LayerBlocks(
            keys if "k" in tensors else None, values if "v" in tensors else None, turn
        )

    layers = []
    for _ in range(LAYERS):
        target, donor, sample = blocks(PAIRS), blocks(PAIRS), blocks(SAMPLES)
        for t, d in ((target.keys, donor.keys), (target.values, donor.values)):
            if t is not None and d is not None:  # from equal to unlike
                d.copy_(t + d * torch.linspace(0, 2, PAIRS).to(dtype)[:, None, None, None])
        layers.append((target, donor, sample))

    def positions(count: int) -> Tensor:
        return torch.randint(0, POSITIONS // 2, (count,), generator=draw)

    return Blocks(layers, positions(PAIRS), positions(PAIRS), positions(SAMPLES))


def numbers(block: Tensor) -> list[float]:
    """A block's numbers as Python floats (double precision)."""
    return block.flatten().tolist()


def length(a: list[float], b: list[float] | None = None) -> float:
    return math.dist(a, b if b is not None else [0.0] * len(a))


def reference(blocks: Blocks, norm: Norm) -> list[float]:
    """One pair, layer, tensor and head at a time, in double precision."""

    def moved(layer: LayerBlocks, name: str, pair: int, head: int, steps: Tensor) -> list[float]:
        block = getattr(layer, name)[pair : pair + 1, head : head + 1].float()
        if name == "keys" and layer.rotation is not None and norm == "relative":
            block = layer.rotation.turn(block, steps[pair : pair + 1])
        return numbers(block)

    steps = blocks.target_positions - blocks.donor_positions
    result = []
    for pair in range(PAIRS):
        scores = []
        for target, donor, sample in blocks.layers:
            for name in ("keys", "values"):
                if getattr(target, name) is None:
                    continue
                for head in range(HEADS):
                    a = numbers(getattr(target, name)[pair, head])
                    b = moved(donor, name, pair, head, steps)
                    if norm == "paper":
                        scores.append(1.0 - length(a, b) / (length(a) + length(b)))
                        continue
                    drawn = [
                        moved(sample, name, s, head, -blocks.sample_positions)
                        for s in range(SAMPLES)
                    ]
                    # The root mean square over all pairs of different blocks of the sample.
                    squares = [length(x, y) ** 2 for i, x in enumerate(drawn) for y in drawn[:i]]
                    scores.append(1.0 - length(a, b) / math.sqrt(sum(squares) / len(squares)))
        result.append(sum(scores) / len(scores))
    return result


@norms
@types
@pytest.mark.parametrize(
    ("tensors", "rotated"), [("kv", True), ("k", True), ("v", True), ("kv", False)]
)
def test_agrees_with_plain_loops(
    norm: Norm, dtype: torch.dtype, tensors: str, rotated: bool
) -> None:
    blocks = random_blocks(3, tensors, rotated, dtype)
    sums = blocks.sums(norm)
    assert sums.total.dtype == torch.float32
    assert sums.count == LAYERS * HEADS * len(tensors)
    assert (sums.total / sums.count).tolist() == pytest.approx(reference(blocks, norm), abs=1e-5)


@norms
@types
def test_identical_blocks_are_exactly_one(norm: Norm, dtype: torch.dtype) -> None:
    blocks = random_blocks(dtype=dtype)
    same = Blocks(
        [(target, target, sample) for target, _, sample in blocks.layers],
        blocks.target_positions,
        blocks.target_positions,
        blocks.sample_positions,
    )
    assert same.similarity(norm).tolist() == [1.0] * PAIRS
    # Negative control: one number in one head of one layer is a little off.
    target, _, sample = same.layers[1]
    assert target.values is not None
    nudged = target.values.clone()
    nudged[:, 2, 1, 3] *= 1.02
    same.layers[1] = (target, LayerBlocks(target.keys, nudged, target.rotation), sample)
    assert (same.similarity(norm) < 1.0).all()


def test_relative_compares_keys_at_the_same_position() -> None:
    blocks = random_blocks(tensors="k")
    turn = rotation()
    layers = []
    for target, _, sample in blocks.layers:
        assert target.keys is not None
        there = turn.turn(target.keys, blocks.donor_positions - blocks.target_positions)
        layers.append((target, LayerBlocks(there, None, turn), sample))
    moved = Blocks(layers, blocks.target_positions, blocks.donor_positions, blocks.sample_positions)
    assert moved.similarity("relative").tolist() == pytest.approx([1.0] * PAIRS, abs=1e-5)
    # Negative control: the paper's distance, on keys as cached, sees unlike blocks.
    assert moved.similarity("paper").max() < 0.95


@norms
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, HEADS - 1)))
def test_sums_of_head_shards_are_the_whole(norm: Norm, seed: int, cuts: set[int]) -> None:
    blocks = random_blocks(seed)
    whole = blocks.sums(norm)
    edges = [0, *sorted(cuts), HEADS]
    parts = [blocks.map(lambda t, a=a, b=b: t[:, a:b]).sums(norm) for a, b in pairwise(edges)]
    assert sum(part.count for part in parts) == whole.count
    total = torch.stack([part.total for part in parts]).sum(0)
    torch.testing.assert_close(total, whole.total, rtol=1e-5, atol=1e-5)


@norms
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_a_pair_does_not_depend_on_its_neighbours(norm: Norm, seed: int) -> None:
    blocks = random_blocks(seed)
    one = seed % PAIRS

    def of(layer: LayerBlocks) -> LayerBlocks:
        assert layer.keys is not None
        assert layer.values is not None
        return LayerBlocks(layer.keys[one : one + 1], layer.values[one : one + 1], layer.rotation)

    alone = Blocks(
        [(of(target), of(donor), sample) for target, donor, sample in blocks.layers],
        blocks.target_positions[one : one + 1],
        blocks.donor_positions[one : one + 1],
        blocks.sample_positions,
    )
    torch.testing.assert_close(alone.similarity(norm)[0], blocks.similarity(norm)[one])


@types
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_paper_lies_within_zero_and_one(dtype: torch.dtype, seed: int, scale: float) -> None:
    blocks = random_blocks(seed, dtype=dtype).map(lambda t: t * scale)
    opposite = [
        (target, LayerBlocks(-target.keys, -target.values, None), sample)
        for target, _, sample in blocks.layers
    ]
    for layers in (blocks.layers, opposite):
        blocks.layers = layers
        similarity = blocks.similarity("paper")
        assert (similarity >= -1e-6).all()
        assert (similarity <= 1.0).all()
    torch.testing.assert_close(similarity, torch.zeros(PAIRS))


def test_paper_does_not_look_at_the_sample() -> None:
    blocks = random_blocks()
    empty = LayerBlocks(torch.empty(0), torch.empty(0), None)
    blind = Blocks(
        [(target, donor, empty) for target, donor, _ in blocks.layers],
        blocks.target_positions,
        blocks.donor_positions,
        torch.empty(0, dtype=torch.int64),
    )
    assert torch.equal(blind.sums("paper").total, blocks.sums("paper").total)


def test_random_blocks_are_near_zero_under_relative() -> None:
    draw = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(LAYERS):
        t, d, s = (
            LayerBlocks(None, 3 + 5 * torch.randn(n, HEADS, 16, 64, generator=draw), None)
            for n in (PAIRS, PAIRS, 32)
        )
        layers.append((t, d, s))
    zeros = torch.zeros(PAIRS, dtype=torch.int64)
    similarity = Blocks(layers, zeros, zeros, torch.zeros(32, dtype=torch.int64)).similarity(
        "relative"
    )
    assert similarity.abs().max() < 0.05


@norms
def test_zero_padded_heads_are_identical_and_never_nan(norm: Norm) -> None:
    def pad(t: Tensor) -> Tensor:
        return torch.cat((t, torch.zeros_like(t[:, :2])), dim=1)

    blocks = random_blocks()
    padded = blocks.map(pad)
    plain, more = blocks.sums(norm), padded.sums(norm)
    assert torch.isfinite(more.total).all()
    extra = 2 * 2 * LAYERS  # two heads in K and V of every layer
    assert more.count == plain.count + extra
    torch.testing.assert_close(more.total, plain.total + extra)


@norms
def test_the_default_type_of_torch_does_not_matter(norm: Norm) -> None:
    blocks = random_blocks(dtype=torch.bfloat16)
    expected = blocks.sums(norm).total
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        assert torch.equal(blocks.sums(norm).total, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@norms
def test_nothing_to_compare_gives_nothing(norm: Norm) -> None:
    blocks = random_blocks()
    blocks.layers = [
        (LayerBlocks(None, None, None), donor, sample) for _, donor, sample in blocks.layers
    ]
    sums = blocks.sums(norm)
    assert sums.count == 0
    assert sums.total.tolist() == [0.0] * PAIRS


def moments(tokens: Tensor) -> Tensor:
    """RMS distance of two random tokens per head, by looking at every pair."""
    pairs = (tokens[:, None] - tokens[None]).square().sum(-1)
    count = len(tokens)
    return (pairs.sum((0, 1)) / (count * (count - 1))).sqrt()


def test_the_scale_is_the_distance_of_random_tokens_however_they_come() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(60, HEADS, CHANNELS, generator=draw) * torch.tensor(
        [[[1.0], [2.0], [9.0]]]
    )
    tokens[:, 1] += 5.0  # a mean other than 0
    for sizes in ([60], [30, 30], [2, 1, 57], [1] * 60):
        scale = TokenScale()
        for part in tokens.split(sizes):
            scale.update(part)
        torch.testing.assert_close(scale.distance(), moments(tokens))


def test_the_scale_follows_the_newest_tokens() -> None:
    scale = TokenScale()
    draw = torch.Generator().manual_seed(0)
    for factor, batches in ((100.0, 20), (1.0, 200)):
        for _ in range(batches):
            scale.update(factor * torch.randn(4096, 1, 2, generator=draw))
    assert scale.distance().item() == pytest.approx(2.0, rel=0.2)


def test_token_similarities_are_those_of_a_loop() -> None:
    draw = torch.Generator().manual_seed(1)
    layers = []
    for _ in range(LAYERS):
        a = torch.randn(5, HEADS, CHANNELS, generator=draw)
        b = torch.randn(5, HEADS, CHANNELS, generator=draw)
        b[0] = a[0]
        scale = TokenScale()
        scale.update(torch.cat((a, b)))
        layers.append((a, b, scale))
    sums = token_similarity_sums(layers)
    assert sums.count == LAYERS * HEADS
    for n in range(5):
        loop = sum(
            1 - math.dist(a[n, h].tolist(), b[n, h].tolist()) / scale.distance()[h].item()
            for a, b, scale in layers
            for h in range(HEADS)
        )
        assert sums.total[n].item() == pytest.approx(loop, abs=1e-4)
    assert sums.total[0].item() == pytest.approx(sums.count)
    # Heads that a rank has alone add up to what one rank with all heads has.
    halves = [
        token_similarity_sums([(a[:, part], b[:, part], _part(s, part)) for a, b, s in layers])
        for part in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(halves[0].total + halves[1].total, sums.total)
    assert halves[0].count + halves[1].count == sums.count


def _part(scale: TokenScale, heads: slice) -> TokenScale:
    part = TokenScale()
    assert scale._mean is not None
    assert scale._spread is not None
    part._count, part._mean, part._spread = scale._count, scale._mean[heads], scale._spread[heads]
    return part
