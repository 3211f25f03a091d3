"""What tables without null entries must be, in plain Python."""

from __future__ import annotations

from typing import Any

import torch


def squeezed(table: torch.Tensor, lens: torch.Tensor, size: int, nulls: int) -> Any:
    """What a row must begin with, and its length, in plain Python."""
    wanted = []
    for row, length in zip(table.tolist(), lens.tolist(), strict=True):
        used = row[: -(-length // size)]
        kept = [block for block in used if block >= nulls]
        wanted.append((kept, length - (len(used) - len(kept)) * size))
    return wanted


def assert_squeezed(out: torch.Tensor, out_lens: torch.Tensor, wanted: Any) -> None:
    for row, (kept, length) in enumerate(wanted):
        assert out[row, : len(kept)].tolist() == kept
        assert int(out_lens[row]) == length
