"""The header of a safetensors file, read without loading torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple, cast

_LONGEST = 100_000_000  # bytes: what the format allows


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        dtype: as the format calls it.
        shape: sizes.
        start: offset of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file.
    """
    with path.open("rb") as stream:
        size = stream.read(8)
        (length,) = struct.unpack("<Q", size) if len(size) == 8 else (0,)
        if not 2 <= length <= _LONGEST:
            raise ValueError("it is no safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {
            name: StoredTensor(
                entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, ValueError):
        raise ValueError("it is no safetensors file") from None
    return entries, cast("dict[str, str]", metadata)
