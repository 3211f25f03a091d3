"""Tables of several records of ``memshare bench --json`` as one comparison.

A long comparison can be cut in two ways: an arm at a time (the same requests), and some requests at
a time (``--seed``, each piece in memory of its own). Counts of engine steps add up; times do not
compare between runs and are left out.

    python -m tools.bench.join dense-0.json dense-100.json twins-0.json twins-100.json
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from memshare.errors import UserError
from memshare.lab.bench.records import ArmRun, BenchRecord
from memshare.lab.bench.report import accuracy_table
from memshare.lab.markdown import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("records", type=Path, nargs="+", metavar="JSON", help="one repeat each")
    runs = join([BenchRecord.load(path) for path in parser.parse_args().records])
    print(counts_table(runs))
    print()
    print(accuracy_table([run.arm for run in runs], [runs]) or "no graded answers")


def join(records: Sequence[BenchRecord]) -> list[ArmRun]:
    """One run of each arm, over the requests of all records.

    Raises:
        UserError: an arm has not run with all of the requests, or twice with some.
    """
    pieces: dict[tuple[int, ...], list[BenchRecord]] = {}
    for record in records:
        pieces.setdefault(tuple(record.prompts), []).append(record)
    wholes = [BenchRecord.together(each).runs for each in pieces.values()]
    for whole in wholes:
        if whole.keys() != wholes[0].keys() or any(len(runs) != 1 for runs in whole.values()):
            raise UserError(
                f"one piece has the arms {', '.join(wholes[0])}, another {', '.join(whole)}; each "
                "must have run once with every piece of the requests"
            )
    return [_sum([whole[arm][0] for whole in wholes]) for arm in wholes[0]]


def _sum(runs: Sequence[ArmRun]) -> ArmRun:
    return dataclasses.replace(
        runs[0],
        steps=sum(run.steps for run in runs),
        tokens=sum(run.tokens for run in runs),
        preemptions=sum(run.preemptions for run in runs),
        recomputed=sum(run.recomputed for run in runs),
        reclaimed=sum(run.reclaimed for run in runs),
        outcomes=[outcome for run in runs for outcome in run.outcomes],
    )


def counts_table(runs: Sequence[ArmRun]) -> str:
    """Return a Markdown table of what the scheduler did, with multiples of the first arm's."""
    base = runs[0]
    heads = ("arm", "steps", "tokens per step", "preemptions", "recomputed tokens")
    return table(
        heads,
        (
            [
                run.arm,
                f"{run.steps}",
                f"{run.tokens_per_step:.1f} ({run.tokens_per_step / base.tokens_per_step:.2f}x)",
                f"{run.preemptions} ({_multiple(run.preemptions, base.preemptions)})",
                f"{run.recomputed} ({_multiple(run.recomputed, base.recomputed)})",
            ]
            for run in runs
        ),
    )


def _multiple(value: int, base: int) -> str:
    return f"{value / base:.2f}x" if base else "-"


if __name__ == "__main__":
    main()
