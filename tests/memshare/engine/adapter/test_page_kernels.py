"""The Triton kernels of page selection against torch, by Triton's interpreter; and compiled."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from memshare.config import SelectionConfig
from memshare.mechanisms.selection.bounds import PageBounds, PageWrites, split_signs
from memshare.mechanisms.selection.choice import PageChooser
from tests.memshare.engine.adapter.compiling import CODE, compiled

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

PAGES, HEADS, SIZE = 40, 2, 4
CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels, run by Triton's interpreter."""
    pytest.importorskip("triton", reason="there is none for this machine")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from memshare.engine.vllm_0_32.view import page_kernels

    monkeypatch.setattr(tl, "sum", InterpretedFunction(tl.sum.fn))  # a kernel itself
    for name in ("fold_keys_kernel", "score_pages_kernel"):
        interpreted = InterpretedFunction(getattr(page_kernels, name).fn)
        monkeypatch.setattr(page_kernels, name, interpreted)
    return page_kernels


@st.composite
def slot_mappings(draw: st.DrawFn) -> np.ndarray:
    """Requests in a step: a token, or a chunk that may begin within a page; padding behind."""
    pages = iter(draw(st.permutations(range(PAGES))))
    slots: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        held = [next(pages) for _ in range(4)]
        first = draw(st.integers(0, SIZE))
        chunk = range(first, first + draw(st.sampled_from([1, 1, 2, SIZE, 9])))
        slots += [held[at // SIZE] * SIZE + at % SIZE for at in chunk]
    return np.array(slots + [-1] * draw(st.integers(0, 2)), np.int64)


def test_bounds_as_in_torch(kernels: Any) -> None:
    @settings(max_examples=25, deadline=None)
    @given(slot_mappings(), st.sampled_from([4, 6]), st.integers(0, 2**31))
    def check(slots: np.ndarray, channels: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(len(slots) + 1, HEADS, channels, generator=generator)
        wanted = PageBounds(PAGES, HEADS, channels, torch.float32, CPU)
        wanted.highs.copy_(torch.randn(wanted.highs.shape, generator=generator))
        highs, before = wanted.highs.clone(), wanted.highs.clone()
        wanted.write(keys[:-1], PageWrites.of(slots, SIZE))
        kernels.fold_keys(keys, torch.from_numpy(slots), highs, SIZE)
        assert torch.equal(highs, wanted.highs)
        assert not torch.equal(highs, before)

    check()


def test_scores_as_in_torch(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PAGES", 8)  # several programs for a request

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.integers(1, 19 * SIZE), min_size=1, max_size=3),
        st.sampled_from([(4, 1), (6, 3)]),
        st.integers(0, 2**31),
    )
    def check(tokens: list[int], shape: tuple[int, int], seed: int) -> None:
        channels, group = shape
        generator = torch.Generator().manual_seed(seed)
        lens = np.array(tokens, np.int32)
        bounds = PageBounds(PAGES, HEADS, channels, torch.float32, CPU)
        bounds.highs.copy_(torch.randn(bounds.highs.shape, generator=generator))
        table = torch.randint(PAGES, (len(lens), 19), generator=generator).int()
        queries = torch.randn(len(lens), HEADS * group, channels, generator=generator)
        scores = torch.zeros(len(lens) * HEADS, 19)
        kernels.score_pages(
            queries, bounds.highs, table, torch.from_numpy(lens), (1, 2), SIZE, scores
        )
        config = SelectionConfig(budget=0.5, first_pages=1, recent_pages=2)
        plan = PageChooser(config, HEADS, SIZE, PAGES).begin(table, lens)
        width = plan.bias.shape[1]
        held = bounds.highs.view(-1, 2 * channels)[plan.candidates]
        own = split_signs(queries).view(len(scores), group, -1)
        wanted = torch.bmm(own, held.transpose(1, 2)).amax(1) + plan.bias
        torch.testing.assert_close(scores[:, :width], wanted)
        assert (scores[:, width:] == -torch.inf).all()

    check()


COMPILE = """
from memshare.engine.vllm_0_32.view import page_kernels as kernels

shape = {"size": 16, "channels": 128, "tile": 128}
fold = dict.fromkeys(("keys", "highs"), "*bf16") | {"slots": "*i64"} | dict.fromkeys(
    ("tokens", "key_stride", "key_head_stride", "page_stride", "head_stride"), "i32")
score = dict.fromkeys(("queries", "highs"), "*bf16") | dict.fromkeys(("table", "lens"), "*i32")
score |= {"scores": "*fp32"} | dict.fromkeys(
    ("query_stride", "query_head_stride", "page_stride", "head_stride", "table_stride",
     "score_stride", "first", "recent"), "i32")
more = {"heads": 8, "group": 4, "pages": 32}
for kernel, signature, constants in (
    (kernels.fold_keys_kernel, fold, shape), (kernels.score_pages_kernel, score, shape | more)
):
    order = [name for name in kernel.arg_names if name in signature]
    compile_for_gpus(kernel, {name: signature[name] for name in order}, constants)
"""


def test_the_kernels_compile_for_gpus_that_are_not_here() -> None:
    made = compiled(COMPILE)
    assert [code for code, _ in made] == CODE * 2
    assert all(size > 1000 for _, size in made)
