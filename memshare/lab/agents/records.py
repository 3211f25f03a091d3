"""What roles read and wrote, from files of records, and which of them are of one trajectory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from memshare.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Record(BaseModel):
    """One turn of a role.

    Attributes:
        input: what the role read.
        output: what it wrote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Split:
    """Records of each role, by whether adapters may see them.

    Attributes:
        seen: to train on.
        held_out: of trajectories that no role trains on.
        trajectories: how many there are of each.
    """

    seen: dict[str, list[Record]]
    held_out: dict[str, list[Record]]
    trajectories: tuple[int, int]


def read_records(path: Path) -> list[Record]:
    """Read a file of records: JSONL, or one JSON list.

    Raises:
        UserError: it cannot be read, or a record is not as it should be; names its line or number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    records = [_record(path, where, words) for where, words in _rows(path, text)]
    if not records:
        raise UserError(f"{path}: there are no records in it; give lines of {_SHAPE}")
    return records


_SHAPE = '{"input": "...", "output": "..."}'


def _rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """What may be records, each with where it stands."""
    if text.lstrip().startswith("["):
        try:
            yield from ((f"record {i}", row) for i, row in enumerate(json.loads(text), start=1))
        except ValueError as error:
            raise UserError(f"{path}: no JSON ({error})") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from None


def _record(path: Path, where: str, row: object) -> Record:
    try:
        record = Record.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        what = f"{field}: {first['msg']}" if field else str(first["msg"])
        raise UserError(f"{path}, {where}: {what}\n    fix: give {_SHAPE}") from None
    for field in ("input", "output"):
        if not getattr(record, field).strip():
            raise UserError(
                f"{path}, {where}: {field} is empty\n"
                "    fix: give its text, or leave the record out"
            )
    return record


def tokens_of(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a record's input, and of its output with the token that ends it, if any does."""
    read, written = (
        tokenizer.encode(text, add_special_tokens=False) for text in (record.input, record.output)
    )
    end = tokenizer.eos_token_id
    return read, written if end is None else [*written, end]


def trajectories(records: Sequence[Record]) -> list[str]:
    """The input that each record's trajectory begins with.

    The context of a trajectory grows: a record whose input begins with another's whole input is of
    the same trajectory.
    """
    roots: dict[str, str] = {}
    root: str | None = None
    for text in sorted({record.input for record in records}):  # what begins with one follows it
        if root is None or not text.startswith(root):
            root = text
        roots[text] = root
    return [roots[record.input] for record in records]


def split(records: Mapping[str, Sequence[Record]], held_out: float) -> Split:
    """Keep whole trajectories aside, those with the lowest digests: the same whatever the roles
    and their order are, as long as trajectories begin alike.

    Args:
        records: by role.
        held_out: fraction of the trajectories to keep aside.

    Raises:
        UserError: a role has nothing left on one of the sides.
    """
    every = [record for of_role in records.values() for record in of_role]
    root_of = dict(zip((record.input for record in every), trajectories(every), strict=True))
    by_digest = sorted(set(root_of.values()), key=_digest)
    aside = set(by_digest[: round(held_out * len(by_digest))])
    seen, kept = (
        {
            role: [record for record in of_role if (root_of[record.input] in aside) is unseen]
            for role, of_role in records.items()
        }
        for unseen in (False, True)
    )
    for role in records:
        if not seen[role] or (held_out and not kept[role]):
            raise UserError(
                f"{role}: its records are of too few trajectories to keep {held_out:g} of all "
                f"{len(by_digest)} aside; give more records, or another --held-out"
            )
    return Split(seen, kept, (len(by_digest) - len(aside), len(aside)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
