"""Tables of what arms did: medians, spreads, and ratios within a repeat."""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from memshare.lab.bench.records import ArmRun
from memshare.lab.markdown import table

_Z = 1.96  # of a 95 % interval

Samples = Sequence[bool]
"""Whether each of several answers to one question is right."""


def speed_table(arms: Sequence[str], repeats: Sequence[Sequence[ArmRun]]) -> str:
    """Return a Markdown table with a line an arm; ratios are to the first arm.

    A ratio comes with its spread over the repeats, or, where there is one repeat, not at all: two
    runs alone differ by what else the machine did.

    Args:
        arms: their names, in the order of the lines.
        repeats: the runs of each repeat, one an arm, in any order.
    """
    columns: tuple[tuple[str, Callable[[ArmRun], float], int], ...] = (
        ("tokens per step", lambda run: run.tokens_per_step, 2),
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
        ("packing, % of time", lambda run: 100 * run.packing_seconds / run.seconds, 1),
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
            _ratio(ratios) if arm != arms[0] else "1",
            *(spread([value(run) for run in mine], digits) for _, value, digits in columns),
        ]
        rows.append(row)
    return table(heads, rows)


def _ratio(ratios: Sequence[float]) -> str:
    if len(ratios) < 2:
        return "-"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def remarks(sharing: Sequence[str], base: str, repeats: Sequence[Sequence[ArmRun]]) -> list[str]:
    """Return what has to be known to read the table of speeds; one sentence or two each.

    Args:
        sharing: arms that may give up blocks.
        base: the arm that ratios are to.
        repeats: as for :func:`speed_table`.
    """
    found = []
    if len(repeats) == 1 and len(repeats[0]) > 1:
        found.append("No ratios: one repeat has no spread. Ask for more with --repeats.")
    for arm in sharing:
        idle = [runs for runs in repeats if not _of(arm, runs).reclaimed]
        if not idle:
            continue
        when = "" if len(idle) == len(repeats) else f" in {len(idle)} of {len(repeats)} repeats"
        preempted = any(_of(name, runs).preemptions for runs in idle for name in (arm, base))
        why = (
            "memory was short, but there was nothing that it may give up"
            if preempted
            else "memory was never short. Ask for less of it with --memory"
        )
        found.append(
            f"{arm} reclaimed nothing{when}: {why}. Its speed there says nothing about sharing."
        )
    return found


def accuracy_table(arms: Sequence[str], repeats: Sequence[Sequence[ArmRun]]) -> str | None:
    """Return a Markdown table of correct answers by group; None if no task has an answer.

    The interval is that of :func:`interval`. ``change`` is against the first arm, problem by
    problem, in points, with the 95 % interval of the mean of the paired differences; that of the
    tokens per answer likewise.
    """
    first = _of(arms[0], repeats[0])
    groups = sorted({o.group for o in first.outcomes if o.right is not None})
    if not groups:
        return None
    heads = (
        "arm", "problems", "correct", "95 %", "change", "tokens per answer", "cut off",
        "blocks given up",
    )  # fmt: skip
    rows = []
    for group in groups:
        base = right_answers([_of(arms[0], runs) for runs in repeats], group)
        for arm in arms:
            mine = [_of(arm, runs) for runs in repeats]
            outcomes = [o for run in mine for o in run.outcomes if o.group == group]
            count, *accuracy = accuracy_cells(right_answers(mine, group), base)
            row = [
                arm,
                f"{count} {group}",
                *accuracy,
                _length(mine, [_of(arms[0], runs) for runs in repeats], group),
                str(sum(o.cut for o in outcomes)),
                f"{statistics.fmean(o.repointed for o in outcomes):.1%}",
            ]
            rows.append(row)
    return table(heads, rows)


def _length(mine: Sequence[ArmRun], base: Sequence[ArmRun], group: str) -> str:
    """Mean tokens per answer, and the change against ``base``."""
    ours, theirs = (
        [[o.tokens for o in run.outcomes if o.group == group] for run in runs]
        for runs in (mine, base)
    )
    changes = [
        statistics.fmean(a) - statistics.fmean(b)
        for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    mean = f"{statistics.fmean(itertools.chain(*ours)):.0f}"
    return f"{mean} ({_mean_change(changes, 0)})" if any(changes) else mean


def right_answers(runs: Sequence[ArmRun], group: str) -> list[Samples]:
    """Whether each problem of a group was answered rightly, in every run of one arm."""
    answers = [[bool(o.right) for o in run.outcomes if o.group == group] for run in runs]
    return list(zip(*answers, strict=True))


def accuracy_cells(right: Sequence[Samples], base: Sequence[Samples]) -> list[str]:
    """Return cells of a table: answers, share, its interval, and the change against ``base``.

    Args:
        right: ``[questions]`` whether each answer to a question is right.
        base: the same of the arm that is compared with, question by question.
    """
    low, high = interval(right)
    share = f"{statistics.fmean(itertools.chain(*right)):.1%}"
    count = sum(map(len, right))
    return [str(count), share, f"{low:.1%} - {high:.1%}", _change(right, base)]


def interval(right: Sequence[Samples]) -> tuple[float, float]:
    """Return the 95 % interval of the share of right answers: Wilson's, clustered by question.

    Several answers to one question say less than answers to as many questions. How much less is
    told by how far the shares of the questions lie apart: the interval is that of as many
    independent answers as would spread so far.

    Args:
        right: as for :func:`accuracy_cells`.
    """
    shares = [statistics.fmean(samples) for samples in right]
    share, questions, answers = statistics.fmean(shares), len(right), sum(map(len, right))
    if questions == 1 or answers == questions or not 0 < share < 1:
        return wilson(share, questions)
    between = statistics.variance(shares) / questions
    worth = share * (1 - share) / between if between else answers
    return wilson(share, min(max(worth, questions), answers))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson's score interval)."""
    z2 = _Z * _Z
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


def _of(arm: str, runs: Sequence[ArmRun]) -> ArmRun:
    return next(run for run in runs if run.arm == arm)


def _change(right: Sequence[Samples], base: Sequence[Samples]) -> str:
    differences = [
        100.0 * (statistics.fmean(a) - statistics.fmean(b))
        for a, b in zip(right, base, strict=True)
    ]
    return _mean_change(differences, 1) if any(differences) else "-"


def _mean_change(differences: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.{digits}f}"
    half = _Z * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"
