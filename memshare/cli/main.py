"""The ``memshare`` command.

Each subcommand is a module with two functions, ``add_arguments(parser)`` and ``run(args) -> int``,
and one line in ``COMMANDS``. Only the module of the chosen subcommand is imported, so that
``memshare --help`` is instant and light commands never load torch, vLLM or Ray.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from memshare import __version__
from memshare.errors import UserError
from memshare.extras import fix_for
from memshare.process_env import collector_at_rest

# name -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("memshare.cli.serve", "vLLM's own OpenAI server, with MemShare in it"),
    "chat": ("memshare.cli.chat", "talk to a cluster over gRPC"),
    "demo": ("memshare.cli.demo", "put a small server under pressure, to watch it"),
    "bench": ("memshare.cli.bench", "compare policies and plain vLLM on the same KV memory"),
    "eval": ("memshare.cli.eval", "accuracy of a model with and without sharing"),
    "replay": ("memshare.cli.replay", "measure what sharing does, on recorded texts"),
    "probe": ("memshare.cli.probe", "train what tells which tokens will be needed"),
    "agents": ("memshare.cli.agents", "check, train, compare LoRA adapters that share one cache"),
    "moe": ("memshare.cli.moe", "place a mixture of experts: which rank holds what"),
    "simulate": ("memshare.cli.simulate", "predict the gain on machines not at hand"),
    "init": ("memshare.cli.init", "write a configuration to begin with"),
    "check": ("cluster.check.command", "will this model, machine and configuration work?"),
    "plot": ("memshare.cli.plot", "draw what was measured, and a text with what it repeats"),
    # Of the cluster; named here only, as the library imports nothing of it.
    "keys": (
        "cluster.tenancy.keys_command",
        "make keys for the cluster's tenants, check a key table",
    ),
    "model": ("memshare.cli.model", "prepare the small test model in the user's cache"),
}

# Its words, but a plain --help, are vLLM's: they reach it as they are, as `words`.
_VERBATIM = "serve"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says every default that is a value, where the help does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        if silent or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Command(Protocol):
    """What a subcommand's module provides."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the subcommand's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work; return the exit status. May raise ``UserError``."""


def load(name: str) -> Command:
    """Import the module of subcommand ``name``."""
    return cast(Command, importlib.import_module(COMMANDS[name][0]))


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser that knows every subcommand, and the options of the one in ``argv``."""
    parser = argparse.ArgumentParser(
        prog="memshare",
        description="Reclaims KV-cache blocks of running requests in unmodified vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"memshare {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (_, help_line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line, formatter_class=_Help)
        if name == chosen:
            load(name).add_arguments(subparser)
    return parser


def _read(words: list[str]) -> argparse.Namespace:
    if words[:1] == [_VERBATIM] and words[1:] not in (["-h"], ["--help"]):
        return argparse.Namespace(command=_VERBATIM, words=words[1:])
    return build_parser(words).parse_args(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 ok, 1 error, 2 usage, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with collector_at_rest():  # a command may import vLLM for its options
            options = _read(words)
        return _run(options)
    except ModuleNotFoundError as error:
        fix = fix_for(error.name)
        if fix is None:
            raise
        print(f"memshare: error: {error.name} is not installed: {fix}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    # What takes long says how far it is, on stderr.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("memshare").setLevel(logging.INFO)
    logging.getLogger("memshare.engine").setLevel(logging.WARNING)  # engines are means here
    try:
        return load(args.command).run(args)
    except UserError as error:
        print(f"memshare {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nmemshare {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
