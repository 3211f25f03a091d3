"""``memshare replay``: what giving up blocks does to a model, on recorded chains of thought.

With ``--observe`` nothing is given up: a report says how much could be.
A real engine writes the recorded tokens. At a given length a policy gives up a fraction of every
request's blocks; from there on the next-token distributions are compared with those of plain vLLM.
Each run is an engine in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from memshare.cli.options import count, fractions, new_file, whole
from memshare.errors import UserError
from memshare.lab.bench.arms import DENSE, POLICIES, Arm, limits, require_usable, sharing_arms
from memshare.lab.bench.engine_process import OnProgress, call_in_process
from memshare.lab.bench.estimate import Work, estimate, in_words
from memshare.lab.bench.progress import ProgressBars
from memshare.lab.markdown import table

if TYPE_CHECKING:
    from memshare.lab.replay.run import ReplayPlan

_ARMS = "twins,oldest,random,paper"
_SIZES = (8, 16, 32, 64)  # tokens of a block

logger = logging.getLogger(__name__)


class ReplayRow(NamedTuple):
    """One line of the table."""

    arm: str
    wanted: float
    freed: float
    cells: list[tuple[float, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    parser.add_argument("--traces", type=Path, metavar="DIR", help="folder of recorded texts")
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument(
        "--arms", default=_ARMS,
        help=f"separated by ','; of {', '.join(POLICIES)}; or a policy of an installed package",
    )  # fmt: skip
    parser.add_argument("--freed", default="0.25", help="fractions of the blocks, separated by ','")
    parser.add_argument(
        "--observe", action="store_true", help="report whether the texts are suitable, and end"
    )
    parser.add_argument(
        "--text-only", action="store_true", help="with --observe: by token ids, without an engine"
    )
    parser.add_argument("--prefix", type=count, default=2432, help="output tokens before sharing")
    parser.add_argument("--continuation", type=count, default=512, help="output tokens after it")
    parser.add_argument("--limit", type=count, default=16, help="texts; all are in memory at once")
    parser.add_argument("--block-size", type=count, default=32, help="tokens")
    parser.add_argument("--recent", type=whole, default=128, help="protect.recent_tokens")
    parser.add_argument("--dtype", default="float32", help="of weights and cache")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the table there")


def run(args: argparse.Namespace) -> int:
    """Run all arms and print a table.

    Raises:
        UserError: traces, arms or fractions cannot be used, or an engine failed.
    """
    arms, freed = args.arms.split(","), fractions("--freed", args.freed)
    _require_arms(arms)
    if args.traces is None:
        raise UserError("say where the recorded texts are: --traces DIR")
    if args.text_only and not args.observe:
        raise UserError("--text-only is a part of --observe; give both")
    if args.observe and args.json is not None:
        raise UserError("--json: --observe has no table to be written; leave it out")
    with tempfile.TemporaryDirectory(prefix="memshare-replay-") as folder:
        if args.observe:
            return _observe(args, folder)
        plan = _plan(args, folder)
        runs = 1 + len(arms) * len(freed)
        print(
            f"{len(plan.outputs)} texts, {args.prefix} tokens before sharing, {args.continuation} "
            f"after; {args.model} ({args.dtype}), blocks of {args.block_size}; plain vLLM, then "
            f"{args.arms} at {args.freed} given up: {runs} runs. {_how_long(plan, runs)}\n",
            flush=True,
        )
        progress = ProgressBars(runs)
        with progress.run(DENSE.name) as told:
            _measure(plan, DENSE, told)
        rows = []
        for fraction in freed:
            for arm in arms:
                with progress.run(f"{arm}, {100 * fraction:.0f} % given up") as told:
                    rows.append(_row(plan, arm, fraction, told))
                if args.json is not None:  # after every row: a long comparison may be stopped
                    args.json.write_text(json.dumps([row._asdict() for row in rows]))
                logger.info("%s, %.0f %% given up: measured", arm, 100 * fraction)
    print(_table(rows))
    return 0


def _observe(args: argparse.Namespace, folder: str) -> int:
    """Print what could be given up, and what that means."""
    from memshare.lab.replay.opportunity import ObservedCoverage, mean_opportunity, report

    sizes = [size for size in _SIZES if 2 * size <= args.prefix]
    if not sizes:
        raise UserError(f"--prefix {args.prefix}: give {2 * _SIZES[0]} tokens or more")
    args.continuation = 0
    plan = _plan(args, folder)
    prefixes = [output[: args.prefix] for output in plan.outputs]
    by_text = "their token ids are compared, in seconds"
    if not args.text_only:
        by_text += f"; then {args.model} ({args.dtype}) writes them. {_how_long(plan, 1)}"
    print(f"{len(prefixes)} texts, the first {args.prefix} tokens of each: {by_text}\n", flush=True)
    rows = []
    for size in tqdm(sizes, desc="block sizes", leave=False, disable=None):
        found = mean_opportunity(prefixes, size)
        rows.append([str(size), *(f"{fraction:.1%}" for fraction in found)])
    heads = ("block size", "equal to another", "75 % equal, slot by slot", "75 % written again")
    print(table(heads, rows), flush=True)
    if args.text_only:
        return 0
    call_for = {"plan": f"{folder}/plan.json"}
    with ProgressBars(1).run("observe") as told:
        seen = call_in_process(
            "memshare.lab.replay.run:observe_plan",
            call_for,
            "the observing engine",
            plan.model,
            told,
        )
    print(f"\n{report([ObservedCoverage(*one) for one in seen], args.block_size)}")
    return 0


def _plan(args: argparse.Namespace, folder: str) -> ReplayPlan:
    """Tokenize the texts that are long enough, and write the plan."""
    from memshare.lab.bench.workloads import Source
    from memshare.lab.replay.run import SETTLING, ReplayPlan
    from memshare.lab.replay.traces import load_traces
    from memshare.small_model.names import resolve_model, tokenizer_of

    if not args.observe and args.continuation < 2 * SETTLING:
        raise UserError(
            f"--continuation {args.continuation}: remaps take up to {SETTLING} tokens, and what is "
            f"compared comes after them; give {2 * SETTLING} or more"
        )
    model = resolve_model(args.model)
    length = args.prefix + args.continuation
    source = Source(tokenizer_of(model), args.limit, length)
    prompts: list[list[int]] = []
    outputs: list[list[int]] = []
    for trace in load_traces(args.traces):
        text = source.ids(trace.reasoning)
        if len(text) < length:
            continue
        prompts.append(source.chat(trace.problem))
        outputs.append(text[:length])
        if len(outputs) == args.limit:
            break
    if not outputs:
        raise UserError(
            f"no text in {args.traces} has {length} tokens; lower --prefix or --continuation"
        )
    plan = ReplayPlan(
        model, args.dtype, args.block_size, prompts, outputs, args.prefix, args.recent, folder
    )
    plan.save(Path(folder) / "plan.json")
    return plan


def _require_arms(arms: list[str]) -> None:
    known = sharing_arms()
    for arm in arms:
        if arm not in known:
            raise UserError(f"there is no arm {arm!r}; choose of {', '.join(known)}")
        require_usable(arm)


def _how_long(plan: ReplayPlan, runs: int) -> str:
    """All texts are written at once, a token in a step."""
    texts = len(plan.outputs)
    steps = plan.prefix + plan.continuation
    context = sum(map(len, plan.prompts)) / texts + steps / 2
    work = Work(plan.model, plan.dtype, runs, steps, texts, context, texts * plan.continuation)
    return in_words(
        estimate(work), "fewer --arms or --freed, a smaller --limit or --prefix make it shorter"
    )


def _row(plan: ReplayPlan, arm: str, fraction: float, on_progress: OnProgress) -> ReplayRow:
    options = sharing_arms()[arm] | {
        "trigger": {"kind": "eager"},
        "budget": limits(fraction),
        "protect": {"recent_tokens": plan.recent},
    }
    result = _measure(plan, Arm(f"{arm}-{fraction}", options), on_progress)
    return ReplayRow(arm, fraction, result["freed"], [tuple(cell) for cell in result["cells"]])


def _measure(plan: ReplayPlan, arm: Arm, on_progress: OnProgress) -> Any:
    argument = {"plan": f"{plan.folder}/plan.json", "arm": asdict(arm)}
    name = f"the engine of {arm.name}"
    return call_in_process(
        "memshare.lab.replay.run:run_arm", argument, name, plan.model, on_progress
    )


def _table(rows: list[ReplayRow]) -> str:
    heads = ("policy", "blocks given up", "KL", "late KL", "change of NLL", "same top token")
    return table(
        heads,
        (
            [
                row.arm,
                f"{row.freed:.1%}",
                *(f"{mean:.4f} ± {error:.4f}" for mean, error in row.cells),
            ]
            for row in rows
        ),
    )
