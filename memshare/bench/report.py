"""Tables of what arms did: medians, spreads, and ratios within a repeat."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from memshare.bench.run import Run
from memshare.tables import table

_Z = 1.96  # of a 95 % interval


def speed_table(arms: Sequence[str], repeats: Sequence[Sequence[Run]]) -> str:
    """Return a Markdown table with a line an arm; ratios are to the first arm.

    Args:
        arms: their names, in the order of the lines.
        repeats: the runs of each repeat, one an arm, in any order.
    """
    columns: tuple[tuple[str, Callable[[Run], float], int], ...] = (
        ("tokens a step", lambda run: run.tokens_per_step, 2),
        ("steps", lambda run: run.steps, 0),
        ("preemptions", lambda run: run.preemptions, 0),
        ("recomputed tokens", lambda run: run.recomputed, 0),
        ("mean running", lambda run: run.running, 1),
        ("most running", lambda run: run.peak, 0),
        ("blocks reclaimed", lambda run: run.reclaimed, 0),
        ("first token s, p50", lambda run: run.first_token[0], 2),
        ("p99", lambda run: run.first_token[1], 2),
        ("between tokens ms, p50", lambda run: 1000 * run.between_tokens[0], 0),
        ("p99", lambda run: 1000 * run.between_tokens[1], 0),
        ("CPU s", lambda run: run.cpu_seconds, 0),
    )
    heads = ("arm", "tok/s", "ratio", *(head for head, _, _ in columns))
    rows = []
    for arm in arms:
        mine = [_of(arm, runs) for runs in repeats]
        base = [_of(arms[0], runs) for runs in repeats]
        ratios = [
            a.tokens_per_second / b.tokens_per_second for a, b in zip(mine, base, strict=True)
        ]
        row = [
            arm,
            spread([run.tokens_per_second for run in mine], 1),
            spread(ratios, 2),
            *(spread([value(run) for run in mine], digits) for _, value, digits in columns),
        ]
        rows.append(row)
    return table(heads, rows)


def accuracy_table(arms: Sequence[str], repeats: Sequence[Sequence[Run]]) -> str | None:
    """Return a Markdown table of right answers of each group; None if no task has an answer.

    The interval is Wilson's at 95 %. ``change`` is against the first arm, problem by problem, in
    points, with the 95 % interval of the mean of the paired differences.
    """
    first = _of(arms[0], repeats[0])
    groups = sorted({o.group for o in first.outcomes if o.right is not None})
    if not groups:
        return None
    heads = ("arm", "problems", "right", "95 %", "change", "tokens an answer", "blocks given up")
    rows = []
    for group in groups:
        base = _right(arms[0], repeats, group)
        for arm in arms:
            right = _right(arm, repeats, group)
            outcomes = [o for runs in repeats for o in _of(arm, runs).outcomes if o.group == group]
            count, *accuracy = accuracy_cells(right, base)
            row = [
                arm,
                f"{count} {group}",
                *accuracy,
                f"{statistics.fmean(o.tokens for o in outcomes):.0f}",
                f"{statistics.fmean(o.repointed for o in outcomes):.1%}",
            ]
            rows.append(row)
    return table(heads, rows)


def accuracy_cells(right: Sequence[bool], base: Sequence[bool]) -> list[str]:
    """Return cells of a table: count, share, its interval, and the change against ``base``.

    Args:
        right: ``[N]`` whether each answer is right.
        base: ``[N]`` the same of the arm that is compared with, question by question.
    """
    low, high = wilson(sum(right), len(right))
    share = f"{sum(right) / len(right):.1%}"
    return [str(len(right)), share, f"{low:.1%} - {high:.1%}", _change(right, base)]


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson's score interval)."""
    share, z2 = right / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # Rounding must not push the share itself out of its interval.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def spread(values: Sequence[float], digits: int) -> str:
    """Return ``median (least-most)``, or one number if they are the same."""
    middle = f"{statistics.median(values):.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return middle if low == high else f"{middle} ({low}-{high})"


def machine() -> str:
    """Return what this machine is: cores and processor."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} x {name}"


def _of(arm: str, runs: Sequence[Run]) -> Run:
    return next(run for run in runs if run.arm == arm)


def _right(arm: str, repeats: Sequence[Sequence[Run]], group: str) -> list[bool]:
    return [bool(o.right) for runs in repeats for o in _of(arm, runs).outcomes if o.group == group]


def _change(right: Sequence[bool], base: Sequence[bool]) -> str:
    differences = [100.0 * (a - b) for a, b in zip(right, base, strict=True)]
    mean = statistics.fmean(differences)
    if not any(differences) or len(differences) < 2:
        return "-"
    half = _Z * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f} ± {half:.1f}"
