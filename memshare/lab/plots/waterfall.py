"""From all blocks that were filled to those that were given up, and why the rest were not."""

from __future__ import annotations

from pathlib import Path

from memshare.lab.bench.block_outcomes import BLOCK_OUTCOMES
from memshare.lab.bench.records import ArmRun
from memshare.lab.plots.style import colour, figure


def plot_waterfall(run: ArmRun, path: Path) -> None:
    """Draw what became of all blocks of a run.

    Args:
        run: of an arm with MemShare.
        path: the picture; its ending decides the format.

    Raises:
        UserError: the picture cannot be drawn (see :func:`memshare.lab.plots.style.figure`).
    """
    kept = [
        outcome
        for outcome in BLOCK_OUTCOMES
        if run.block_outcomes.get(outcome) and outcome != "given up"
    ]
    left = total = sum(run.block_outcomes.values())
    with figure(path, width=9.0) as (panel,):
        panel.barh(0, total, color=colour("dense"), alpha=0.6)
        panel.text(total, 0, f" {total} filled", va="center")
        for row, outcome in enumerate(kept, start=1):
            count = run.block_outcomes[outcome]
            left -= count
            panel.barh(row, count, left=left, color=colour("other"))
            panel.text(left + count, row, f" {count} ({count / total:.0%})", va="center")
        given_up = run.block_outcomes.get("given up", 0)
        panel.barh(len(kept) + 1, given_up, color=colour(run.arm))
        panel.text(given_up, len(kept) + 1, f" {given_up} ({given_up / total:.0%})", va="center")
        panel.set_yticks(range(len(kept) + 2), ["all blocks", *kept, "given up"])
        panel.set(xlim=(0, 1.2 * total), xlabel=f"{run.arm}: KV blocks of requests when they ended")
        panel.invert_yaxis()
