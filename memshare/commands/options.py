"""Values of command-line options that several subcommands take."""

from __future__ import annotations

from memshare.errors import UserError


def fractions(option: str, text: str) -> list[float]:
    """Read fractions separated by ``,``.

    Raises:
        UserError: ``text`` is something else; ``option`` is named.
    """
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0.0 <= fraction <= 1.0 for fraction in found):
        raise UserError(f"{option} {text}: give fractions from 0 to 1, separated by ','")
    return found
