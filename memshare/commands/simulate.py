"""``memshare simulate``: what sharing would bring on machines that are not at hand.

vLLM's real scheduler and MemShare's real connector run; time comes from a model of a step's cost.
With ``--deployment`` the costs follow from published numbers. With ``--measured`` they are fitted
to one record of ``memshare bench --json``, and the other records are predicted and compared.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.commands.options import fractions
from memshare.errors import UserError
from memshare.tables import table_head, table_row

if TYPE_CHECKING:
    from memshare.bench.run import Record, Run
    from memshare.simulate.costs import Deployment, StepCosts, StepWork
    from memshare.simulate.run import Job, Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    group = parser.add_argument_group("a deployment by published numbers")
    group.add_argument("--deployment", type=Path, metavar="YAML", help="model and accelerators")
    group.add_argument("--requests", type=int, default=256)
    group.add_argument("--prompt", type=int, default=200, help="tokens")
    group.add_argument("--output", default="4000-16000", help="generated tokens: N, or FROM-TO")
    group.add_argument("--rate", type=float, help="requests a second (default: all at once)")
    group.add_argument("--seed", type=int, default=0, help="of lengths and arrivals")
    group.add_argument(
        "--freed", default="0.25,0.5", help="fractions of the blocks that may be given up, by ','"
    )
    group.add_argument("--recent", type=int, default=128, help="protect.recent_tokens")
    group.add_argument("--max-num-seqs", type=int, default=256, help="requests at once")
    group.add_argument("--max-num-batched-tokens", type=int, default=8192, help="tokens of a step")
    group = parser.add_argument_group("a check against measured runs")
    group.add_argument(
        "--measured", type=Path, nargs="+", metavar="JSON",
        help="records of `memshare bench`: costs are fitted to the first and checked on the others",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Simulate and print a table.

    Raises:
        UserError: an option or a file cannot be used.
    """
    if (args.deployment is None) == (args.measured is None):
        raise UserError("give either --deployment or --measured")
    # vLLM looks at these when it is imported. No memory is taken: nothing is computed.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return _deployment(args) if args.measured is None else _measured(args.measured)


def _deployment(args: argparse.Namespace) -> int:
    from memshare.simulate.run import Engine, share, simulate

    freed = fractions("--freed", args.freed)
    deployment = _read(args.deployment)
    jobs = _jobs(args)
    try:
        blocks = deployment.blocks
    except ValueError as error:
        raise UserError(str(error)) from None
    engine = Engine(
        blocks, deployment.block_size, args.max_num_seqs, args.max_num_batched_tokens,
        deployment.costs,
    )  # fmt: skip
    needed = sum(-(-(job.prompt + job.output) // deployment.block_size) for job in jobs)
    print(
        f"{deployment.name}: {blocks} KV blocks of {deployment.block_size} tokens, "
        f"{blocks / needed:.2f} of what {len(jobs)} requests need at full length. Simulated.\n"
    )
    heads = ("arm", "tok/s", "ratio", "mean running", "preemptions", "recomputed tokens", "remaps")
    print(table_head(heads))
    dense = simulate(engine, jobs, None)
    print(_row("dense", dense, dense), flush=True)
    for fraction in freed:
        found = simulate(engine, jobs, share(fraction, args.recent))
        print(_row(f"up to {fraction:.0%} given up", found, dense), flush=True)
    return 0


def _read(path: Path) -> Deployment:
    import yaml
    from pydantic import ValidationError

    from memshare.config import explain
    from memshare.simulate.costs import Deployment

    try:
        return Deployment.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        raise UserError(explain(error, Deployment, [str(path)])) from None


def _jobs(args: argparse.Namespace) -> list[Job]:
    from memshare.simulate.run import Job

    first, _, last = args.output.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high:
        raise UserError(f"--output {args.output}: give a number of tokens, or two as 4000-16000")
    if args.requests < 1 or args.prompt < 1:
        raise UserError("--requests and --prompt must be 1 or more")
    draw, arrival, jobs = random.Random(args.seed), 0.0, []
    for _ in range(args.requests):
        if args.rate is not None:
            arrival += draw.expovariate(args.rate)
        jobs.append(Job(arrival, args.prompt, draw.randint(low, high)))
    return jobs


def _row(arm: str, found: Prediction, dense: Prediction) -> str:
    cells = (
        arm,
        f"{found.tokens_per_second:.0f}",
        f"{found.tokens_per_second / dense.tokens_per_second:.2f}",
        f"{found.running:.1f}",
        str(found.preemptions),
        str(found.recomputed),
        str(found.remaps),
    )
    return table_row(cells)


def _measured(paths: list[Path]) -> int:
    from memshare.bench.run import Record
    from memshare.simulate.costs import fit

    records = [Record.load(path) for path in paths]
    costs = fit([step for runs in records[0].repeats for run in runs for step in _steps(run)])
    print(
        f"Costs fitted to {paths[0].name}: {1e3 * costs.step:.2f} ms a step, "
        f"{1e3 * costs.request:.3f} ms a request, {1e3 * costs.token:.3f} ms a token, "
        f"{1e6 * costs.context:.3f} us a token of context.\n"
    )
    heads = ("record", "arm", "ratio to dense", "predicted", "error", "steps", "predicted")
    print(table_head(heads))
    for path, record in zip(paths, records, strict=True):
        for line in _compare(path.stem, record, costs):
            print(line, flush=True)
    return 0


def _steps(run: Run) -> list[tuple[StepWork, float]]:
    from memshare.simulate.costs import StepWork

    return [
        (StepWork(later.requests, later.tokens, later.context), later.seconds - earlier.seconds)
        for earlier, later in pairwise(run.timeline)
        if later.requests
    ]


def _compare(name: str, record: Record, costs: StepCosts) -> list[str]:
    """Predict every arm of a record; lines of the table."""
    from memshare.simulate.run import Engine, Job, simulate

    engine = Engine(
        record.blocks, record.block_size, record.max_num_seqs, record.max_num_batched_tokens, costs
    )
    dense: Prediction | None = None
    lines = []
    for arm, runs in record.runs.items():
        options = record.arms[arm]
        jobs = [
            Job(0.0, prompt, outcome.tokens)
            for prompt, outcome in zip(record.prompts, runs[0].outcomes, strict=True)
        ]
        # Which blocks go does not matter here, and how many is the arm's budget.
        found = simulate(engine, jobs, options and options | {"policy": {"name": "oldest"}})
        dense = dense or found
        measured = statistics.median(
            run.tokens_per_second / repeat[_dense(repeat)].tokens_per_second
            for repeat in record.repeats
            for run in repeat
            if run.arm == arm
        )
        predicted = found.tokens_per_second / dense.tokens_per_second
        error = f"{predicted / measured - 1:+.1%}"
        steps = (str(runs[0].steps), str(found.steps))
        lines.append(table_row([name, arm, f"{measured:.2f}", f"{predicted:.2f}", error, *steps]))
    return lines


def _dense(repeat: list[Run]) -> int:
    arms = [run.arm for run in repeat]
    if "dense" not in arms:
        raise UserError("a record without the arm 'dense' has nothing to compare with")
    return arms.index("dense")
