"""The Triton kernel of :func:`~memshare.engine.vllm_0_32.view.squeeze.squeeze_nulls`.

One launch for all rows; rows without null entries are copied on the way.

Imported only where Triton runs. It lies in a module of its own because Triton reads its source.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # entries in one go; a row of 32k tokens has 1024 or 2048


@triton.jit
def squeeze_kernel(
    table,
    lens,
    out,
    out_lens,
    table_stride,
    out_stride,
    width,
    block_size: tl.constexpr,
    nulls: tl.constexpr,
    tile: tl.constexpr,
):
    """One program squeezes one row."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lens + row)
    used = tl.minimum((length + block_size - 1) // block_size, width)
    kept = 0
    for start in range(0, used, tile):
        columns = start + tl.arange(0, tile)
        ids = tl.load(table + row * table_stride + columns, mask=columns < used, other=0)
        keep = ids >= nulls
        so_far = tl.cumsum(keep.to(tl.int32), 0)
        tl.store(out + row * out_stride + kept + so_far - 1, ids, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    tl.store(out_lens + row, length - (used - kept) * block_size)


def squeeze_nulls(
    table: Tensor, lens: Tensor, block_size: int, nulls: int, out: Tensor, out_lens: Tensor
) -> None:
    """See :func:`memshare.engine.vllm_0_32.view.squeeze.squeeze_nulls`; ``out`` keeps what it had
    behind a row's new length."""
    squeeze_kernel[(table.shape[0],)](
        table, lens, out, out_lens, table.stride(0), out.stride(0), table.shape[1],
        block_size=block_size, nulls=nulls, tile=_TILE,
    )  # fmt: skip
