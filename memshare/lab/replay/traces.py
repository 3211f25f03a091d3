"""Recorded chains of thought on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memshare.errors import UserError

_ENDINGS = (".json", ".jsonl", ".txt")
# What the problem and the text are called: in recorded traces, and in logs of completions.
_FIELDS = (("problem", "reasoning"), ("prompt", "completion"))


@dataclass(frozen=True, slots=True)
class RecordedText:
    """A problem and what a model wrote about it."""

    name: str
    problem: str
    reasoning: str


def load_traces(folder: Path) -> Iterator[RecordedText]:
    """Read every recorded text below a folder, file by file in order of their names.

    - ``*.json``: one object with the texts ``problem`` and ``reasoning``, or ``prompt`` and
      ``completion``; other fields are left alone
    - ``*.jsonl``: such an object a line; the name of the text is ``FILE:LINE``
    - ``*.txt``: what the model wrote, as it is; the problem is empty

    Raises:
        UserError: the folder or a file is not as described.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _ENDINGS)
    if not paths:
        raise UserError(f"{folder} holds no *.json, *.jsonl or *.txt file; give a folder of texts")
    for path in paths:
        try:
            yield from _texts(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}") from None


def _texts(path: Path) -> Iterator[RecordedText]:
    if path.suffix == ".txt":
        yield RecordedText(path.stem, "", path.read_text(encoding="utf-8"))
    elif path.suffix == ".json":
        yield _parse(path.read_text(encoding="utf-8"), path.stem, str(path))
    else:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(line, f"{path.stem}:{number}", f"{path}, line {number}")


def _parse(text: str, name: str, place: str) -> RecordedText:
    """Read one object; ``place`` says in messages where it stands."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    for fields in _FIELDS:
        problem, reasoning = (
            found.get(field) if isinstance(found, dict) else None for field in fields
        )
        if isinstance(problem, str) and isinstance(reasoning, str):
            return RecordedText(name, problem, reasoning)
    raise UserError(
        f"{place}: wants one object with the texts 'problem' and 'reasoning' (or 'prompt' and "
        "'completion')"
    )
