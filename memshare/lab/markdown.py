"""Tables for people to read, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table_head(heads: Sequence[str]) -> str:
    """Return the first two lines of a Markdown table."""
    return f"{table_row(heads)}\n{'| --- ' * len(heads)}|"


def table_row(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join([table_head(heads), *(table_row(row) for row in rows)])
