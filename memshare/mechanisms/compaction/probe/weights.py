"""Recognises a model by some of its weights.

Numbers, not a hash: a model that was converted or merged on another machine may differ in the last
bit of a weight, and is the same model. Nothing is loaded: a few values are read from their places
in the files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from math import isclose, prod
from pathlib import Path
from typing import NamedTuple

from memshare.mechanisms.compaction.probe.header import read_header

_TENSORS = 16
_VALUES = 12  # of each tensor
_RELATIVE = 0.02  # two units in the last place of bfloat16
_ABSOLUTE = 1e-5
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class _Tensor(NamedTuple):
    name: str
    dtype: str
    numbers: int
    file: Path
    offset: int


def fingerprint(model: str) -> tuple[float, ...] | None:
    """Some weights of a model, always the same ones.

    Args:
        model: a folder, or the id of a model that is in the hub's cache.

    Returns:
        None if it has no safetensors files at hand, or weights of other types than 16 or 32 bits.
    """
    tensors = sorted(tensor for file in _files(model) for tensor in _matrices(file))
    if not tensors or any(tensor.dtype not in _READERS for tensor in tensors):
        return None
    last = len(tensors) - 1
    picked = sorted({round(i * last / (_TENSORS - 1)) for i in range(_TENSORS)})
    return tuple(value for i in picked for value in _values(tensors[i]))


def same_weights(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two fingerprints are of one model, up to the rounding of 16-bit numbers."""
    return len(ours) == len(theirs) and all(
        isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
        for a, b in zip(ours, theirs, strict=True)
    )


def alike(ours: Sequence[float], theirs: Sequence[float]) -> int:
    """How many of the tensors that two fingerprints look at are the same. A copy with padded heads
    has others in its attention layers, and nowhere else."""
    parts = range(0, min(len(ours), len(theirs)), _VALUES)
    return sum(same_weights(ours[i : i + _VALUES], theirs[i : i + _VALUES]) for i in parts)


def _files(model: str) -> list[Path]:
    index = _at_hand(model, _INDEX)
    if index is None:
        single = _at_hand(model, _SINGLE)
        return [single] if single else []
    names = set(json.loads(index.read_text())["weight_map"].values())
    files = [_at_hand(model, name) for name in sorted(names)]
    return [file for file in files if file is not None] if all(files) else []


def _at_hand(model: str, name: str) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        model,
        name,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None


def _matrices(file: Path) -> Iterator[_Tensor]:
    """Tensors of two dimensions in a file."""
    for name, entry in read_header(file)[0].items():
        if len(entry.shape) == 2:
            yield _Tensor(name, entry.dtype, prod(entry.shape), file, entry.start)


def _values(tensor: _Tensor) -> Iterator[float]:
    size, read = _READERS[tensor.dtype]
    with tensor.file.open("rb") as stream:
        for i in range(_VALUES):
            at = (2 * i + 1) * tensor.numbers // (2 * _VALUES)
            stream.seek(tensor.offset + at * size)
            yield read(stream.read(size))


def _bfloat16(data: bytes) -> float:
    (value,) = struct.unpack("<f", b"\0\0" + data)
    return float(value)


def _unpack(form: str, data: bytes) -> float:
    (value,) = struct.unpack(form, data)
    return float(value)


_READERS: dict[str, tuple[int, Callable[[bytes], float]]] = {
    "F32": (4, lambda data: _unpack("<f", data)),
    "F16": (2, lambda data: _unpack("<e", data)),
    "BF16": (2, _bfloat16),
}
