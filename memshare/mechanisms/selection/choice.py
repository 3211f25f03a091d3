"""Which pages are read: how many follows from a request's length, which ones from the query.

How many is known before a step runs, and is the same in all layers, so that lengths, and with them
a kernel's work plan, are made once a step. Each KV head chooses for itself: what one head looks for
is not what another does, and reading a page for one head costs a backend nothing more where it can
treat ``(request, KV head)`` as a request of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memshare.config import SelectionConfig
from memshare.core.token_map import TokenMap
from memshare.mechanisms.selection.bounds import PageBounds, split_signs
from memshare.mechanisms.selection.budget import Counts, pages_read


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
    """

    requests: int
    read: Counts
    lens: Tensor
    candidates: Tensor
    bias: Tensor
    keep: Tensor | None
    most: int


class PageChooser:
    """Chooses pages for the layers of one step after the other, in buffers that stay.

    On the host: a backend on CPUs has tables and lengths there.

    Attributes:
        heads: KV heads of a layer.
    """

    def __init__(self, config: SelectionConfig, heads: int, page_size: int) -> None:
        """
        Args:
            config: with a budget.
            heads: KV heads of a layer.
            page_size: token slots in a page.
        """
        self._config = config
        self.heads = heads
        self._token_map = TokenMap(page_size)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def pages(self, lens: Counts) -> Counts:
        """Pages of requests of so many tokens."""
        return self._token_map.entries(lens)

    def pages_read(self, lens: Counts) -> Counts:
        """How many of them are read."""
        return pages_read(self._config, self.pages(lens))

    def begin(self, table: Tensor, lens: Counts) -> Plan:
        """Prepare a step.

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
        return Plan(
            requests=len(lens),
            read=read,
            lens=torch.from_numpy(np.repeat(kept, heads).astype(np.int32)),
            candidates=candidates.view(rows, width),
            bias=torch.from_numpy(np.repeat(bias, heads, 0).astype(np.float32)),
            keep=None if alike else torch.from_numpy(by_row)[:, None],
            most=int(read.max()),
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
        flat = bounds.highs.view(-1, bounds.highs.shape[-1])
        held = self._buffer("bounds", plan.candidates.numel() * flat.shape[1], flat.dtype)
        held = held.view(-1, flat.shape[1])
        torch.index_select(flat, 0, plan.candidates.view(-1), out=held)
        scores = torch.bmm(signed, held.view(rows, width, -1).transpose(1, 2))
        best = scores.amax(1) + plan.bias  # in float32
        order = best.topk(plan.most, sorted=plan.keep is not None).indices
        if plan.keep is not None:  # rows that read less: what is too many goes to the end
            too_many = torch.arange(plan.most) >= plan.keep
            order.masked_fill_(too_many, width - 1)
        chosen = torch.gather(plan.candidates, 1, order.sort(1).values)
        table = self._buffer("table", rows * plan.most, torch.int32).view(rows, plan.most)
        table.copy_(chosen)
        return table

    def _buffer(self, name: str, numbers: int, dtype: torch.dtype) -> Tensor:
        """Memory of so many numbers, which the same name has overwritten before."""
        held = self._buffers.get((name, dtype))
        if held is None or len(held) < numbers:
            self._buffers[name, dtype] = held = torch.empty(numbers + numbers // 4, dtype=dtype)
        return held[:numbers]
