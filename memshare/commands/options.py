"""Command-line options that several subcommands take, and their values."""

from __future__ import annotations

import argparse
from typing import Any

from memshare.config import BudgetConfig, ProtectConfig
from memshare.errors import UserError


def add_sharing(parser: argparse._ActionsContainer) -> None:
    """Declare when, and how much of what, arms with MemShare give up."""
    budget, recent = BudgetConfig().max_shared_fraction, ProtectConfig().recent_tokens
    parser.add_argument("--budget", default=str(budget), help="max_shared_fraction, several by ','")
    parser.add_argument("--recent", type=int, default=recent, help="protect.recent_tokens")
    parser.add_argument("--trigger", default="pressure", choices=("pressure", "eager"))


def sharing(args: argparse.Namespace) -> dict[str, Any]:
    """MemShare's options of all arms, as :func:`add_sharing` asked for them."""
    return {"trigger": {"kind": args.trigger}, "protect": {"recent_tokens": args.recent}}


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
