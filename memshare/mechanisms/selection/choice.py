"""Which pages are read: how many follows from a request's length, which ones from the query.

How many is known before a step runs, and is the same in all layers, so that lengths, and with them
a kernel's work plan, are made once a step. Each KV head chooses for itself: what one head looks for
is not what another does, and reading a page for one head costs a backend nothing more where it can
treat ``(request, KV head)`` as a request of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.config import SelectionConfig
from memshare.core.token_map import TokenMap
from memshare.mechanisms.selection.bounds import PageBounds, split_signs
from memshare.mechanisms.selection.budget import Counts, pages_read

Places = tuple[Tensor, Tensor]
"""Rows of a layer's copy, and of its flattened ``[pages, heads]`` that go there; int64."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's choices, before any query is known. Rows are of ``(request, KV head)``, heads of a
    request together.

    Attributes:
        requests: how many choose.
        read: pages of a request that each of its heads reads, ``[requests]``.
        lens: tokens that each row reads, ``[rows]`` int32.
        candidates: ``[rows, most pages]`` int64 places in the flattened ``[pages, heads]``.
        bias: ``[rows, most pages]`` float32: what is always read, and what is behind a row's end.
        keep: ``[rows, 1]`` int64 pages that a row reads; None if it is the same for all.
        most: the greatest of ``read``.
        changed: what copies lack that are those of the step before; None if there are no copies.
        follows, is_now: marks of the step before, and of this one.
    """

    requests: int
    read: Counts
    lens: Tensor
    candidates: Tensor
    bias: Tensor
    keep: Tensor | None
    most: int
    changed: Places | None
    follows: object
    is_now: object


class PageChooser:
    """Chooses pages for the layers of one step after the other, in buffers that stay.

    On the host: a backend on CPUs has tables and lengths there. To score the pages of a request
    they must lie together; gathering them anew in each layer takes longer than scoring. So each
    layer keeps a copy in the order of the batch, in which only what has changed is replaced: pages
    that the step writes to, and rows that have become others.

    Attributes:
        heads: KV heads of a layer.
    """

    def __init__(self, config: SelectionConfig, heads: int, page_size: int, pages: int) -> None:
        """
        Args:
            config: with a budget.
            heads: KV heads of a layer.
            page_size: token slots in a page.
            pages: of the cache. Copies of a batch take no more than its bounds; a batch whose
                requests differ so much in length that they would is gathered anew.
        """
        self._config = config
        self.heads = heads
        self._token_map = TokenMap(page_size)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._versions = np.zeros(pages, np.int64)
        self._held = np.full((2, 0, 0), -1, np.int64)  # page and version, by request and column
        self._mark = object()

    def pages(self, lens: Counts) -> Counts:
        """Pages of requests of so many tokens."""
        return self._token_map.entries(lens)

    def pages_read(self, lens: Counts) -> Counts:
        """How many of them are read."""
        return pages_read(self._config, self.pages(lens))

    def changes(self, pages: npt.NDArray[np.int64]) -> None:
        """Bounds of these pages change, before the next choice."""
        self._versions[pages] += 1

    def begin(self, table: Tensor, lens: Counts) -> Plan:
        """Prepare a step, when it is known what it writes (:meth:`changes`).

        Args:
            table: ``[requests, width]`` int32 ids of each request's pages, without holes.
            lens: ``[requests]`` tokens under them, at least one each.
        """
        pages = self.pages(lens)
        read = pages_read(self._config, pages)
        heads, width = self.heads, int(pages.max())
        rows = len(lens) * heads
        candidates = self._buffer("candidates", rows * width, torch.int64).view(-1, heads, width)
        candidates.copy_(table[:, None, :width]).mul_(heads).add_(torch.arange(heads)[:, None])
        columns = np.arange(width)
        last = pages[:, None] - self._config.recent_pages
        bias = np.where((columns < self._config.first_pages) | (columns >= last), np.inf, 0.0)
        bias[columns >= pages[:, None]] = -np.inf
        kept = lens - (pages - read) * self._token_map.block_size
        alike = bool((read == read[0]).all())
        by_row = np.repeat(read, heads).astype(np.int64)
        changed = self._changed(table[:, :width].numpy().astype(np.int64))
        follows, self._mark = self._mark, object()
        return Plan(
            requests=len(lens),
            read=read,
            lens=torch.from_numpy(np.repeat(kept, heads).astype(np.int32)),
            candidates=candidates.view(rows, width),
            bias=torch.from_numpy(np.repeat(bias, heads, 0).astype(np.float32)),
            keep=None if alike else torch.from_numpy(by_row)[:, None],
            most=int(read.max()),
            changed=changed,
            follows=follows,
            is_now=self._mark,
        )

    def choose(self, plan: Plan, queries: Tensor, bounds: PageBounds) -> Tensor:
        """One layer's choice.

        Args:
            plan: of this step.
            queries: ``[requests, query heads, channels]``, heads that share a KV head together.
            bounds: of the layer.

        Returns:
            ``[requests * KV heads, most]`` int32 places in the flattened ``[pages, heads]``, in the
            order of the request's pages; what stands behind a row's length has no meaning. The
            buffer is overwritten by the next call.
        """
        rows, width = plan.candidates.shape
        signed = split_signs(queries).view(rows, -1, 2 * queries.shape[-1])
        held = self._together(plan, bounds)
        if held.dtype == torch.float32:
            best = torch.bmm(signed, held.transpose(1, 2)).amax(1)
        else:  # half the time, where matrices are multiplied in tiles
            best = torch.bmm(held, signed.transpose(1, 2)).amax(2)
        best = best[:, :width] + plan.bias  # in float32
        order = best.topk(plan.most, sorted=plan.keep is not None).indices
        if plan.keep is not None:  # rows that read less: what is too many goes to the end
            too_many = torch.arange(plan.most) >= plan.keep
            order.masked_fill_(too_many, width - 1)
        chosen = torch.gather(plan.candidates, 1, order.sort(1).values)
        table = self._buffer("table", rows * plan.most, torch.int32).view(rows, plan.most)
        table.copy_(chosen)
        return table

    def _changed(self, table: npt.NDArray[np.int64]) -> Places | None:
        """What has changed since the last step, of all that is copied."""
        requests, width = table.shape
        _, held_requests, held_width = self._held.shape
        if requests > held_requests or width > held_width:
            room = max(requests + requests // 2, held_requests), max(width + width // 8, held_width)
            if room[0] * room[1] > len(self._versions):
                room = requests, width
            if room[0] * room[1] > len(self._versions):
                return None
            self._held = np.full((2, *room), -1, np.int64)
            self._mark = object()  # copies of another shape are none
        now = np.stack((table, self._versions[table]))
        held = self._held[:, :requests, :width]
        row, column = np.nonzero((now != held).any(0))
        held[:] = now
        return self._places(table, row, column)

    def _places(
        self, table: npt.NDArray[np.int64], row: npt.NDArray[Any], column: npt.NDArray[Any]
    ) -> Places:
        heads, width = np.arange(self.heads), self._held.shape[2]
        to = (row[:, None] * self.heads + heads) * width + column[:, None]
        source = table[row, column][:, None] * self.heads + heads
        return torch.from_numpy(to.ravel()), torch.from_numpy(source.ravel())

    def _together(self, plan: Plan, bounds: PageBounds) -> Tensor:
        """Bounds in the order of the batch, ``[rows, most pages or more, 2 * channels]``."""
        rows, width = plan.candidates.shape
        flat = bounds.highs.view(-1, bounds.highs.shape[-1])
        if plan.changed is None:
            held = self._buffer("bounds", plan.candidates.numel() * flat.shape[1], flat.dtype)
            held = held.view(-1, flat.shape[1])
            torch.index_select(flat, 0, plan.candidates.view(-1), out=held)
            return held.view(rows, width, -1)
        _, room, most = self._held.shape
        shape = (room * self.heads, most, flat.shape[1])
        copy = bounds.by_request
        if copy is None or copy.shape != shape:
            bounds.by_request = copy = flat.new_zeros(shape)
            bounds.mark = None
        if bounds.mark is plan.follows:
            to, source = plan.changed
            copy.view(-1, flat.shape[1]).index_copy_(0, to, flat.index_select(0, source))
        elif bounds.mark is not plan.is_now:
            whole = flat.index_select(0, plan.candidates.view(-1))
            copy[:rows, :width] = whole.view(rows, width, -1)
        bounds.mark = plan.is_now
        return copy[:rows]  # all columns: of fewer, torch would make another copy

    def _buffer(self, name: str, numbers: int, dtype: torch.dtype) -> Tensor:
        """Memory of so many numbers, which the same name has overwritten before."""
        held = self._buffers.get((name, dtype))
        if held is None or len(held) < numbers:
            self._buffers[name, dtype] = held = torch.empty(numbers + numbers // 4, dtype=dtype)
        return held[:numbers]
