"""Tables without null entries: torch, and the Triton kernel, against plain Python."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from memshare.engine.vllm_0_32.view import squeeze
from tests.memshare.engine.adapter.compiling import CODE, compiled
from tests.memshare.engine.adapter.tables import assert_squeezed, squeezed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """A table with null entries below each row's last; lengths; block size; ids that are null."""
    size, nulls = draw(st.sampled_from([1, 16, 32])), draw(st.sampled_from([1, 2, 4]))
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    seed, share = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.3, 0.9]))
    rng = np.random.default_rng(seed)
    table = rng.integers(nulls, 500, (rows, width))
    lens = rng.integers(0, width * size + 1, rows)
    null = rng.random((rows, width)) < share
    null &= np.arange(width) < (-(-lens // size) - 1)[:, None]
    table[null] = rng.integers(0, nulls, null.sum())
    return (
        torch.from_numpy(table.astype(np.int32)),
        torch.from_numpy(lens.astype(np.int32)),
        size,
        nulls,
    )


@settings(max_examples=200, deadline=None)
@given(tables())
def test_null_entries_are_squeezed_out_and_nothing_else_changes(case: Any) -> None:
    table, lens, size, nulls = case
    before = table.clone(), lens.clone()
    wanted = squeezed(*case)
    out, out_lens = torch.full_like(table, 999), torch.zeros_like(lens)
    squeeze.squeeze_nulls(table, lens, size, nulls, out, out_lens)
    assert_squeezed(out, out_lens, wanted)
    gone = [length != int(old) for (_, length), old in zip(wanted, lens, strict=True)]
    rows = np.flatnonzero(gone).tolist()
    squeezer = squeeze.RowSqueezer()
    squeezer.squeeze(table, lens, rows, size, nulls, out.zero_(), out_lens.zero_())
    assert_squeezed(out, out_lens, wanted)
    assert torch.equal(table, before[0])
    assert torch.equal(lens, before[1])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rows_that_change_from_step_to_step(data: st.DataObject) -> None:
    """Requests grow, lose entries, take each other's rows and come anew."""
    size, nulls, width = 4, 2, 12
    squeezer = squeeze.RowSqueezer()
    blocks = st.lists(st.sampled_from([0, 1, *range(2, 9)]), min_size=width, max_size=width)
    table = torch.tensor(data.draw(st.lists(blocks, min_size=4, max_size=4)), dtype=torch.int32)
    lens = torch.tensor(data.draw(st.lists(st.integers(1, 40), min_size=4, max_size=4)))
    for _ in range(6):
        row, other = data.draw(st.permutations(range(4)))[:2]
        match data.draw(st.sampled_from(["same", "grow", "drop", "swap", "new"])):
            case "grow":
                lens[row] = min(int(lens[row]) + data.draw(st.integers(1, 5)), width * size)
            case "drop":
                table[row, data.draw(st.integers(0, width - 1))] = 1
            case "swap":
                table[[row, other]], lens[[row, other]] = table[[other, row]], lens[[other, row]]
            case "new":
                table[row] = torch.tensor(data.draw(blocks), dtype=torch.int32)
        out, out_lens = torch.zeros_like(table), torch.zeros(4, dtype=torch.int32)
        squeezer.squeeze(table, lens.int(), range(4), size, nulls, out, out_lens)
        assert_squeezed(out, out_lens, squeezed(table, lens, size, nulls))


# ---- the kernel for GPUs ----


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton kernel, run by Triton's interpreter."""
    pytest.importorskip("triton", reason="there is none for this machine")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from memshare.engine.vllm_0_32.view import squeeze_kernel

    for name in ("sum", "cumsum"):  # kernels themselves
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))

    interpreted = InterpretedFunction(squeeze_kernel.squeeze_kernel.fn)
    monkeypatch.setattr(squeeze_kernel, "squeeze_kernel", interpreted)
    return squeeze_kernel


def test_the_kernel_does_what_torch_does(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_TILE", 16)  # rows of several tiles

    @settings(max_examples=60, deadline=None)
    @given(tables())
    def check(case: Any) -> None:
        table, lens, size, nulls = case
        wide = torch.zeros(table.shape[0], table.shape[1] + 7, dtype=torch.int32)
        out, out_lens = wide[:, : table.shape[1]], torch.zeros_like(lens)
        kernel.squeeze_nulls(table, lens, size, nulls, out, out_lens)
        assert_squeezed(out, out_lens, squeezed(*case))
        assert not wide[:, table.shape[1] :].any(), "it writes within its columns"

    check()


COMPILE = """
from memshare.engine.vllm_0_32.view.squeeze_kernel import squeeze_kernel

signature = dict.fromkeys(("table", "lens", "out", "out_lens"), "*i32")
signature |= dict.fromkeys(("table_stride", "out_stride", "width"), "i32")
compile_for_gpus(squeeze_kernel, signature, {"block_size": 16, "nulls": 1, "tile": 1024})
"""


@pytest.mark.proves("compaction graphs", how="parts")
def test_the_kernel_compiles_for_gpus_that_are_not_here() -> None:
    made = compiled(COMPILE)
    assert [code for code, _ in made] == CODE
    assert all(size > 1000 for _, size in made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
def test_the_kernel_on_a_gpu() -> None:
    from memshare.engine.vllm_0_32.view.squeeze_kernel import squeeze_nulls

    rng = np.random.default_rng(0)
    table = rng.integers(1, 60000, (256, 3000)).astype(np.int32)
    table[rng.random(table.shape) < 0.5] = 0
    table[:, -1] = 5
    lens = np.full(256, 3000 * 16 - 3, np.int32)
    here, here_lens = torch.from_numpy(table), torch.from_numpy(lens)
    there, there_lens = here.cuda(), here_lens.cuda()
    out, out_lens = torch.zeros_like(there), torch.zeros_like(there_lens)
    squeeze_nulls(there, there_lens, 16, 1, out, out_lens)
    assert_squeezed(out.cpu(), out_lens.cpu(), squeezed(here, here_lens, 16, 1))
