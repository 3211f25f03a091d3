"""``memshare moe train``: a small mixture of experts to measure with."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from memshare.cli.options import count, whole
from memshare.user_cache import user_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Trains a mixture of experts of Qwen3's shape on three kinds of texts that are wherever "
        "Python is: worked problems, code of the standard library, and its prose. Interrupted, it "
        "goes on where it stopped. About six minutes of one core."
    )
    parser.add_argument("folder", type=Path, help="for the model; must not exist")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for tokens and the latest state (default: in the "
        "user's cache)",
    )  # fmt: skip
    parser.add_argument("--steps", type=count, default=600, help="of training")
    parser.add_argument("--experts", type=count, default=16, help="of each layer")
    parser.add_argument("--chosen", type=count, default=2, help="experts of a token")
    parser.add_argument("--width", type=count, default=32, help="of one expert")
    parser.add_argument("--layers", type=count, default=3)
    parser.add_argument("--seed", type=whole, default=0, help="of weights and batches")


def run(args: argparse.Namespace) -> int:
    """Train.

    Raises:
        UserError: the folder is there, or the work was begun with other options.
    """
    from memshare.errors import UserError
    from memshare.lab.moe.train import MoePlan, train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.folder.exists():
        raise UserError(f"{args.folder} exists; give another folder")
    plan = MoePlan(
        steps=args.steps, layers=args.layers, experts=args.experts, chosen=args.chosen,
        width=args.width, seed=args.seed,
    )  # fmt: skip
    train(plan, args.work or user_cache() / "moe-training", args.folder)
    return 0
