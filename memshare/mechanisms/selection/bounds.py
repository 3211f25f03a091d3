"""What every page of a layer's cache holds at most: an upper bound of its tokens' scores.

For a query ``q`` and the keys ``k`` of a page, ``max over k of q . k`` is at most the sum over
channels of ``max(q_c * high_c, q_c * low_c)``, where ``high`` and ``low`` are the elementwise
maximum and minimum of the keys (Quest, section 3.3). Stored are ``high`` and ``-low``, so that new
keys are folded in by one maximum, and the bound is one product with ``(relu(q), relu(-q))``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.core.token_map import TokenMap


@dataclass(frozen=True, slots=True)
class PageWrites:
    """Which tokens of a step go to which pages; the same for all layers.

    Attributes:
        whole: pages that this step fills from their first slot to their last, ``[W]`` int64.
        whole_tokens: their tokens in the step, ``[W * slots]`` int64.
        parts: pages that it writes to otherwise, ``[P]`` int64.
        part_tokens: their tokens, those of a page together; None if these are all tokens of the
            step, in order.
        lengths: how many each part has, ``[P]`` int64; None if each has one.
        begun: parts whose first slot is among them, ``[B]`` int64: what the page held before does
            not count.
    """

    whole: Tensor
    whole_tokens: Tensor
    parts: Tensor
    part_tokens: Tensor | None
    lengths: Tensor | None
    begun: Tensor

    @classmethod
    def of(cls, slots: npt.NDArray[np.int64], page_size: int) -> PageWrites:
        """Read a step's slot mapping.

        Args:
            slots: ``[tokens]`` of the step; negative where a token is not written. Those of a page
                follow each other.
            page_size: token slots in a page.
        """
        token_map = TokenMap(page_size)
        tokens = np.flatnonzero(slots >= 0)
        written = slots[tokens]
        pages = token_map.entry(written)
        first = np.flatnonzero(np.diff(pages, prepend=-1))
        lengths = np.diff(first, append=len(pages))
        pages, begin = pages[first], token_map.slot(written[first])
        is_whole = lengths == page_size
        is_part, of_part = ~is_whole, np.repeat(~is_whole, lengths)
        parts, part_lengths = pages[is_part], lengths[is_part]
        as_they_are = len(tokens) == len(slots) and not is_whole.any()
        return cls(
            whole=torch.from_numpy(pages[is_whole]),
            whole_tokens=torch.from_numpy(tokens[~of_part]),
            parts=torch.from_numpy(parts),
            part_tokens=None if as_they_are else torch.from_numpy(tokens[of_part]),
            lengths=None if (part_lengths == 1).all() else torch.from_numpy(part_lengths),
            begun=torch.from_numpy(parts[begin[is_part] == 0]),
        )


class PageBounds:
    """Bounds of one layer's pages, in persistent memory.

    Attributes:
        highs: ``[pages, heads, 2 * channels]``: the greatest of each channel's keys, then of the
            negated keys. Of the keys' own type, so exact.
        by_request: a copy in the order of a batch's requests, the chooser's; None without one.
        mark: of the step that it is of.
    """

    by_request: Tensor | None = None
    mark: object = None

    def __init__(
        self, pages: int, heads: int, channels: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate ``2 * channels * heads`` elements a page: of the cache, one part in the number
        of a page's slots."""
        self.highs = torch.zeros(pages, heads, 2 * channels, dtype=dtype, device=device)

    def write(self, keys: Tensor, writes: PageWrites) -> None:
        """Fold in keys that are written to the cache.

        Args:
            keys: ``[tokens, heads, channels]`` of the step, as they are cached.
            writes: where they go.
        """
        if len(writes.parts):
            part = keys if writes.part_tokens is None else keys.index_select(0, writes.part_tokens)
            signed = torch.cat((part, -part), -1)
            if writes.lengths is not None:
                flat = torch.segment_reduce(
                    signed.flatten(1), "max", lengths=writes.lengths, axis=0, unsafe=True
                )
                signed = flat.view(-1, *signed.shape[1:])
            if len(writes.begun):
                self.highs.index_fill_(0, writes.begun, -torch.inf)
            held = self.highs.index_select(0, writes.parts)
            self.highs.index_copy_(0, writes.parts, torch.maximum(held, signed, out=held))
        if len(writes.whole):
            of_whole = keys.index_select(0, writes.whole_tokens)
            self.rebuild(writes.whole, of_whole.unflatten(0, (len(writes.whole), -1)), slots_at=1)

    def rebuild(self, pages: Tensor, keys: Tensor, slots_at: int = 2) -> None:
        """Forget what pages held, and take what they hold now in every slot.

        Args:
            pages: ``[n]`` int64.
            keys: ``[n, heads, slots, channels]``.
            slots_at: the dimension of the slots, where it is another one.
        """
        high, low = keys.amax(slots_at), keys.amin(slots_at)
        self.highs.index_copy_(0, pages, torch.cat((high, -low), -1).to(self.highs.dtype))


def split_signs(queries: Tensor) -> Tensor:
    """``[..., channels]`` queries as ``[..., 2 * channels]``: their product with ``highs`` is the
    bound."""
    return torch.cat((queries, -queries), -1).relu_()
