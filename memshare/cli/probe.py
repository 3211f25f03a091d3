"""``memshare probe``: train, judge and look at the networks that tell which tokens will be needed.

The policy ``compaction`` keeps tokens by such a probe. One that was trained for the served model is
found by itself: ``train`` writes it to where the engine looks.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.cli.options import (
    count,
    counts,
    fraction,
    fractions,
    new_file,
    require_known,
    whole,
)
from memshare.errors import UserError
from memshare.lab.markdown import table
from memshare.small_model.names import SMOLLM2
from memshare.user_cache import user_cache

if TYPE_CHECKING:
    from memshare.mechanisms.compaction.probe.card import Judged
    from memshare.mechanisms.compaction.probe.file import Probe

_FREED = "0.25,0.4,0.5"
_SCORERS = ("probe", "recency", "random")

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    form = parser.formatter_class
    _add_train(actions.add_parser("train", help="train one, and measure it", formatter_class=form))
    _add_evaluate(
        actions.add_parser("evaluate", help="judge one on other texts", formatter_class=form)
    )
    _add_compare(
        actions.add_parser("compare", help="policies of the field beside it", formatter_class=form)
    )
    _add_pad(actions.add_parser("pad", help="make one for padded heads", formatter_class=form))
    show = actions.add_parser("show", help="print the card of one", formatter_class=form)
    show.add_argument("probe", help="file, or name of one that is kept for the engine")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads texts with the model, lets it repeat them, and trains networks to tell from cached "
        "keys and values how much attention each token gets from that. Interrupted, it goes on "
        "where it stopped."
    )
    _add_model(parser)
    _add_texts(parser)
    parser.add_argument(
        "--own", type=whole, metavar="COUNT", help="texts that the model writes itself (default: "
        "0 with other texts, else 16)",
    )  # fmt: skip
    _add_output(parser)
    parser.add_argument("--licences", default="", help="of model and texts, for the card")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for what was read and trained so far (default: "
        "in the user's cache)",
    )  # fmt: skip
    parser.add_argument("--folds", type=whole, default=3, help="of the cross-validation; 0: none")
    parser.add_argument(
        "--judged", type=whole, default=6, help="texts whose damage is measured, in unseen folds"
    )
    parser.add_argument(
        "--target", choices=("repeat", "repeat+future"), default="repeat", help="attention that "
        "the networks learn to tell: when the model repeats the text, or also from later parts of "
        "the text itself",
    )  # fmt: skip
    parser.add_argument("--hidden", type=count, default=96, help="units of each network")
    parser.add_argument("--steps", type=count, default=600, help="of training, for each layer")
    parser.add_argument(
        "--neighbours", type=whole, default=2, help="tokens on each side that are averaged over"
    )
    parser.add_argument(
        "--smoothing", type=whole, default=0, help="tokens on each side over which the worth of "
        "one is averaged",
    )  # fmt: skip
    parser.add_argument(
        "--heads-together", type=counts, default=(), metavar="HEADS", help="KV heads that a "
        "network reads, separated by ',': the file has networks of each kind, and a rank uses the "
        "largest of which it has whole groups (default: all of a layer, and 1, which fits every "
        "tensor-parallel size)",
    )  # fmt: skip


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Drops tokens of recorded texts and compares the next-token distributions with the exact "
        "ones. Texts that the probe was trained on are left out."
    )
    _add_model(parser)
    _add_texts(parser)
    parser.add_argument("--probe", help="file or name (default: the one that fits the model)")
    parser.add_argument(
        "--scorers", default="probe", help=f"separated by ','; of {', '.join(_SCORERS)}"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=count, default=1, help="judge the probe as ranks use "
        "it that have a part of the heads each",
    )  # fmt: skip
    parser.add_argument("--recent", type=whole, default=32, help="last tokens that always stay")
    parser.add_argument(
        "--position-weight", type=fraction, default=0.7, help="policy.position_weight"
    )
    parser.add_argument(
        "--every", type=whole, default=0, help="compact every so many tokens, as serving does, "
        "instead of once",
    )  # fmt: skip
    parser.add_argument("--limit", type=count, default=16, help="texts")
    parser.add_argument("--record", action="store_true", help="add the probe's figures to its card")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the table there")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Drops the same bytes by each of several policies and prints one table: KL of recorded "
        "texts, worked problems and hidden numbers that stay right. Interrupted, it goes on where "
        "it stopped."
    )
    _add_model(parser)
    _add_texts(parser)
    parser.add_argument("--needles", type=whole, default=0, help="texts that hide a number")
    parser.add_argument(
        "--reasoner", default="smollm2-135m-reasoner", help="model that reads worked problems"
    )
    parser.add_argument(
        "--policies", help="separated by ';' (default: all but those that look at experts)"
    )
    parser.add_argument("--recent", type=whole, default=32, help="last tokens that always stay")
    parser.add_argument(
        "--window", type=count, default=32, help="last queries whose attention is looked at"
    )
    parser.add_argument(
        "--position-weight", type=fraction, default=0.7, help="policy.position_weight"
    )
    parser.add_argument("--limit", type=count, default=16, help="recorded texts")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="FILE", help="takes what is measured"
    )


def _add_pad(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes the probe of a model's copy with padded heads (`memshare model --pad-heads-to`) out "
        "of the model's own. Nothing is trained."
    )
    parser.add_argument("probe", help="of the model: file, or name of one that is installed")
    parser.add_argument("--model", required=True, help="the copy: name or folder")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: NAME.safetensors where "
        "engines look, in the user's cache",
    )  # fmt: skip
    parser.add_argument("--name", help="of the probe (default: the last part of --model)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=SMOLLM2.name, help="name, folder or hub id")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and cache; "
        "bfloat16 is faster, and adds its rounding to what is judged",
    )  # fmt: skip
    parser.add_argument("--prefix", type=count, default=2560, help="tokens that are read of a text")
    parser.add_argument(
        "--continuation", type=count, default=512, help="tokens behind it, to judge by"
    )
    parser.add_argument("--freed", default=_FREED, help="fractions of the prefix, separated by ','")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--texts", action="append", default=[], metavar="[KIND=]DIR", help="folder of *.json, "
        "*.jsonl or *.txt (as for memshare replay); several times for several kinds",
    )  # fmt: skip
    parser.add_argument(
        "--solutions", type=whole, default=0, metavar="COUNT", help="worked problems of the test "
        "reasoner: of both kinds to train, recall to evaluate",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Do what is asked.

    Raises:
        UserError: model, texts or probe cannot be used.
    """
    actions = {
        "train": _train, "evaluate": _evaluate, "compare": _compare, "pad": _pad, "show": _show
    }  # fmt: skip
    return actions[args.action](args)


def _train(args: argparse.Namespace) -> int:
    from memshare.lab.probe.fit import Fit
    from memshare.lab.probe.train import TrainingPlan, train
    from memshare.small_model.names import resolve_model

    name = _name(args)
    recorded = _kinds(args.texts)
    own = args.own if args.own is not None else 0 if recorded or args.solutions else 16
    kept = user_cache() / "probes"
    plan = TrainingPlan(
        model=resolve_model(args.model),
        name=name if args.name or Path(args.model).is_dir() else args.model,
        recorded=recorded,
        own=own,
        solutions=args.solutions,
        prefix=args.prefix,
        continuation=args.continuation,
        freed=tuple(fractions("--freed", args.freed)),
        folds=args.folds,
        judged=args.judged,
        together=args.heads_together,
        target=args.target,
        smoothing=args.smoothing,
        how=Fit(hidden=args.hidden, steps=args.steps, neighbours=args.neighbours),
        work=args.work or kept / "work" / name,
        device=args.device,
        dtype=args.dtype,
        licences=args.licences,
    )  # fmt: skip
    _write(train(plan), name, args.output)
    return 0


def _pad(args: argparse.Namespace) -> int:
    from memshare.lab.probe.padded import pad_probe
    from memshare.mechanisms.compaction.probe.file import ProbeUnusable, read_probe
    from memshare.mechanisms.compaction.probe.find import named_probe
    from memshare.small_model.names import resolve_model

    name = _name(args)
    try:
        original = read_probe(named_probe(args.probe))
    except ProbeUnusable as reason:
        raise UserError(str(reason)) from None
    _write(pad_probe(original, name, Path(resolve_model(args.model))), name, args.output)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from memshare.lab.probe.judging import JudgingPlan, judge_texts
    from memshare.small_model.names import resolve_model

    scorers = args.scorers.split(",")
    require_known("--scorers", scorers, _SCORERS)
    plan = JudgingPlan(
        model=resolve_model(args.model),
        recorded=_kinds(args.texts),
        solutions=args.solutions,
        probe=args.probe,
        tensor_parallel_size=args.tensor_parallel_size,
        scorers=tuple(scorers),
        prefix=args.prefix,
        continuation=args.continuation,
        freed=tuple(fractions("--freed", args.freed)),
        recent=args.recent,
        position_weight=args.position_weight,
        every=args.every,
        limit=args.limit,
        record=args.record,
        device=args.device,
        dtype=args.dtype,
    )
    rows = judge_texts(plan)
    if args.json is not None:
        found = [{"scorer": scorer} | row.model_dump() for scorer, row in rows]
        args.json.write_text(json.dumps(found))
    print(_table(rows))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from memshare.lab.retention.compare import ComparePlan, board, compare
    from memshare.lab.retention.policies import POLICIES
    from memshare.small_model.names import resolve_model

    dense = [name for name, policy in POLICIES.items() if not policy.routed]
    policies = args.policies.split(";") if args.policies else dense
    require_known("--policies", policies, POLICIES, "; ")
    plan = ComparePlan(
        model=resolve_model(args.model),
        reasoner=resolve_model(args.reasoner) if args.solutions else "",
        recorded=_kinds(args.texts),
        solutions=args.solutions,
        needles=args.needles,
        policies=tuple(policies),
        prefix=args.prefix,
        continuation=args.continuation,
        freed=tuple(fractions("--freed", args.freed)),
        recent=args.recent,
        window=args.window,
        position_weight=args.position_weight,
        limit=args.limit,
    )
    print(board(compare(plan, args.work)))
    return 0


def _show(args: argparse.Namespace) -> int:
    from memshare.mechanisms.compaction.probe.file import ProbeUnusable, read_card
    from memshare.mechanisms.compaction.probe.find import named_probe

    try:
        print(read_card(named_probe(args.probe)).markdown())
    except ProbeUnusable as reason:
        raise UserError(str(reason)) from None
    return 0


def _name(args: argparse.Namespace) -> str:
    """What the probe is to be called."""
    name: str = args.name or args.model.rstrip("/").rpartition("/")[2]
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name!r}: give letters, digits, '.', '_' and '-'")
    return name


def _write(probe: Probe, name: str, output: Path | None) -> None:
    """Write a probe where engines look, or to ``output``, and print its card."""
    from memshare.mechanisms.compaction.probe.file import ENDING, write_probe

    path = output or user_cache() / "probes" / f"{name}{ENDING}"
    write_probe(probe, path)
    print(probe.card.markdown())
    print(f"written: {path}")


def _kinds(words: list[str]) -> dict[str, Path]:
    """Folders by the kinds of their texts."""
    found = {}
    for word in words:
        kind, separator, folder = word.rpartition("=")
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UserError(f"--texts {word}: there is no folder {path}")
        kind = kind if separator else path.name
        if kind in found:
            raise UserError(f"--texts {word}: the kind {kind!r} is there already; name another")
        found[kind] = path
    return found


def _table(rows: list[tuple[str, Judged]]) -> str:
    heads = ("scorer", "texts", "dropped", "KL", "same top token", "texts unchanged")
    return table(
        heads,
        (
            [
                scorer, f"{row.texts} {row.kind}", f"{row.freed:.0%}", f"{row.kl:.4f}",
                f"{row.same_top:.3f}", str(row.unchanged),
            ]
            for scorer, row in rows
        ),
    )  # fmt: skip
