"""Write the tables of ``docs/compatibility.md`` from the record of the last run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tools.compatibility.claims import ROOT, Claim, How, claims
from tools.compatibility.record import Record, read
from tools.compatibility.rows import NOT_INSTALLED, OTHER_VERSIONS, TABLES, State, Table

PAGE = ROOT / "docs" / "compatibility.md"

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def state(proofs: set[How]) -> State:
    """The word for what tests have shown of a row.

    Raises:
        ValueError: it runs, and is refused.
    """
    if "refused" in proofs:
        if len(proofs) > 1:
            raise ValueError(f"a row that is refused can't be tested as well: {sorted(proofs)}")
        return "refused"
    if "whole" in proofs:
        return "tested"
    return "by parts" if "parts" in proofs else "not run"


def states(record: Record, made: Iterable[Claim]) -> Mapping[str, State]:
    """The word for each row, by its key."""
    proofs = record.proofs(made)
    keys = (row.key for table in TABLES.values() for row in table.rows)
    return {key: state(proofs.get(key, set())) for key in keys}


def render(page: str, record: Record | None = None, made: list[Claim] | None = None) -> str:
    """The page with its tables written anew.

    Args:
        page: the page as it is.
        record: of the last run; the committed one if None.
        made: claims; those of the tests if None.

    Raises:
        KeyError: the page asks for a table that there is not.
    """
    record = read() if record is None else record
    found = states(record, claims() if made is None else made)
    texts = {name: _table(table, found) for name, table in TABLES.items()}
    texts |= {"run": _run(record), "versions": _versions(record)}
    return _TABLE.sub(lambda m: f"{m[1]}\n{texts[m[2]]}\n\n{m[3]}", page)


def _table(table: Table, found: Mapping[str, State]) -> str:
    lines = [list(table.titles), ["---"] * len(table.titles)]
    for row in table.rows:
        word = found[row.key]
        lines.append([*row.cells, word + (row.note if word == row.when else "")])
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def _versions(record: Record) -> str:
    lines = [("package", "tested", "others"), ("---", "---", "---")]
    lines += [(name, number, OTHER_VERSIONS[name]) for name, number in record.versions.items()]
    lines += [(name, *cells) for name, cells in NOT_INSTALLED.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _run(record: Record) -> str:
    days = sorted(set(record.passed.values()))
    when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "never"
    installed = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    return (
        f"Last run: {when}, {len(record.passed)} tests that prove a row, on: {record.machine}; "
        f"{installed}."
    )
