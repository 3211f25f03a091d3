"""Turning keys against rotating them by the table itself, as vLLM does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memshare.kv.rotary import Rotation, RotationUnknown

POSITIONS = 512
HEAD = 16


# ---- tables, written as vllm/model_executor/layers/rotary_embedding/ writes them ----


def frequencies(dim: int, base: float = 1e4) -> Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)


def table(inv_freq: Tensor, positions: int = POSITIONS, scale: float = 1.0) -> Tensor:
    """``[positions, rotary_dim]``: cosines, then sines, all times ``scale``."""
    angles = torch.einsum("i,j->ij", torch.arange(positions, dtype=torch.float), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def yarn(dim: int, factor: float = 4.0, positions: int = POSITIONS) -> Tensor:
    """High frequencies as they are, low ones slowed down, all lengths scaled."""
    plain = frequencies(dim)
    ramp = torch.linspace(-0.5, 1.5, dim // 2).clamp(0, 1)
    mixed = plain * (1 - ramp) + plain / factor * ramp
    return table(mixed, positions, scale=0.1 * math.log(factor) + 1.0)


def llama3(dim: int) -> Tensor:
    plain = frequencies(dim, base=5e5)
    slow = 2 * math.pi / plain > 64
    return table(torch.where(slow, plain / 8.0, plain))


def longrope(dim: int) -> Tensor:
    """Phi-3: factors for short texts, then another table of factors for long ones."""
    plain = frequencies(dim)
    short, long = torch.linspace(1.0, 1.2, dim // 2), torch.linspace(1.0, 30.0, dim // 2)
    return torch.cat((table(plain / short, 256), table(plain / long, POSITIONS)))


def dynamic(dim: int) -> Tensor:
    """A base that grows with the position: an angle that is not linear in it."""
    positions = torch.arange(POSITIONS).float()[:, None]
    angles = positions * (1e4 * (1 + positions / 64)) ** -(torch.arange(0, dim, 2) / dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotate(keys: Tensor, positions: Tensor, cache: Tensor, neox: bool) -> Tensor:
    """What vLLM does to ``[blocks, heads, slots, channels]`` at ``[blocks, slots]`` positions."""
    cos, sin = cache.float()[positions][:, None].chunk(2, dim=-1)
    dim = cache.shape[1]
    turned, rest = keys[..., :dim], keys[..., dim:]
    if neox:
        x, y = turned.chunk(2, dim=-1)
        turned = torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1)
    else:
        x, y = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


LINEAR = {
    "plain": table(frequencies(HEAD)),
    "partial": table(frequencies(8)),
    "linear scaling": table(frequencies(HEAD) / 4.0),
    "NTK": table(frequencies(HEAD, base=1e6)),
    "Llama 3": llama3(HEAD),
    "YaRN": yarn(HEAD),
    "partial YaRN": yarn(8),
}
tables = pytest.mark.parametrize("cache", LINEAR.values(), ids=LINEAR)
styles = pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
types = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@tables
@styles
def test_turning_is_rotating_at_the_other_position(cache: Tensor, neox: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(60, 2, 4, HEAD, generator=draw)
    slots = torch.arange(4)
    starts, ends = torch.randint(0, POSITIONS - 4, (2, 60), generator=draw)
    ends[:10] = starts[:10] + 1 - 2 * (starts[:10] > 0)  # neighbours, too
    cached = rotate(keys, starts[:, None] + slots, cache, neox)
    wanted = rotate(keys, ends[:, None] + slots, cache, neox)
    turned = Rotation.from_cache(cache, neox).turn(cached, ends - starts)
    torch.testing.assert_close(turned, wanted, atol=2e-4, rtol=0)
    # Negative controls: standing still, turning the wrong way, and the other style are all seen.
    for wrong in (
        cached,
        Rotation.from_cache(cache, neox).turn(cached, starts - ends),
        Rotation.from_cache(cache, not neox).turn(cached, ends - starts),
    ):
        off = (wrong - wanted).flatten(1).abs().amax(1)
        assert (off[starts != ends] > 1e-3).all()


@tables
@styles
@types
def test_turning_by_nothing_changes_no_bit(cache: Tensor, neox: bool, dtype: torch.dtype) -> None:
    keys = torch.randn(5, 2, 4, HEAD, generator=torch.Generator().manual_seed(0))
    keys *= torch.logspace(-20, 20, HEAD)
    steps = torch.tensor([0, 3, 0, -5, 0])
    before = keys.clone()
    turned = Rotation.from_cache(cache.to(dtype), neox).turn(keys, steps)
    still = steps == 0
    assert torch.equal(turned[still], keys[still])
    assert not torch.equal(turned[~still], keys[~still])
    assert torch.equal(keys, before), "the argument must not be modified"


@styles
def test_channels_beyond_the_rotary_ones_stay(neox: bool) -> None:
    keys = torch.randn(2, 1, 4, HEAD, generator=torch.Generator().manual_seed(0))
    turned = Rotation.from_cache(table(frequencies(8)), neox).turn(keys, torch.tensor([9, -9]))
    assert torch.equal(turned[..., 8:], keys[..., 8:])
    assert not torch.equal(turned[..., :8], keys[..., :8])


@styles
def test_a_turn_keeps_lengths_though_yarn_scales(neox: bool) -> None:
    keys = torch.randn(2, 1, 4, HEAD, generator=torch.Generator().manual_seed(0))
    turned = Rotation.from_cache(yarn(HEAD), neox).turn(keys, torch.tensor([100, -100]))
    torch.testing.assert_close(turned.norm(dim=-1), keys.norm(dim=-1))


@types
@pytest.mark.parametrize("positions", [1, 2, 3, 64, 8192, 131_072])
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_rounded_tables_of_every_length_are_known(
    base: float, positions: int, dtype: torch.dtype
) -> None:
    """float32 angles of a long table are off by up to 0.01: that is no other law."""
    Rotation.from_cache(table(frequencies(8, base), positions).to(dtype), neox=True)


@types
@pytest.mark.parametrize("make", [longrope, dynamic])
def test_tables_whose_turns_do_not_add_up_are_refused(
    make: Callable[[int], Tensor], dtype: torch.dtype
) -> None:
    with pytest.raises(RotationUnknown, match="is not turning by"):
        Rotation.from_cache(make(HEAD).to(dtype), neox=True)


@pytest.mark.parametrize(
    ("cache", "why"),
    [
        (torch.zeros(POSITIONS, HEAD), "does not hold cosines"),
        (torch.full((POSITIONS, HEAD), math.nan), "does not hold cosines"),
        (torch.ones(POSITIONS, HEAD - 1), "shape"),
        (torch.ones(2, POSITIONS, HEAD), "shape"),
        (torch.randn(POSITIONS, HEAD, generator=torch.Generator().manual_seed(0)), "not turning"),
        (table(frequencies(HEAD)).flip(-1), "not turning"),  # sines, then cosines
        (table(frequencies(HEAD)).reshape(-1, 2, HEAD // 2).mT.flatten(1), "does not hold"),
    ],
)
def test_what_is_no_table_is_refused(cache: Tensor, why: str) -> None:
    with pytest.raises(RotationUnknown, match=why):
        Rotation.from_cache(cache, neox=True)
