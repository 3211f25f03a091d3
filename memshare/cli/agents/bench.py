"""``memshare agents bench``: what a shared cache gains and loses, on recorded trajectories."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from memshare.cli.agents.check import named
from memshare.cli.agents.replays import add_schemes, run_schemes, usable, work_folder
from memshare.cli.options import count, fraction, new_file, whole
from memshare.errors import UserError
from memshare.lab.markdown import table

if TYPE_CHECKING:
    from memshare.lab.agents.quality import Quality
    from memshare.lab.agents.turns import ReplayPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Replays trajectories in real engines, one for each scheme: roles take turns over a "
        "growing context and are made to write what was recorded. Says what each scheme computes "
        "and keeps in memory, and how far the outputs' distributions are from those of nonshared, "
        "with 95 % intervals over trajectories."
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="FOLDER or ROLE=FOLDER")
    parser.add_argument(
        "--records", action="append", required=True, metavar="ROLE=FILE", help="records of a role, "
        "as for train; once for each role",
    )  # fmt: skip
    add_schemes(parser)
    parser.add_argument(
        "--held-out", type=fraction, default=0.15, help="fraction of the trajectories that train "
        "kept aside, which are replayed; 1: all are",
    )  # fmt: skip
    parser.add_argument("--limit", type=count, default=16, help="trajectories")
    parser.add_argument(
        "--history", type=whole, default=0, help="tokens of others in front of each, for long "
        "contexts",
    )  # fmt: skip
    parser.add_argument("--at-once", type=count, default=4, help="trajectories open at a time")
    parser.add_argument(
        "--kv-tokens", type=count, help="KV memory, the same bytes for all schemes, in tokens of "
        "the base model's cache (default: as much as is used)",
    )  # fmt: skip
    parser.add_argument(
        "--speed-only", action="store_true", help="measure no distributions, which takes CPU time"
    )
    parser.add_argument("--block-size", type=count, default=32, help="tokens")
    parser.add_argument("--step-tokens", type=count, default=2048, help="of an engine step")
    parser.add_argument("--dtype", default="float32", help="of weights and cache")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for measurements: an interrupted run goes on "
        "with the schemes that are missing (default: a temporary folder)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="also write the figures there"
    )


def run(args: argparse.Namespace) -> int:
    """Replay under all schemes, and print tables.

    Raises:
        UserError: adapters, records or schemes cannot be used, or an engine failed.
    """
    folders = named(args.adapters)
    schemes = usable(folders, args.schemes)
    with work_folder(args.work) as folder:
        plan = _plan(args, folders, str(folder))
        turns = sum(map(len, plan.conversations))
        print(
            f"{len(plan.conversations)} trajectories, {turns} turns of {', '.join(folders)}, "
            f"prompts of {_middle(plan)} tokens (median), {plan.written} written; {args.base} "
            f"({args.dtype}), blocks of {args.block_size}; {', '.join(schemes)}\n",
            flush=True,
        )
        runs = run_schemes(plan, schemes, folder)
        print(_speeds(runs))
        measured = _measured(plan, schemes) if plan.measured else {}
        for who, by_scheme in measured.items():
            print(f"\n{who}\n\n{_qualities(by_scheme)}")
    if args.json is not None:
        quality = {who: {s: asdict(q) for s, q in rows.items()} for who, rows in measured.items()}
        args.json.write_text(json.dumps({"runs": runs, "quality": quality}))
    return 0


def _plan(args: argparse.Namespace, folders: dict[str, Path], folder: str) -> ReplayPlan:
    from memshare.lab.agents.records import read_records, split
    from memshare.lab.agents.turns import ReplayPlan, conversations
    from memshare.small_model.names import resolve_model, tokenizer_of

    files = named(args.records)
    if files.keys() != folders.keys():
        odd = ", ".join(sorted(files.keys() ^ folders.keys()))
        raise UserError(f"--records: give one file for each adapter, by its role; not so: {odd}")
    records = {role: read_records(file) for role, file in files.items()}
    if args.held_out < 1:
        records = split(records, args.held_out).held_out
    model = resolve_model(args.base)
    tokenizer = tokenizer_of(model, "--base")
    return ReplayPlan(
        model=model,
        dtype=args.dtype,
        adapters={role: str(path) for role, path in folders.items()},
        conversations=conversations(records, tokenizer, args.limit, args.history),
        at_once=args.at_once,
        kv_tokens=args.kv_tokens,
        block_size=args.block_size,
        step_tokens=args.step_tokens,
        measured=not args.speed_only,
        folder=folder,
    )


def _middle(plan: ReplayPlan) -> int:
    return int(median(len(turn.prompt) for turns in plan.conversations for turn in turns))


def _measured(plan: ReplayPlan, schemes: Sequence[str]) -> dict[str, dict[str, Quality]]:
    """Quality of all roles together, and of each."""
    from memshare.lab.agents.quality import qualities, read_sums

    roles = {"All roles": None} | {f"Role {role}": role for role in plan.adapters}
    return {who: qualities(read_sums(plan, schemes, role)) for who, role in roles.items()}


def _speeds(runs: Mapping[str, Mapping[str, Any]]) -> str:
    heads = (
        "scheme", "prompt tokens found", "role switches that found some", "tokens computed",
        "engine steps", "CPU seconds", "first token at a switch, CPU s", "preemptions",
        "KV kept, MB",
    )  # fmt: skip
    return table(heads, (_speed(run) for run in runs.values()))


def _speed(run: Mapping[str, Any]) -> list[str]:
    turns = run["turns"]
    switches = [turn for turn in turns if turn["switched"]]
    found = sum(turn["cached"] for turn in turns) / sum(turn["prompt"] for turn in turns)
    hits = sum(turn["cached"] > 0 for turn in switches)
    first = f"{median(t['first'] for t in switches):.3f}" if switches else ""
    return [
        run["scheme"], f"{found:.1%}", f"{hits} of {len(switches)}", f"{run['computed']:,}",
        f"{run['steps']:,}", f"{run['cpu']:.1f}", first, str(run["preemptions"]),
        f"{run['kept'] * run['block_bytes'] / 1e6:,.1f}",
    ]  # fmt: skip


def _qualities(found: Mapping[str, Quality]) -> str:
    heads = ("scheme", "NLL", "KL to nonshared", "same top token", "kept by NLL", "kept by KL")
    return table(heads, _quality_rows(found))


def _quality_rows(found: Mapping[str, Quality]) -> Iterator[list[str]]:
    for scheme, quality in found.items():
        yield [scheme, *(
            "" if estimate is None else str(estimate)
            for estimate in (
                quality.nll, quality.kl, quality.same_top, quality.kept_nll, quality.kept_kl
            )
        )]  # fmt: skip
