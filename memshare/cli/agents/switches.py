"""``memshare agents switches``: first token and memory, by context and number of agents."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshare.cli.agents.check import named
from memshare.cli.agents.replays import add_schemes, run_schemes, usable, work_folder
from memshare.cli.options import count, counts, new_file
from memshare.errors import UserError
from memshare.lab.markdown import table

if TYPE_CHECKING:
    from memshare.lab.agents.switches import Switch
    from memshare.lab.agents.turns import ReplayPlan

Found = dict[int, dict[str, "list[Switch]"]]
"""By number of agents, and by scheme: one for each context."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Lets agents read one growing text after each other, each some tokens more than the one "
        "before, in a real engine for each scheme and number of agents. Says when the first token "
        "comes and what is kept in memory. Nothing else runs in the engine."
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="FOLDER or ROLE=FOLDER; one may come under "
        "several roles",
    )  # fmt: skip
    parser.add_argument(
        "--records", type=Path, action="append", required=True, metavar="FILE", help="records, as "
        "for train, whose inputs are the text; once or more",
    )  # fmt: skip
    add_schemes(parser)
    parser.add_argument(
        "--contexts", type=counts, default=(1024, 4096), help="tokens that the first agent reads, "
        "separated by ','",
    )  # fmt: skip
    parser.add_argument(
        "--agents", type=counts, help="how many of the adapters, separated by ',' (default: all)"
    )
    parser.add_argument("--new", type=count, default=24, help="tokens that come with each switch")
    parser.add_argument("--block-size", type=count, default=32, help="tokens")
    parser.add_argument("--step-tokens", type=count, default=2048, help="of an engine step")
    parser.add_argument("--dtype", default="float32", help="of weights and cache")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for measurements: an interrupted run goes on "
        "with what is missing (default: a temporary folder)",
    )  # fmt: skip
    parser.add_argument("--plot", type=new_file, metavar="FILE", help="also draw it")
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="also write the figures there"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and print tables.

    Raises:
        UserError: adapters, records or schemes cannot be used, or an engine failed.
    """
    from memshare.lab.agents.switches import switches
    from memshare.lab.plots.style import require_format

    if args.plot is not None:
        require_format(args.plot)
    folders = named(args.adapters)
    agents = args.agents or (len(folders),)
    _require_agents(agents, folders)
    schemes = usable(folders, args.schemes)
    found: Found = {}
    with work_folder(args.work) as folder:
        for number in agents:
            own = folder / f"{number}-agents"
            own.mkdir(exist_ok=True)
            some = dict(list(folders.items())[:number])
            print(f"{number} agents", flush=True)
            runs = run_schemes(_plan(args, some, str(own)), schemes, own)
            found[number] = {scheme: switches(run) for scheme, run in runs.items()}
            print(f"\n{_table(found[number])}\n", flush=True)
    if args.plot is not None:
        from memshare.lab.plots.switches import plot_switches

        plot_switches(found, args.plot)
    if args.json is not None:
        args.json.write_text(json.dumps(_plain(found)))
    return 0


def _require_agents(agents: Sequence[int], folders: Mapping[str, Path]) -> None:
    odd = [number for number in agents if not 2 <= number <= len(folders)]
    if odd:
        raise UserError(
            f"{odd[0]} agents: give at least two, and an adapter for each ({len(folders)} are "
            "there); one may come under several names: a=FOLDER b=FOLDER"
        )


def _plan(args: argparse.Namespace, folders: dict[str, Path], folder: str) -> ReplayPlan:
    from memshare.lab.agents.records import read_records
    from memshare.lab.agents.switches import switching
    from memshare.lab.agents.turns import ReplayPlan, texts_of
    from memshare.small_model.names import resolve_model, tokenizer_of

    model = resolve_model(args.base)
    records = [record for file in args.records for record in read_records(file)]
    text = texts_of(records, tokenizer_of(model, "--base"))
    return ReplayPlan(
        model=model,
        dtype=args.dtype,
        adapters={role: str(path) for role, path in folders.items()},
        conversations=switching(text, list(folders), args.contexts, args.new),
        at_once=1,
        kv_tokens=None,
        block_size=args.block_size,
        step_tokens=args.step_tokens,
        measured=False,
        folder=folder,
    )


def _table(found: Mapping[str, Sequence[Switch]]) -> str:
    from memshare.lab.agents.switches import growth

    heads = (
        "context", "scheme", "first token of the first agent, CPU s", "at a switch (median)",
        "lowest, highest", "sooner than nonshared", "of full_shared", "KV kept, MB",
        "of nonshared",
    )  # fmt: skip
    times = ", ".join(f"{scheme} {times:.1f}" for scheme, times in growth(found).items())
    grown = f"\n\nFrom the first context to the last it takes so many times as long: {times}"
    return table(heads, _rows(found)) + (grown if times else "")


def _rows(found: Mapping[str, Sequence[Switch]]) -> Iterator[list[str]]:
    for number, plain in enumerate(found["nonshared"]):
        for scheme, rows in found.items():
            here = rows[number]
            full = found["full_shared"][number].first if "full_shared" in found else None
            yield [
                f"{here.context:,}", scheme, f"{here.alone:.3f}", f"{here.first:.3f}",
                f"{here.spread[0]:.3f}, {here.spread[1]:.3f}",
                f"{plain.first / here.first:.1f} times",
                "" if full is None else f"{here.first / full:.2f}",
                f"{here.bytes / 1e6:.1f}", f"{here.bytes / plain.bytes:.3f}",
            ]  # fmt: skip


def _plain(found: Found) -> dict[int, dict[str, list[dict[str, Any]]]]:
    return {
        number: {scheme: [asdict(row) for row in rows] for scheme, rows in by_scheme.items()}
        for number, by_scheme in found.items()
    }
