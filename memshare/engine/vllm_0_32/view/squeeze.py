"""Block tables without their null entries, in torch. On GPUs one Triton kernel does the same
(``squeeze_kernel``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.core.token_map import TokenMap

Squeeze = Callable[[Tensor, Tensor, int, int, Tensor, Tensor], None]


def squeeze_nulls(
    table: Tensor, lens: Tensor, block_size: int, nulls: int, out: Tensor, out_lens: Tensor
) -> None:
    """Move the entries of each row together, over its null entries; shorten its length by theirs.

    Only enqueues work for the device: nothing is read back. Neither ``table`` nor ``lens`` changes.

    Args:
        table: ``[rows, width]`` int32 block ids. Entries behind a row's length may hold anything.
        lens: ``[rows]`` int32 tokens, dropped ones included. A row's last entry is never null.
        block_size: tokens under an entry.
        nulls: smaller ids are the null block's: 1, or more where the backend splits each of the
            engine's blocks into several of its own.
        out: like ``table``; what stands behind a row's new length has no meaning.
        out_lens: like ``lens``.
    """
    used = torch.div(lens + (block_size - 1), block_size, rounding_mode="floor").unsqueeze(1)
    columns = torch.arange(table.shape[1], device=table.device, dtype=torch.int32)
    keep = (columns < used) & (table >= nulls)
    so_far = torch.cumsum(keep, 1, dtype=torch.int32)
    kept = so_far[:, -1:]
    out_lens.copy_(lens - (used - kept).squeeze(1) * block_size)
    # A permutation of the columns: what goes lines up behind what stays.
    out.scatter_(1, torch.where(keep, so_far - 1, kept + columns - so_far).long(), table)


class RowSqueezer:
    """The same in a CPU's memory, where the host knows which rows have null entries; the others are
    copied.

    From one step to the next few tables change: a request needs a new block once in as many steps
    as a block has slots. So each row is compared with the last one that was squeezed in its place,
    which costs a tenth of squeezing it.
    """

    def __init__(self) -> None:
        """Nothing has been squeezed yet."""
        self._last: dict[int, tuple[bytes, npt.NDArray[np.int32]]] = {}

    def squeeze(
        self,
        table: Tensor,
        lens: Tensor,
        rows: Sequence[int],
        block_size: int,
        nulls: int,
        out: Tensor,
        out_lens: Tensor,
    ) -> None:
        """Squeeze ``rows``; the other arguments are those of :func:`squeeze_nulls`."""
        source, lengths, target, new_lengths = (
            tensor.numpy() for tensor in (table, lens, out, out_lens)
        )
        entries_of = TokenMap(block_size).entries
        np.copyto(target, source)
        np.copyto(new_lengths, lengths)
        for row, length in zip(rows, lengths[rows].tolist(), strict=True):
            entries = source[row, : entries_of(length)]
            held = entries.tobytes()
            known, kept = self._last.get(row, (b"", entries))
            if known != held:
                kept = entries[entries >= nulls]
                self._last[row] = held, kept
            target[row, : kept.size] = kept
            new_lengths[row] = length - (entries.size - kept.size) * block_size


def squeeze_on(device: torch.device) -> Squeeze:
    """What squeezes tables on a device: the kernel where Triton runs, else torch."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON and device.type == "cuda":
        from memshare.engine.vllm_0_32.view import squeeze_kernel

        return squeeze_kernel.squeeze_nulls
    return squeeze_nulls
