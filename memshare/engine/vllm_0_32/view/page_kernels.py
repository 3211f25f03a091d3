"""Triton kernels of page selection: bounds of the keys that a step writes, and the scores of pages.

They read slot mapping, tables and lengths on the device, so that a captured graph can contain them;
``topk`` and ``gather`` of torch do the rest. No backend calls them yet: GPUs are refused
(``selection_setup``). What they compute is what
:class:`~memshare.mechanisms.selection.bounds.PageBounds` and
:class:`~memshare.mechanisms.selection.choice.PageChooser` compute in torch.

Imported only where Triton runs. They lie in a module of their own because Triton reads its source.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_PAGES = 32  # that one program scores


@triton.jit
def fold_keys_kernel(
    keys,
    slots,
    highs,
    tokens,
    key_stride,
    key_head_stride,
    page_stride,
    head_stride,
    size: tl.constexpr,
    channels: tl.constexpr,
    tile: tl.constexpr,
):
    """The program of a page's first token in the step folds in all of them, of one head."""
    token = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    before = tl.load(slots + token - 1, mask=token > 0, other=-1)
    page = slot // size
    if (slot >= 0) & ((before < 0) | (before // size != page)):
        at = tl.arange(0, tile)
        inside = at < channels
        out = highs + page * page_stride + head * head_stride + at
        held = inside & (slot % size != 0)  # in its first slot, a page begins anew
        high = tl.load(out, mask=held, other=-float("inf")).to(tl.float32)
        low = tl.load(out + channels, mask=held, other=-float("inf")).to(tl.float32)
        for step in range(0, size):
            there = token + step < tokens
            other = tl.load(slots + token + step, mask=there, other=-1)
            same = (other >= 0) & (other // size == page)
            place = (token + step) * key_stride + head * key_head_stride
            key = tl.load(keys + place + at, mask=inside & same, other=0.0).to(tl.float32)
            high = tl.where(same, tl.maximum(high, key), high)
            low = tl.where(same, tl.maximum(low, -key), low)
        tl.store(out, high.to(highs.dtype.element_ty), mask=inside)
        tl.store(out + channels, low.to(highs.dtype.element_ty), mask=inside)


@triton.jit
def score_pages_kernel(
    queries,
    highs,
    table,
    lens,
    scores,
    query_stride,
    query_head_stride,
    page_stride,
    head_stride,
    table_stride,
    score_stride,
    first,
    recent,
    heads: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    channels: tl.constexpr,
    tile: tl.constexpr,
    pages: tl.constexpr,
):
    """One program scores some pages of a request for one KV head."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * pages + tl.arange(0, pages)
    used = (tl.load(lens + request) + size - 1) // size
    there = columns < used
    ids = tl.load(table + request * table_stride + columns, mask=there, other=0).to(tl.int64)
    at = tl.arange(0, tile)
    inside = at < channels
    place = highs + ids[:, None] * page_stride + head * head_stride + at[None, :]
    mask = there[:, None] & inside[None, :]
    high = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    low = tl.load(place + channels, mask=mask, other=0.0).to(tl.float32)
    best = tl.full([pages], -float("inf"), tl.float32)
    for member in range(0, group):
        own = queries + request * query_stride + (head * group + member) * query_head_stride
        query = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
        up, down = tl.maximum(query, 0.0), tl.maximum(-query, 0.0)
        bound = tl.sum(high * up[None, :] + low * down[None, :], 1)
        best = tl.maximum(best, bound)
    best = tl.where((columns < first) | (columns >= used - recent), float("inf"), best)
    best = tl.where(there, best, -float("inf"))
    row = request * heads + head
    tl.store(scores + row * score_stride + columns, best, mask=columns < score_stride)


def fold_keys(keys: Tensor, slots: Tensor, highs: Tensor, page_size: int) -> None:
    """See :meth:`PageBounds.write`, of which ``highs`` is changed in place.

    Args:
        keys: ``[tokens or more, heads, channels]``, channels contiguous.
        slots: ``[tokens]`` int64; negative where a token is not written. Those of a page follow
            each other.
        highs: ``[pages, heads, 2 * channels]``.
        page_size: token slots in a page.
    """
    tokens, (heads, channels) = len(slots), keys.shape[1:]
    fold_keys_kernel[(tokens, heads)](
        keys, slots, highs, tokens, keys.stride(0), keys.stride(1), highs.stride(0),
        highs.stride(1), size=page_size, channels=channels,
        tile=triton.next_power_of_2(channels),
    )  # fmt: skip


def score_pages(
    queries: Tensor,
    highs: Tensor,
    table: Tensor,
    lens: Tensor,
    always: tuple[int, int],
    page_size: int,
    scores: Tensor,
) -> None:
    """Upper bounds of all pages of some requests, each KV head's by its best query head.

    Args:
        queries: ``[requests, query heads, channels]``, channels contiguous.
        highs: ``[pages, heads, 2 * channels]``.
        table: ``[requests, width]`` int32 ids of pages, without holes.
        lens: ``[requests]`` int32 tokens under them.
        always: how many first and how many recent pages are always read; they score infinity.
        page_size: token slots in a page.
        scores: ``[requests * heads, width]`` float32; minus infinity behind a request's end.
    """
    requests, query_heads, channels = queries.shape
    heads = highs.shape[1]
    score_pages_kernel[(requests, heads, triton.cdiv(table.shape[1], _PAGES))](
        queries, highs, table, lens, scores, queries.stride(0), queries.stride(1),
        highs.stride(0), highs.stride(1), table.stride(0), scores.stride(0), *always,
        heads=heads, group=query_heads // heads, size=page_size, channels=channels,
        tile=triton.next_power_of_2(channels), pages=_PAGES,
    )  # fmt: skip
