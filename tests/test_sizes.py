"""No file, and no folder, is too long to be read at one go."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.documents import ROOT

LINES, MODULES = 420, 15
# Written by the compiler of protocol buffers.
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def modules() -> list[Path]:
    """Every module of ours, as paths below the repository's root."""
    return [
        path.relative_to(ROOT)
        for room in ("memshare", "cluster", "tools", "tests")
        for path in sorted((ROOT / room).rglob("*.py"))
        if not path.name.endswith(GENERATED)
    ]


def test_a_folder_has_few_modules() -> None:
    found = Counter(path.parent.as_posix() for path in modules())
    assert len(found) > 60
    assert {room: count for room, count in found.items() if count > MODULES} == {}


def test_a_module_is_short() -> None:
    found = {p.as_posix(): len((ROOT / p).read_text("utf-8").splitlines()) for p in modules()}
    assert max(found.values()) > LINES / 2
    assert {module: lines for module, lines in found.items() if lines > LINES} == {}
