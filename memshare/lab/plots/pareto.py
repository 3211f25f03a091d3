"""Cost against gain: one point per arm and budget."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from memshare.lab.bench.records import ArmRun, BenchRecord
from memshare.lab.bench.report import interval, right_answers
from memshare.lab.plots.style import colour, figure


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


def accuracy_points(
    record: BenchRecord, work: Callable[[ArmRun], float] = lambda run: run.tokens_per_second
) -> dict[str, list[Point]]:
    """Right answers in percent, by group of tasks, against the work that was done.

    Groups are kept apart: one that no arm ever fails would hide what the others lose. Answers have
    their 95 % interval. Work is the median over repeats of the ratio to the first arm's in the
    same repeat; arms and groups without graded answers, or without such a ratio, give no point.

    Args:
        record: what was measured.
        work: of a run, such as its tokens a second.
    """
    speeds = record.ratios(next(iter(record.arms)), work)
    points: dict[str, list[Point]] = {}
    for arm, runs in record.runs.items():
        groups = dict.fromkeys(o.group for o in runs[0].outcomes if o.right is not None)
        for group in groups if arm in speeds else ():
            right = right_answers(runs, group)
            cost, (low, high) = statistics.fmean(itertools.chain(*right)), interval(right)
            point = Point(arm, statistics.median(speeds[arm]), 100 * cost, 100 * low, 100 * high)
            points.setdefault(group, []).append(point)
    return dict(sorted(points.items()))


def plot_pareto(panels: Mapping[str, Sequence[Point]], gain: str, path: Path) -> None:
    """Draw points; those of one policy at several budgets are joined.

    Args:
        panels: what to draw side by side, by the label of the vertical axis.
        gain: label of the horizontal axes.
        path: the picture; its ending decides the format.

    Raises:
        UserError: the picture cannot be drawn (see :func:`memshare.lab.plots.style.figure`).
    """
    with figure(path, columns=len(panels), width=max(8.0, 5.0 * len(panels))) as axes:
        for panel, (cost, points) in zip(axes, panels.items(), strict=True):
            for policy, mine in by_policy(points).items():
                x, y = [p.gain for p in mine], [p.cost for p in mine]
                errors = ([p.cost - p.low for p in mine], [p.high - p.cost for p in mine])
                panel.errorbar(
                    x, y, errors, color=colour(policy), marker="o", capsize=2, linewidth=1,
                    label=policy,
                )  # fmt: skip
            panel.set(xlabel=gain, ylabel=cost)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")


def by_policy(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points that are joined: ``twins 0.25`` and ``twins 0.5`` are of one policy; by gain."""
    policies: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.gain):
        policies.setdefault(point.arm.split()[0], []).append(point)
    return policies
