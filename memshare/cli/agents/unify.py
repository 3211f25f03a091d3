"""``memshare agents unify``: one A matrix for adapters that were trained apart."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.cli.agents.check import named
from memshare.cli.options import count, fraction
from memshare.errors import UserError
from memshare.lab.markdown import table

if TYPE_CHECKING:
    from memshare.agents.adapter import Adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Writes adapters anew, with one A matrix on v_proj for all of them, so that they share one "
        "KV cache under base_lr_shared: with the low-rank columns that stacked would keep and "
        "nothing lost but rounding, or with fewer, and less exactly. Loads no model."
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="FOLDER or ROLE=FOLDER")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for a folder of each role"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rank", type=count, help="rows of A")
    how.add_argument(
        "--tolerance", type=fraction, default=0.0, help="what any adapter may lose of its A B in "
        "any layer, by its norm; the lowest multiple of 8 rows with which none loses more",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Say what each rank loses, and write adapters.

    Raises:
        UserError: adapters or output cannot be used.
    """
    from memshare.agents.family import MULTIPLE
    from memshare.lab.agents.unify import Unifier

    adapters = _adapters(named(args.adapters))
    if args.output.exists():
        raise UserError(f"--output {args.output} exists; name a new folder")
    unifier = Unifier(adapters)
    ranks = range(MULTIPLE, unifier.whole + MULTIPLE, MULTIPLE)
    lost = {rank: unifier.lost(rank) for rank in ranks}
    rank = args.rank or _lowest(lost, args.tolerance)
    print(table(("rank", "lost by the worst adapter in its worst layer"),
                ((str(k), f"{part:.2%}") for k, part in lost.items())))  # fmt: skip
    unifier.write(rank, args.output)
    folders = " ".join(str(args.output / adapter.name) for adapter in adapters)
    print(
        f"\nwritten with {rank} rows, {unifier.lost(rank):.2%} lost. Look at them: "
        f"memshare agents check {folders}"
    )
    return 0


_ROUNDING = 1e-6


def _lowest(lost: dict[int, float], tolerance: float) -> int:
    return next(rank for rank, part in lost.items() if part <= max(tolerance, _ROUNDING))


def _adapters(folders: dict[str, Path]) -> Sequence[Adapter]:
    """Read adapters that could share under ``stacked``.

    Raises:
        UserError: they could not, or have nothing to unify.
    """
    from memshare.agents.adapter import adapters_by_name
    from memshare.agents.refusals import check_adapters
    from memshare.config import AgentsConfig, ConfigError

    try:
        config = AgentsConfig.model_validate({"scheme": "stacked", "adapters": folders})
        adapters = adapters_by_name(config.adapters)
        check_adapters(adapters, config)
    except ConfigError as error:
        raise UserError(str(error)) from None
    if not any(adapter.value_rank for adapter in adapters):
        raise UserError("none of these adapters changes v_proj: all can share as they are")
    return adapters
