"""Command-line options that several subcommands take, and types of their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshare.config import BudgetConfig
from memshare.errors import UserError

if TYPE_CHECKING:
    from memshare.cli.main import Command


def add_actions(
    parser: argparse.ArgumentParser, actions: Mapping[str, tuple[Command, str]]
) -> None:
    """Declare the actions of a subcommand, each with its options.

    Args:
        parser: the subcommand's.
        actions: name to what declares its options and does it, and a line of help.
    """
    parsers = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (action, help_line) in actions.items():
        form = parser.formatter_class
        action.add_arguments(parsers.add_parser(name, help=help_line, formatter_class=form))


def add_sharing(parser: argparse._ActionsContainer) -> None:
    """Declare when, and how much of what, arms with MemShare give up."""
    budget = BudgetConfig()
    parser.add_argument(
        "--budget",
        help="max_shared_fraction, or max_dropped_fraction where tokens are dropped; several by ','"
        f" (default: {budget.max_shared_fraction:g} and {budget.max_dropped_fraction:g})",
    )
    add_recent(parser)
    parser.add_argument(
        "--thinning", type=fraction,
        help="max_thinning, where tokens are dropped: at most this fraction of those between "
        f"prompt and recent window (default: {budget.max_thinning:g})",
    )  # fmt: skip
    parser.add_argument(
        "--trigger", default="pressure", choices=("pressure", "eager"),
        help="give up blocks when memory is short, or at once",
    )  # fmt: skip


def add_recent(parser: argparse._ActionsContainer) -> None:
    """Declare the recent window; without it policies keep their own."""
    parser.add_argument(
        "--recent", type=whole,
        help="protect.recent_tokens (default: 32 where tokens are dropped, else 128)",
    )  # fmt: skip


def sharing(args: argparse.Namespace) -> dict[str, Any]:
    """MemShare's options of all arms, as :func:`add_sharing` asked for them."""
    options: dict[str, Any] = {
        "trigger": {"kind": args.trigger}, "protect": {"recent_tokens": args.recent}
    }  # fmt: skip
    if args.thinning is not None:
        options["budget"] = {"max_thinning": args.thinning}
    return options


def budgets(args: argparse.Namespace) -> list[float]:
    """What ``--budget`` asks for; empty if policies keep their own."""
    return [] if args.budget is None else fractions("--budget", args.budget)


def count(text: str) -> int:
    """Read a whole number from 1 on: a ``type`` of ``argparse``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Read whole numbers from 1 on, separated by ``,``: a ``type`` of ``argparse``."""
    return tuple(count(word) for word in text.split(","))


def whole(text: str) -> int:
    """Read a whole number from 0 on: a ``type`` of ``argparse``."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 0 on")
    return int(text)


def positive(text: str) -> float:
    """Read a number above 0: a ``type`` of ``argparse``."""
    number = _number(text)
    if number is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return number


def fraction(text: str) -> float:
    """Read a number from 0 to 1: a ``type`` of ``argparse``."""
    number = _number(text)
    if number is None or number > 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to 1")
    return number


def _number(text: str) -> float | None:
    """A finite number from 0 on; None for everything else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


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
    found = [_number(word) for word in text.split(",")]
    if not all(number is not None and number <= 1 for number in found):
        raise UserError(f"{option} {text}: give fractions from 0 to 1, separated by ','")
    return [number for number in found if number is not None]


def require_known(
    option: str, names: Iterable[str], known: Collection[str], separator: str = ", "
) -> None:
    """Refuse a name that there is not.

    Raises:
        UserError: for the first such name; ``option`` and what there is are named.
    """
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UserError(f"{option} {unknown}: choose of {separator.join(known)}")


@contextmanager
def say_how_to_reach(start: str) -> Iterator[None]:
    """Say what to do where no gRPC server answers: its library's words name no way out.

    Args:
        start: the command that starts a server, as a user would type it.

    Raises:
        UserError: with that, for an ``UnavailableError`` of a call inside.
    """
    from memshare.client import UnavailableError

    try:
        yield
    except UnavailableError as error:
        if error.retry_after_s is not None:  # a server answered: it asks for patience
            raise
        raise UserError(
            f"{error}\n    fix: start a server with '{start}', or name one with --address"
        ) from None
