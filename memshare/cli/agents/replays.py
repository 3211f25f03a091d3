"""What the commands have in common that replay conversations: schemes, folders, engines."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from memshare.cli.options import require_known
from memshare.config import AgentsConfig, ConfigError
from memshare.errors import UserError
from memshare.small_model.names import SMOLLM2

if TYPE_CHECKING:
    from memshare.lab.agents.turns import ReplayPlan

_RUN = "memshare.lab.agents.replay:run_scheme"
SCHEMES: tuple[str, ...] = get_args(AgentsConfig.model_fields["scheme"].annotation)


def add_schemes(parser: argparse.ArgumentParser) -> None:
    """Declare which model, and which schemes :func:`usable` chooses from."""
    parser.add_argument("--base", default=SMOLLM2.name, help="base model: name, folder or hub id")
    parser.add_argument(
        "--schemes", help=f"separated by ','; of {', '.join(SCHEMES)} (default: all that take the "
        "adapters)",
    )  # fmt: skip


def run_schemes(plan: ReplayPlan, schemes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Replay a plan in an engine for each scheme, with a progress bar for each.

    Args:
        plan: what is replayed.
        schemes: by name.
        folder: for measurements; those that are in it are taken.

    Returns:
        :class:`memshare.lab.agents.replay.SchemeRun` by scheme, as JSON holds it.

    Raises:
        UserError: the folder holds measurements by another plan, or an engine failed.
    """
    from memshare.lab.bench.engine_process import call_in_process
    from memshare.lab.bench.progress import ProgressBars

    file = _kept(plan, folder)
    bars, runs = ProgressBars(len(schemes)), {}
    for scheme in schemes:
        result = folder / f"{scheme}.json"
        with bars.run(scheme) as told:
            if not result.exists():
                argument = {"plan": str(file), "scheme": scheme}
                found = call_in_process(_RUN, argument, scheme, plan.model, told)
                result.write_text(json.dumps(found))
        runs[scheme] = json.loads(result.read_text())
    return runs


@contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """The folder for measurements, which goes away unless the user has named it."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="memshare-agents-") as folder:
            yield Path(folder)
        return
    work.mkdir(parents=True, exist_ok=True)
    yield work


def _kept(plan: ReplayPlan, folder: Path) -> Path:
    """The plan's file; what an earlier run has measured by the same plan is used.

    Raises:
        UserError: the folder holds measurements by another plan.
    """
    file, new = folder / "plan.json", folder / "plan.new"
    plan.save(new)
    if file.exists() and file.read_bytes() != new.read_bytes():
        new.unlink()
        raise UserError(f"--work {folder} holds what was measured otherwise; name another folder")
    new.replace(file)
    return file


def usable(folders: dict[str, Path], wanted: str | None) -> list[str]:
    """The schemes to run, ``nonshared`` first.

    Raises:
        UserError: one is unknown or does not take the adapters, or an adapter cannot be read.
    """
    from memshare.agents.adapter import adapters_by_name
    from memshare.agents.refusals import check_adapters

    names = SCHEMES if wanted is None else tuple(dict.fromkeys(("nonshared", *wanted.split(","))))
    require_known("--schemes", names, SCHEMES)
    found = []
    try:
        adapters = adapters_by_name(folders)
        for name in names:
            config = AgentsConfig.model_validate({"scheme": name, "adapters": folders})
            try:
                check_adapters(adapters, config)
            except ConfigError:
                if wanted is not None or name == "full_shared":
                    raise
                continue
            found.append(name)
    except ConfigError as error:
        raise UserError(str(error)) from None
    return found
