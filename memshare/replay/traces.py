"""Recorded chains of thought on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memshare.errors import UserError


@dataclass(frozen=True, slots=True)
class Trace:
    """A problem and what a model wrote about it."""

    name: str
    problem: str
    reasoning: str


def load_traces(folder: Path) -> Iterator[Trace]:
    """Read every ``*.json`` below a folder, in order of their names.

    Each is one object with ``problem`` and ``reasoning``, both text; other fields are left alone.

    Raises:
        UserError: the folder or a file is not as described.
    """
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise UserError(f"{folder} holds no *.json file; give a folder of recorded traces")
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        texts = [found.get(field) if isinstance(found, dict) else None for field in Trace.__slots__]
        problem, reasoning = texts[1:]
        if not isinstance(problem, str) or not isinstance(reasoning, str):
            raise UserError(f"{path}: wants one object with the texts 'problem' and 'reasoning'")
        yield Trace(path.stem, problem, reasoning)
