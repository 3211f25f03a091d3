"""First token at a switch of roles, and memory, over the length of the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from memshare.lab.agents.switches import Switch
from memshare.lab.plots.style import figure

_COLOURS = {
    "nonshared": "#000000", "base_lr_shared": "#0072b2", "stacked": "#d55e00",
    "full_shared": "#999999",
}  # fmt: skip
_MARKS = "o^sDvP*X"


def plot_switches(found: Mapping[int, Mapping[str, Sequence[Switch]]], path: Path) -> None:
    """Draw what was measured: a colour for each scheme, a mark for each number of agents.

    Args:
        found: by number of agents, and by scheme: one for each context.
        path: the picture; its ending decides the format.

    Raises:
        UserError: the picture cannot be drawn (see :func:`memshare.lab.plots.style.figure`).
    """
    with figure(path, columns=2, width=10.0, height=3.6) as (times, memory):
        for (agents, by_scheme), mark in zip(found.items(), _MARKS, strict=False):
            for scheme, rows in by_scheme.items():
                contexts = [row.context for row in rows]
                for panel, values in (
                    (times, [row.first for row in rows]),
                    (memory, [row.bytes / 1e6 for row in rows]),
                ):
                    panel.plot(
                        contexts, values, color=_COLOURS[scheme], marker=mark, linewidth=0.8,
                        label=f"{scheme}, {agents} agents",
                    )  # fmt: skip
        times.set(ylabel="first token at a switch, CPU s")
        memory.set(ylabel="KV kept, MB")
        for panel in (times, memory):
            panel.set(xscale="log", yscale="log", xlabel="tokens of the context")
        memory.legend(fontsize="x-small", ncols=2)
