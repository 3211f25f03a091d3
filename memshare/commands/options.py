"""Command-line options that several subcommands take, and types of their values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memshare.config import BudgetConfig, ProtectConfig
from memshare.errors import UserError


def add_sharing(parser: argparse._ActionsContainer) -> None:
    """Declare when, and how much of what, arms with MemShare give up."""
    budget, recent = BudgetConfig().max_shared_fraction, ProtectConfig().recent_tokens
    parser.add_argument("--budget", default=str(budget), help="max_shared_fraction, several by ','")
    parser.add_argument("--recent", type=int, default=recent, help="protect.recent_tokens")
    parser.add_argument(
        "--trigger", default="pressure", choices=("pressure", "eager"),
        help="give up blocks when memory is short, or at once",
    )  # fmt: skip


def sharing(args: argparse.Namespace) -> dict[str, Any]:
    """MemShare's options of all arms, as :func:`add_sharing` asked for them."""
    return {"trigger": {"kind": args.trigger}, "protect": {"recent_tokens": args.recent}}


def count(text: str) -> int:
    """Read a whole number from 1 on: a ``type`` of ``argparse``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return int(text)


def new_file(text: str) -> Path:
    """Read the name of a file to be written at the end of long work: a ``type`` of ``argparse``."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    return path


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
