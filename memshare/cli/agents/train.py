"""``memshare agents train``: adapters for roles, from what the roles read and wrote."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from memshare.cli.options import count, fraction, positive, whole
from memshare.errors import UserError
from memshare.extras import require
from memshare.small_model.names import SMOLLM2

_MOST_RANK = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Trains a LoRA adapter for each role with peft, from records of what the role read and "
        'wrote: a file of lines {"input": "...", "output": "..."} each. The first role trains the '
        "A matrices on v_proj, and the others take them as they are, so that all share one KV "
        "cache under base_lr_shared. Whole trajectories are kept aside, to measure by. An "
        "interrupted run goes on where it stopped."
    )
    parser.add_argument("roles", nargs="+", metavar="ROLE=FILE", help="records of a role")
    parser.add_argument("--base", default=SMOLLM2.name, help="base model: name, folder or hub id")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for a folder of each role"
    )
    parser.add_argument(
        "--separate", action="store_true", help="each role trains A matrices of its own; such "
        "adapters share under stacked",
    )  # fmt: skip
    parser.add_argument("--rank", type=count, default=8, help="rows of A")
    parser.add_argument("--alpha", type=count, help="scale, times rank (default: twice --rank)")
    parser.add_argument("--targets", default="q_proj,v_proj", help="modules that adapters change")
    parser.add_argument(
        "--first-layer", type=whole, default=0, help="lowest layer that adapters change: what is "
        "below it is the same for all roles, loses nothing by sharing, and is read only once",
    )  # fmt: skip
    parser.add_argument("--steps", type=count, default=200, help="of training, for each role")
    parser.add_argument("--batch", type=count, default=2, help="texts of a step")
    parser.add_argument("--rate", type=positive, default=5e-4, help="learning rate")
    parser.add_argument("--context", type=count, default=1024, help="tokens read, at most")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument(
        "--held-out", type=fraction, default=0.15, help="fraction of the trajectories to measure by"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base's weights"
    )
    parser.add_argument("--licences", default="", help="of model and records, for the cards")


def run(args: argparse.Namespace) -> int:
    """Train, and print the cards.

    Raises:
        UserError: base model, records or output cannot be used.
    """
    roles, targets = _roles(args.roles), _targets(args.targets)
    if args.rank > _MOST_RANK:
        raise UserError(f"--rank {args.rank}: adapters that share have at most {_MOST_RANK}")
    require("peft", "training adapters")
    from memshare.lab.agents.fit import Fit
    from memshare.lab.agents.train import TrainingPlan, train

    plan = TrainingPlan(
        base=args.base,
        roles=roles,
        output=args.output,
        shared=not args.separate,
        how=Fit(
            rank=args.rank,
            alpha=args.alpha or 2 * args.rank,
            targets=targets,
            first_layer=args.first_layer,
            steps=args.steps,
            batch=args.batch,
            rate=args.rate,
            context=args.context,
            seed=args.seed,
        ),
        held_out=args.held_out,
        device=args.device,
        dtype=args.dtype,
        licences=args.licences,
    )
    for card in train(plan):
        print(f"{card.role}: NLL of a held-out token {card.change}; {args.output / card.role}")
    folders = " ".join(str(args.output / role) for role in roles)
    print(f"\nWhich of them share: memshare agents check {folders}")
    return 0


def _roles(words: Sequence[str]) -> dict[str, Path]:
    roles: dict[str, Path] = {}
    for word in words:
        role, equals, file = word.partition("=")
        if not equals or not re.fullmatch(r"\w[\w.-]*", role):
            raise UserError(f"{word}: give ROLE=FILE, the role in letters, digits, '.', '_', '-'")
        if role in roles:
            raise UserError(f"{word}: the role {role!r} is there already; name another")
        if not Path(file).is_file():
            raise UserError(f"{word}: there is no file {file}")
        roles[role] = Path(file)
    return roles


def _targets(text: str) -> tuple[str, ...]:
    from memshare.agents.refusals import SHAREABLE

    targets = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in targets if name not in SHAREABLE]
    if unknown:
        raise UserError(
            f"--targets {unknown[0]}: adapters that share a cache change {' and '.join(SHAREABLE)} "
            "alone; choose of these"
        )
    return targets
