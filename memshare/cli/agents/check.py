"""``memshare agents check``: which adapters share one KV cache, and why others do not.

Each adapter is a folder that peft wrote, named by its last part or as NAME=FOLDER.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memshare.cli.options import count
from memshare.config import AgentsConfig, ConfigError
from memshare.errors import UserError
from memshare.lab.markdown import table

if TYPE_CHECKING:
    from memshare.agents.adapter import Adapter
    from memshare.agents.base import BaseModelFacts

_SCHEMES: tuple[Literal["base_lr_shared"], Literal["stacked"]] = ("base_lr_shared", "stacked")
_MOST_RANK = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Reads adapters and says under which scheme they share one KV cache, with whom, what a "
        "token of N agents takes, and why one cannot. Loads no model. Exit status 1: no scheme "
        "takes all of them."
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="FOLDER or NAME=FOLDER")
    parser.add_argument("--base", type=Path, metavar="DIR", help="folder of the base model")
    parser.add_argument("--max-rank", type=count, default=_MOST_RANK, help="agents.max_rank")


def run(args: argparse.Namespace) -> int:
    """Tell.

    Raises:
        UserError: an adapter or the base model cannot be read.
    """
    from memshare.agents.adapter import read_adapter
    from memshare.agents.base import read_facts

    if args.max_rank > _MOST_RANK:
        raise UserError(f"--max-rank {args.max_rank}: give at most {_MOST_RANK}")
    folders = named(args.adapters)
    try:
        base = read_facts(args.base) if args.base is not None else None
        adapters = [read_adapter(name, folder) for name, folder in folders.items()]
    except ConfigError as error:
        raise UserError(str(error)) from None
    print(table(("adapter", "rank", "changes", "contents"), map(_row, adapters)))
    possible: list[str] = []
    for scheme in _SCHEMES:
        config = AgentsConfig(scheme=scheme, adapters=folders, max_rank=args.max_rank)
        print(f"\n{scheme}")
        possible += [scheme] * _tell(adapters, config, base)
    if base is not None and possible:
        print()
        print("\n".join(_memory(adapters, possible, base)))
    if possible:
        print("\n" + _configuration(folders, possible[0]))
    return 0 if possible else 1


def named(words: Sequence[str]) -> dict[str, Path]:
    """Read words ``PATH`` or ``NAME=PATH``, by names.

    Raises:
        UserError: two have one name.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        path = Path(folder if equals else word)
        name = name if equals else path.resolve().name
        if name in folders:
            raise UserError(f"{word}: {name!r} is there already; name one by NAME={word}")
        folders[name] = path
    return folders


def _row(adapter: Adapter) -> list[str]:
    parts = sorted({module.part for module in adapter.modules})
    return [adapter.name, str(adapter.rank), ", ".join(parts), adapter.digest[:12]]


def _tell(adapters: Sequence[Adapter], config: AgentsConfig, base: BaseModelFacts | None) -> bool:
    """Say what a scheme makes of the adapters; return whether it takes all of them."""
    from memshare.agents.family import Family
    from memshare.agents.refusals import faults_of

    faults = list(faults_of(adapters, config, base))
    if not faults:
        family = Family(config.scheme, tuple(adapters), "")
        names = ", ".join(adapter.name for adapter in adapters)
        print(f"  {names} share one cache, with {family.width} low-rank columns for each KV head")
        return True
    for fault in faults:
        print("  " + fault.removeprefix("agents.adapters.").replace("\n", "\n  "))
    for group in _groups(adapters, config, base):
        print(f"  {', '.join(group)} would share one cache without the others")
    return False


def _groups(
    adapters: Sequence[Adapter], config: AgentsConfig, base: BaseModelFacts | None
) -> Iterator[list[str]]:
    """Adapters that share among themselves: each goes to the first group that takes it."""
    from memshare.agents.refusals import faults_of

    groups: list[list[Adapter]] = []
    for adapter in adapters:
        for group in [*groups, []]:
            if not list(faults_of([*group, adapter], config, base)):
                if not group:
                    groups.append(group)
                group.append(adapter)
                break
    yield from ([adapter.name for adapter in group] for group in groups if len(group) > 1)


def _memory(
    adapters: Sequence[Adapter], schemes: Sequence[str], base: BaseModelFacts
) -> Iterator[str]:
    """What a token takes that all agents have read, in a cache of two bytes a number."""
    from memshare.agents.family import Family
    from memshare.agents.memory import padded, plain, widened
    from memshare.engine.adapter import vllm_adapter

    alone = plain(base).bytes_per_token(base, 2)
    apart = alone * len(adapters)
    rows = [["nonshared", f"{apart:,}", "1.000", f"{apart:,}", "1.000"]]
    sizes = vllm_adapter().padded_head_sizes()
    for scheme in schemes:
        width = Family(scheme, tuple(adapters), "").width
        cells = [scheme]
        for layout in (widened(base, width), padded(base, width, sizes)):
            taken = None if layout is None else layout.bytes_per_token(base, 2)
            cells += ["too wide", ""] if taken is None else [f"{taken:,}", f"{taken / apart:.3f}"]
        rows.append(cells)
    yield f"Bytes of KV for a token that {len(adapters)} agents have read, in a 16-bit cache:\n"
    yield table(("scheme", "GPU", "of nonshared", "CPU", "of nonshared"), rows)


def _configuration(folders: dict[str, Path], scheme: str) -> str:
    lines = [
        "To serve them, in the file that --memshare names:\n", "mode: off", "agents:",
        f"  scheme: {scheme}", "  adapters:",
    ]  # fmt: skip
    return "\n".join([*lines, *(f"    {name}: {path}" for name, path in folders.items())])
