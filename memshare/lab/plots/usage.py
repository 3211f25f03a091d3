"""KV memory over time, one panel per arm, with a tick for every step that preempts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from memshare.lab.bench.records import ArmRun, BenchRecord, StepMeasurement
from memshare.lab.plots.style import colour, figure


def plot_usage(record: BenchRecord, arms: Sequence[str], path: Path) -> None:
    """Draw the first repeat of a record of ``memshare bench``.

    Args:
        record: what was measured.
        arms: which of its arms, from top to bottom.
        path: the picture; its ending decides the format.

    Raises:
        UserError: the picture cannot be drawn (see :func:`memshare.lab.plots.style.figure`).
    """
    runs = {run.arm: run for run in record.repeats[0]}
    longest = max(runs[arm].timeline[-1].seconds for arm in arms)
    with figure(path, rows=len(arms)) as panels:
        for panel, arm in zip(panels, arms, strict=True):
            run = runs[arm]
            seconds = [step.seconds for step in run.timeline]
            used = in_use(run)
            panel.fill_between(seconds, used, color=colour(arm), alpha=0.25, linewidth=0)
            panel.plot(seconds, used, color=colour(arm), linewidth=0.8)
            for name, mark, height in (("preemptions", "|", 106.0), ("remaps", ".", 114.0)):
                at = rises(run.timeline, name)
                panel.plot(at, [height] * len(at), mark, color=colour(arm))
            panel.axhline(100, color="black", linewidth=0.5, linestyle=":")
            panel.set(xlim=(0, longest), ylim=(0, 120), ylabel="KV blocks in use, %")
            panel.set_title(_title(run), loc="left", fontsize="medium")
        panels[-1].set_xlabel("seconds;  | a step that preempts   · one that re-points blocks")


def in_use(run: ArmRun) -> list[float]:
    """Percent of the engine's KV blocks that are in use, step by step."""
    return [100 * step.used / run.blocks for step in run.timeline]


def rises(timeline: Sequence[StepMeasurement], name: str) -> list[float]:
    """When the count ``name`` went up, from 0 before the first step."""
    counts = [0, *(getattr(step, name) for step in timeline)]
    return [
        step.seconds
        for step, (earlier, later) in zip(timeline, pairwise(counts), strict=True)
        if later > earlier
    ]


def _title(run: ArmRun) -> str:
    return (
        f"{run.arm}: {run.tokens_per_second:.0f} tok/s, {run.preemptions} preemptions, "
        f"{run.recomputed} recomputed tokens, {run.running:.1f} requests at once"
    )
