"""``memshare bench``: plain vLLM, MemShare's policies and baselines, on the same KV memory.

Every run is an engine in a process of its own. The arms alternate within a repeat, so that a
machine that speeds up or slows down meets all of them; ratios are taken within a repeat.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshare.cli.options import add_sharing, budgets, count, new_file, sharing
from memshare.core.token_map import TokenMap
from memshare.errors import UserError
from memshare.lab.bench import arms as known_arms
from memshare.lab.bench.engine_process import call_in_process
from memshare.lab.bench.estimate import Work, estimate, in_words
from memshare.lab.bench.models import DUMMY
from memshare.lab.bench.progress import ProgressBars
from memshare.lab.bench.workloads import GRADED, WORKLOADS
from memshare.small_model.names import SMOLLM2
from memshare.small_model.reasoner import NAME as REASONER

if TYPE_CHECKING:
    from memshare.lab.bench.arms import Arm
    from memshare.lab.bench.engine_process import OnProgress
    from memshare.lab.bench.records import ArmRun, BenchPlan
    from memshare.lab.bench.workloads import Task

_BATCHED = 2048  # max_num_batched_tokens

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    parser.add_argument(
        "--model",
        help=f"name, folder, hub id, or {DUMMY} (default: {REASONER} where answers are graded, "
        f"else {SMOLLM2.name})",
    )
    parser.add_argument(
        "--workload", default="reasoning", choices=WORKLOADS, help="what the requests are"
    )
    parser.add_argument("--traces", type=Path, metavar="DIR", help="recorded texts, to be forced")
    parser.add_argument(
        "--arms", default="dense,twins,oldest,random,paper",
        help=f"separated by ','; of {known_arms.CHOICES}",
    )  # fmt: skip
    parser.add_argument("--requests", type=count, default=24, help="all of them at once")
    parser.add_argument(
        "--tokens", type=count,
        help="generated tokens a request, at most (default: 1100 where answers are graded, else "
        "400)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="number of the first problem")
    parser.add_argument(
        "--memory", type=float, default=0.33,
        help="KV memory, as a fraction of what prompts and answers of all requests fill",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", type=count, help="KV blocks, instead of --memory; vLLM keeps one for itself"
    )
    parser.add_argument("--block-size", type=count, default=32, help="tokens")
    parser.add_argument("--max-num-seqs", type=count, default=256, help="requests that run at once")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    parser.add_argument("--tensor-parallel-size", type=count, default=1, help="ranks")
    parser.add_argument(
        "--compile", action="store_true", help="with CUDA graphs, as in service: for GPUs"
    )
    parser.add_argument("--repeats", type=count, default=3, help="runs of every arm")
    add_sharing(parser)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write every run there")


def run(args: argparse.Namespace) -> int:
    """Run all arms and print tables.

    Raises:
        UserError: an option cannot be used, or an engine failed.
    """
    from memshare.lab.bench.records import ArmRun, BenchRecord
    from memshare.lab.bench.report import accuracy_table, machine, remarks, speed_table

    arms = list(known_arms.expand(args.arms, budgets(args), sharing(args)))
    known_arms.require_kv_types(arms)
    graded = args.workload in GRADED
    args.model = args.model or (REASONER if graded else SMOLLM2.name)
    args.tokens = args.tokens or (1100 if graded else 400)
    plan = _plan(args)
    print(
        f"{len(plan.tasks)} requests ({args.workload}), {sum(t.max_tokens for t in plan.tasks)} "
        f"tokens at most; {args.model} ({args.dtype}); {plan.blocks - 1} usable KV blocks of "
        f"{plan.block_size}, trigger {args.trigger}; "
        f"{args.repeats} repeats of {len(arms)} arms; {machine()}."
        f"{known_arms.dropping(arms)}{known_arms.wider(arms, plan.blocks, plan.dtype)} "
        f"{_how_long(args, plan, len(arms))}\n",
        flush=True,
    )
    progress = ProgressBars(args.repeats * len(arms))
    repeats: list[list[ArmRun]] = []
    with tempfile.TemporaryDirectory(prefix="memshare-bench-") as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        for repeat in range(args.repeats):
            repeats.append([])
            for arm in arms if repeat % 2 == 0 else arms[::-1]:
                with progress.run(f"repeat {repeat + 1}, {arm.name}") as told:
                    repeats[-1].append(ArmRun.of(_measure(path, plan, arm, told)))
                _say(repeat, repeats[-1][-1])
                if args.json is not None:  # after every run: a long comparison may be stopped
                    BenchRecord.of(plan, arms, repeats).save(args.json)
    names = [arm.name for arm in arms]
    print(speed_table(names, repeats))
    for line in remarks([arm.name for arm in arms if arm.shares], names[0], repeats):
        print(f"\n{line}")
    if (accuracy := accuracy_table(names, repeats)) is not None:
        print(f"\n{accuracy}")
    return 0


def _plan(args: argparse.Namespace) -> BenchPlan:
    from memshare.lab.bench.models import resolve
    from memshare.lab.bench.records import BenchPlan
    from memshare.lab.bench.workloads import Source, build
    from memshare.small_model.names import tokenizer_of

    model = resolve(args.model)
    source = Source(tokenizer_of(model), args.requests, args.tokens, args.seed, args.traces)
    tasks = build(args.workload, source)
    blocks = args.blocks or 1 + round(args.memory * sum(_blocks(t, args.block_size) for t in tasks))
    longest = max(task.longest for task in tasks)
    if (blocks - 1) * args.block_size < longest:
        raise UserError(
            f"{blocks - 1} usable KV blocks of {args.block_size} tokens cannot hold the longest "
            f"request ({longest} tokens); raise --memory or --blocks, or ask for more requests"
        )
    return BenchPlan(
        model, args.dtype, args.block_size, blocks, longest + 1, args.max_num_seqs, _BATCHED, tasks,
        args.tensor_parallel_size, not args.compile,
    )  # fmt: skip


def _blocks(task: Task, block_size: int) -> int:
    return TokenMap(block_size).entries(task.need)


def _how_long(args: argparse.Namespace, plan: BenchPlan, arms: int) -> str:
    tokens = sum(task.expected or task.max_tokens for task in plan.tasks)
    context = sum(task.need for task in plan.tasks) / len(plan.tasks) / 2
    held = (plan.blocks - 1) * plan.block_size / (2 * context)  # requests that the memory holds
    batch = max(1.0, min(len(plan.tasks), plan.max_num_seqs, held))
    work = Work(plan.model, plan.dtype, args.repeats * arms, tokens / batch, batch, context)
    return in_words(
        estimate(work), "fewer --repeats, --arms, --requests or --tokens make it shorter"
    )


def _measure(path: Path, plan: BenchPlan, arm: Arm, on_progress: OnProgress) -> Any:
    argument = {"plan": str(path), "arm": asdict(arm)}
    name = f"the engine of {arm.name}"
    return call_in_process(
        "memshare.lab.bench.run:run_arm", argument, name, plan.model, on_progress
    )


def _say(repeat: int, run: ArmRun) -> None:
    right = [outcome.right for outcome in run.outcomes if outcome.right is not None]
    logger.info(
        "repeat %d, %s: %.1f tok/s, %d steps, %d preemptions, %d blocks reclaimed%s",
        repeat + 1, run.arm, run.tokens_per_second, run.steps, run.preemptions, run.reclaimed,
        f", {sum(right)} of {len(right)} right" if right else "",
    )  # fmt: skip
