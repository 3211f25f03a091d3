"""``memshare moe``: mixtures of experts."""

from __future__ import annotations

import argparse

from memshare.cli.main import Command
from memshare.cli.moe import affinity, placement, train
from memshare.cli.options import add_actions

_ACTIONS: dict[str, tuple[Command, str]] = {
    "placement": (placement, "which rank holds which KV heads, tokens and experts"),
    "train": (train, "a small mixture of experts to measure with"),
    "affinity": (affinity, "what routing requests by their experts gains"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    add_actions(parser, _ACTIONS)


def run(args: argparse.Namespace) -> int:
    """Do what is asked.

    Raises:
        UserError: a model or an option cannot be used.
    """
    module, _ = _ACTIONS[args.action]
    return module.run(args)
