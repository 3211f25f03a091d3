"""``memshare agents``: LoRA adapters of one base model that share one KV cache."""

from __future__ import annotations

import argparse

from memshare.cli.agents import bench, check, train
from memshare.cli.main import Command

_ACTIONS: dict[str, tuple[Command, str]] = {
    "check": (check, "which adapters share, and why others do not"),
    "train": (train, "train adapters for roles, with one A matrix for all"),
    "bench": (bench, "what sharing gains and loses, on recorded trajectories"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (module, help_line) in _ACTIONS.items():
        form = parser.formatter_class
        module.add_arguments(actions.add_parser(name, help=help_line, formatter_class=form))


def run(args: argparse.Namespace) -> int:
    """Do what is asked.

    Raises:
        UserError: an adapter, records or the base model cannot be used.
    """
    module, _ = _ACTIONS[args.action]
    return module.run(args)
