"""What is paid for what is gained: one point an arm and budget."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from memshare.bench.report import wilson
from memshare.bench.run import Record
from memshare.plots.style import colour, figure


class Point(NamedTuple):
    """One arm at one budget.

    Attributes:
        arm: its name.
        gain: on the horizontal axis.
        cost: on the vertical axis.
        low, high: the ends of the interval around ``cost``.
    """

    arm: str
    gain: float
    cost: float
    low: float
    high: float


def accuracy_points(record: Record) -> list[Point]:
    """Right answers in percent (Wilson's 95 % interval) against tokens a second, dense = 1.

    Arms without graded tasks give no point.
    """
    points = []
    for arm in record.arms:
        runs = [run for repeat in record.repeats for run in repeat if run.arm == arm]
        right = [o.right for run in runs for o in run.outcomes if o.right is not None]
        if not right:
            continue
        ratios = [
            run.tokens_per_second / repeat[0].tokens_per_second
            for repeat in (sorted(r, key=lambda run: run.arm != "dense") for r in record.repeats)
            for run in repeat
            if run.arm == arm
        ]
        low, high = wilson(sum(right), len(right))
        points.append(
            Point(
                arm, statistics.median(ratios), 100 * sum(right) / len(right), 100 * low, 100 * high
            )
        )
    return points


def plot_pareto(points: Sequence[Point], gain: str, cost: str, path: Path) -> None:
    """Draw points; those of one policy at several budgets are joined.

    Args:
        points: what to draw.
        gain: label of the horizontal axis.
        cost: label of the vertical axis.
        path: the picture; its ending decides the format.

    Raises:
        UserError: the picture cannot be drawn (see :func:`memshare.plots.style.figure`).
    """
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(point.arm.split()[0], []).append(point)
    with figure(path) as (panel,):
        for family, mine in families.items():
            mine.sort(key=lambda point: point.gain)
            x, y = [p.gain for p in mine], [p.cost for p in mine]
            errors = ([p.cost - p.low for p in mine], [p.high - p.cost for p in mine])
            panel.errorbar(
                x, y, errors, color=colour(family), marker="o", capsize=2, linewidth=1, label=family
            )
        panel.set(xlabel=gain, ylabel=cost)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
