"""``memshare agents``: LoRA adapters of one base model that share one KV cache."""

from __future__ import annotations

import argparse

from memshare.cli.agents import bench, check, switches, train, unify
from memshare.cli.main import Command
from memshare.cli.options import add_actions

_ACTIONS: dict[str, tuple[Command, str]] = {
    "check": (check, "which adapters share, and why others do not"),
    "train": (train, "train adapters for roles, with one A matrix for all"),
    "unify": (unify, "give adapters that were trained apart one A matrix"),
    "bench": (bench, "what sharing gains and loses, on recorded trajectories"),
    "switches": (switches, "first token and memory, by context and number of agents"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    add_actions(parser, _ACTIONS)


def run(args: argparse.Namespace) -> int:
    """Do what is asked.

    Raises:
        UserError: an adapter, records or the base model cannot be used.
    """
    module, _ = _ACTIONS[args.action]
    return module.run(args)
