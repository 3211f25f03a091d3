"""Write the tables of ``docs/metrics.md`` from the list of metrics.

    python -m tools.docs.metrics

:mod:`memshare.telemetry.metrics` is the truth. The text between the tables is written by hand; each
table stands between two comments that name it. A test fails while the page differs from what this
script would write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from memshare.telemetry.metric import Label, Metric
from memshare.telemetry.metrics import (
    BLOCKS,
    COUNTERS,
    EXPERT_SKEW,
    GAUGES,
    HISTOGRAMS,
    LABELLED,
)
from memshare.telemetry.replica_metrics import REPLICA

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "metrics.md"

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def tables() -> dict[str, str]:
    """The tables by the name that their comment gives."""
    return {
        "counters": _table(["metric", "unit", "counts"], map(_plain, COUNTERS.values())),
        "labelled": _table(["metric", "unit", "label", "counts"], map(_full, LABELLED.values())),
        "labels": "\n\n".join(_values(LABELLED.values())),
        "gauges": _table(
            ["metric", "unit", "label", "shows"],
            map(_full, (*GAUGES.values(), BLOCKS, EXPERT_SKEW)),
        ),
        "gauge_labels": "\n\n".join(_values([BLOCKS])),
        "histograms": _table(["metric", "unit", "shows"], map(_plain, HISTOGRAMS.values())),
        "replica": _table(
            ["metric", "unit", "label", "counts or shows"], map(_full, REPLICA.values())
        ),
        "replica_labels": "\n\n".join(_values(REPLICA.values())),
    }


def render(page: str) -> str:
    """The page with its tables written anew.

    Raises:
        KeyError: the page asks for a table that there is not.
    """
    made = tables()
    return _TABLE.sub(lambda m: f"{m[1]}\n{made[m[2]]}\n\n{m[3]}", page)


def _plain(metric: Metric) -> list[str]:
    return [f"`{metric.prometheus}`", metric.unit, metric.meaning]


def _full(metric: Metric) -> list[str]:
    labels = ", ".join(f"`{label.name}`" for label in metric.labels)
    return [f"`{metric.prometheus}`", metric.unit, labels, metric.meaning]


def _values(metrics: Iterable[Metric]) -> Iterator[str]:
    for metric in metrics:
        for label in metric.labels:
            if label.values:
                yield f"Values of `{label.name}` of `{metric.prometheus}`:\n\n{_meanings(label)}"


def _meanings(label: Label) -> str:
    return _table([label.name, "meaning"], ([f"`{v}`", text] for v, text in label.values.items()))


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
