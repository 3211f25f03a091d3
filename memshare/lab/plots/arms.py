"""What each arm costs and gains: correct answers beside what the scheduler had to do."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from memshare.lab.bench.records import ArmRun, BenchRecord
from memshare.lab.bench.report import interval, right_answers
from memshare.lab.plots.style import colour, figure


class Bar(NamedTuple):
    """One arm in one panel.

    Attributes:
        arm: its name.
        height: of the bar.
        low, high: the ends of an interval around it, or of the spread over repeats.
        label: the number that stands at it.
    """

    arm: str
    height: float
    low: float
    high: float
    label: str


_COUNTS: tuple[tuple[str, Callable[[ArmRun], float], str], ...] = (
    ("preemptions", lambda run: run.preemptions, ".0f"),
    ("recomputed tokens", lambda run: run.recomputed, ",.0f"),
    ("tokens per engine step", lambda run: run.tokens_per_step, ".1f"),
)


def panels(record: BenchRecord) -> dict[str, list[Bar]]:
    """Bars by title of their panel: correct answers of every group, then the scheduler's counts.

    Answers have Wilson's 95 % interval, over all repeats; counts the medians of repeats. Arms that
    have not run yet have no bars.
    """
    runs = record.runs
    every = [o for mine in runs.values() for run in mine for o in run.outcomes]
    groups = sorted({o.group for o in every if o.right is not None})
    found = {
        f"correct answers, {group} (%)": [_answers(arm, mine, group) for arm, mine in runs.items()]
        for group in groups
    }
    for title, value, digits in _COUNTS:
        found[title] = [_count(arm, [*map(value, mine)], digits) for arm, mine in runs.items()]
    return found


def _answers(arm: str, runs: Sequence[ArmRun], group: str) -> Bar:
    right = right_answers(runs, group)
    low, high = interval(right)
    every = list(itertools.chain(*right))
    label = f"{sum(every)}/{len(every)}"
    return Bar(arm, 100 * statistics.fmean(every), 100 * low, 100 * high, label)


def _count(arm: str, values: Sequence[float], digits: str) -> Bar:
    middle = statistics.median(values)
    return Bar(arm, middle, min(values), max(values), f"{middle:{digits}}")


def plot_arms(record: BenchRecord, path: Path) -> None:
    """Draw a record of ``memshare bench``.

    Args:
        record: what was measured.
        path: the picture; its ending decides the format.

    Raises:
        UserError: the picture cannot be drawn (see :func:`memshare.lab.plots.style.figure`).
    """
    found = panels(record)
    wide = max(2.4, 0.54 * max(map(len, found.values())))
    with figure(path, columns=len(found), width=wide * len(found), height=2.8) as axes:
        for panel, (title, bars) in zip(axes, found.items(), strict=True):
            for place, bar in enumerate(bars):
                around = [[bar.height - bar.low], [bar.high - bar.height]]
                panel.bar(place, bar.height, yerr=around, capsize=3, color=colour(bar.arm))
                panel.text(place, bar.high, bar.label, ha="center", va="bottom", fontsize="x-small")
            panel.set_xticks(
                range(len(bars)), [bar.arm for bar in bars], rotation=40, ha="right",
                rotation_mode="anchor",
            )  # fmt: skip
            panel.set_title(title, fontsize="small")
            panel.margins(y=0.12)
            panel.spines[["top", "right"]].set_visible(False)
