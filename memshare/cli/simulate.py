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
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.cli.options import add_recent, count, fractions, positive
from memshare.config import without_fields
from memshare.core.token_map import TokenMap
from memshare.errors import UserError
from memshare.lab.bench.arms import limits
from memshare.lab.markdown import table_head, table_row

if TYPE_CHECKING:
    from memshare.lab.bench.records import ArmRun, BenchRecord
    from memshare.lab.simulate.costs import Deployment, StepCosts, StepWork
    from memshare.lab.simulate.placed import PlacedDeployment
    from memshare.lab.simulate.run import Prediction, SimulatedJob


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    group = parser.add_argument_group("a deployment by published numbers")
    group.add_argument(
        "--deployment", type=Path, metavar="YAML", help="model and accelerators; or a model's "
        "config.json, and how it is divided (see `moe placement`)",
    )  # fmt: skip
    group.add_argument(
        "--accelerators", help="how many, several by ',' (default: as the file says)"
    )
    group.add_argument("--requests", type=count, default=256, help="how many")
    group.add_argument("--prompt", type=count, default=200, help="tokens")
    group.add_argument("--output", default="4000-16000", help="generated tokens: N, or FROM-TO")
    group.add_argument(
        "--traces", type=Path, metavar="DIR",
        help="recorded texts (see `replay`) whose lengths take the place of --prompt and --output",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", default="smollm2-135m", metavar="MODEL", help="that counts their tokens"
    )
    group.add_argument("--rate", type=positive, help="requests a second (default: all at once)")
    group.add_argument("--seed", type=int, default=0, help="of lengths and arrivals")
    group.add_argument(
        "--policy",
        choices=("oldest", "compaction"),
        default="oldest",
        help="how blocks are given up: entries are re-pointed, or tokens dropped, which attention "
        "then does not read",
    )
    group.add_argument(
        "--freed", default="0.25,0.5", help="fractions of the blocks that may be given up, by ','"
    )
    group.add_argument(
        "--opportunity", type=Path, metavar="JSON",
        help="record of `memshare bench`: one more row, whose requests can give up what those of "
        "--arm did",
    )  # fmt: skip
    group.add_argument("--arm", default="twins", help="of the record")
    add_recent(group)
    group.add_argument("--max-num-seqs", type=count, default=256, help="requests at once")
    group.add_argument(
        "--max-num-batched-tokens", type=count, default=8192, help="tokens of a step"
    )
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
    for name in os.environ.keys() - without_fields(os.environ).keys():
        del os.environ[name]  # the options say how MemShare is configured
    return _deployment(args) if args.measured is None else _measured(args.measured)


def _deployment(args: argparse.Namespace) -> int:
    from memshare.lab.simulate.costs import Deployment

    deployment = _read(args.deployment)
    counts = _accelerators(args.accelerators)
    jobs = _jobs(args)
    replicas = 1
    machines: list[Deployment | PlacedDeployment] = [deployment]
    if isinstance(deployment, Deployment):
        machines = [deployment.model_copy(update={"accelerators": n}) for n in counts] or machines
        print(f"{deployment.name}: {len(jobs)} requests. Simulated.\n")
    elif counts:
        raise UserError(f"--accelerators: {args.deployment} says how its model is divided")
    else:
        replicas = deployment.data_parallel_size
        print(
            f"{deployment.name}: {len(jobs)} requests, every {replicas}. of them on one replica, "
            "which stands for all. Simulated.\n"
            if replicas > 1
            else f"{deployment.name}: {len(jobs)} requests. Simulated.\n"
        )
        jobs = jobs[::replicas]
    arms = _arms(args, jobs)
    heads = (
        "accelerators", "KV blocks", "of what all need", "arm", "tok/s", "ratio", "mean running",
        "preemptions", "recomputed tokens", "remaps or rounds",
    )  # fmt: skip
    print(table_head(heads))
    for machine in machines:
        for line in _rows(machine, replicas, jobs, arms, args):
            print(line, flush=True)
    return 0


def _accelerators(text: str | None) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")] if text else []
    except ValueError:
        counts = [0]
    if any(number < 1 for number in counts):
        raise UserError(f"--accelerators {text}: give whole numbers from 1, separated by ','")
    return counts


def _arms(
    args: argparse.Namespace, jobs: list[SimulatedJob]
) -> dict[str, tuple[list[SimulatedJob], float]]:
    """Jobs and budget of each arm, by its name in the table."""
    arms = {
        f"up to {100 * fraction:g}% given up": (jobs, fraction)
        for fraction in fractions("--freed", args.freed)
    }
    if args.opportunity is not None:
        measured = _opportunity(args.opportunity, args.arm)
        draw = random.Random(args.seed)
        drawn = [job._replace(opportunity=draw.choice(measured)) for job in jobs]
        mean = statistics.fmean(job.opportunity for job in drawn)
        arms[f"as {args.arm} in {args.opportunity.name}: {mean:.0%}"] = (drawn, 1.0)
    return arms


def _opportunity(path: Path, arm: str) -> list[float]:
    """Fractions of their blocks that the requests of a measured arm gave up."""
    from memshare.lab.bench.records import BenchRecord

    runs = BenchRecord.load(path).runs
    if arm not in runs:
        raise UserError(f"--arm {arm}: {path} has none; it has {', '.join(runs)}")
    return [outcome.repointed for run in runs[arm] for outcome in run.outcomes]


def _rows(
    deployment: Deployment | PlacedDeployment,
    replicas: int,
    jobs: list[SimulatedJob],
    arms: dict[str, tuple[list[SimulatedJob], float]],
    args: argparse.Namespace,
) -> Iterator[str]:
    """Lines of the table for one number of accelerators."""
    from memshare.lab.simulate.costs import DoesNotFitError
    from memshare.lab.simulate.run import PredictedEngine, by_age, simulate

    number = str(deployment.accelerators)
    try:
        blocks = deployment.blocks
        engine = PredictedEngine(
            blocks, deployment.block_size, args.max_num_seqs, args.max_num_batched_tokens,
            deployment.costs,
        )  # fmt: skip
        dense = simulate(engine, jobs, None)
    except DoesNotFitError as error:
        yield table_row([number, "-", "-", f"cannot run: {error}", *["-"] * 6])
        return
    token_map = TokenMap(deployment.block_size)
    needed = sum(token_map.entries(job.prompt + job.output) for job in jobs)
    machine = [number, str(blocks), f"{blocks / needed:.2f}"]
    yield _row(machine, "dense", dense, dense, replicas)
    for name, (own_jobs, budget) in arms.items():
        options = {
            "policy": {"name": args.policy},
            "budget": limits(budget),
            "protect": {"recent_tokens": args.recent},
        }
        yield _row(machine, name, simulate(engine, own_jobs, by_age(options)), dense, replicas)


def _read(path: Path) -> Deployment | PlacedDeployment:
    import yaml
    from pydantic import ValidationError

    from memshare.config import ConfigError, explain
    from memshare.lab.simulate.costs import Deployment
    from memshare.lab.simulate.placed import PlacedDeployment

    kind: type[Deployment | PlacedDeployment] = Deployment
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or "model" not in fields:
            return Deployment.model_validate(fields)
        kind = PlacedDeployment
        placed = PlacedDeployment.model_validate(fields)
        placed = placed.model_copy(update={"model": path.parent / placed.model})
        _ = placed.placement  # before vLLM is loaded
    except (OSError, yaml.YAMLError, ConfigError) as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        raise UserError(explain(error, kind, [str(path)])) from None
    return placed


def _jobs(args: argparse.Namespace) -> list[SimulatedJob]:
    from memshare.lab.simulate.run import SimulatedJob

    draw, arrival, jobs = random.Random(args.seed), 0.0, []
    lengths = (_lengths if args.traces is None else _recorded_lengths)(args)
    for _, (prompt, output) in zip(range(args.requests), lengths, strict=False):
        if args.rate is not None:
            arrival += draw.expovariate(args.rate)
        jobs.append(SimulatedJob(arrival, prompt, output))
    return jobs


def _lengths(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Tokens of prompts and outputs, without end."""
    first, _, last = args.output.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high:
        raise UserError(f"--output {args.output}: give a number of tokens, or two as 4000-16000")
    draw = random.Random(args.seed)
    while True:
        yield args.prompt, draw.randint(low, high)


def _recorded_lengths(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """The same of recorded texts, in random order, again and again."""
    from memshare.lab.bench.models import resolve
    from memshare.lab.bench.workloads import Source
    from memshare.lab.replay.traces import load_traces
    from memshare.small_model.names import tokenizer_of

    source = Source(tokenizer_of(resolve(args.tokenizer), "--tokenizer"), 0, 0)
    found = [
        (max(1, len(source.ids(trace.problem))), max(1, len(source.ids(trace.reasoning))))
        for trace in load_traces(args.traces)
    ]
    draw = random.Random(args.seed)
    while True:
        yield from draw.sample(found, len(found))


def _row(machine: list[str], arm: str, found: Prediction, dense: Prediction, replicas: int) -> str:
    cells = (
        *machine,
        arm,
        f"{replicas * found.tokens_per_second:.0f}",
        f"{found.tokens_per_second / dense.tokens_per_second:.2f}",
        f"{found.running:.1f}",
        str(found.preemptions),
        str(found.recomputed),
        str(found.remaps),
    )
    return table_row(cells)


def _measured(paths: list[Path]) -> int:
    from memshare.lab.bench.records import BenchRecord
    from memshare.lab.simulate.costs import fit

    records = [BenchRecord.load(path) for path in paths]
    try:
        costs = fit([step for runs in records[0].repeats for run in runs for step in _steps(run)])
    except ValueError as error:
        raise UserError(f"{paths[0]}: {error}") from None
    print(
        f"Costs fitted to {paths[0].name}: {1e3 * costs.step:.2f} ms per step, "
        f"{1e3 * costs.request:.3f} ms per request, {1e3 * costs.token:.3f} ms per token, "
        f"{1e6 * costs.context:.3f} us per token of context.\n"
    )
    heads = ("record", "arm", "ratio to dense", "predicted", "error", "steps", "predicted")
    print(table_head(heads))
    for path, record in zip(paths, records, strict=True):
        for line in _compare(path.stem, record, costs):
            print(line, flush=True)
    return 0


def _steps(run: ArmRun) -> list[tuple[StepWork, float]]:
    from memshare.lab.simulate.costs import StepWork

    return [
        (StepWork(later.requests, later.tokens, later.context), later.seconds - earlier.seconds)
        for earlier, later in pairwise(run.timeline)
        if later.requests
    ]


def _compare(name: str, record: BenchRecord, costs: StepCosts) -> list[str]:
    """Predict every arm of a record; lines of the table."""
    from memshare.lab.simulate.run import PredictedEngine, by_age, simulate

    runs = record.runs
    if "dense" not in runs:
        raise UserError(f"{name}: a record without the arm 'dense' has nothing to compare with")
    ratios = record.ratios("dense")
    found = {}
    for arm, options in record.arms.items():
        if arm in ratios:
            engine = PredictedEngine(
                runs[arm][0].blocks, record.block_size, record.max_num_seqs,
                record.max_num_batched_tokens, costs,
            )  # fmt: skip
            memshare = by_age(options) if options else None
            found[arm] = simulate(engine, _jobs_of(record, arm), memshare)
    lines = []
    for arm, prediction in found.items():
        measured = statistics.median(ratios[arm])
        predicted = prediction.tokens_per_second / found["dense"].tokens_per_second
        error = f"{predicted / measured - 1:+.1%}"
        steps = (str(runs[arm][0].steps), str(prediction.steps))
        lines.append(table_row([name, arm, f"{measured:.2f}", f"{predicted:.2f}", error, *steps]))
    return lines


def _jobs_of(record: BenchRecord, arm: str) -> list[SimulatedJob]:
    """What an arm ran; a policy that compares found as much as it gave up, the others take any."""
    from memshare.lab.simulate.run import SimulatedJob

    runs = record.runs[arm]
    policy = (record.arms[arm] or {}).get("policy", {}).get("name")
    return [
        SimulatedJob(
            0.0,
            prompt,
            outcomes[0].tokens,
            1.0
            if policy in ("oldest", "random", "compaction", None)
            else statistics.fmean(outcome.repointed for outcome in outcomes),
        )
        for prompt, *outcomes in zip(record.prompts, *(run.outcomes for run in runs), strict=True)
    ]
