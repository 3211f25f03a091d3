"""The list of metrics, and what is made of it."""

from __future__ import annotations

import re
from typing import get_args

import prometheus_client
import pytest

from memshare.telemetry.metric import COMMON_LABELS, Metric
from memshare.telemetry.metrics import LABELLED, METRICS
from memshare.telemetry.stats import DropReason
from tools.docs.metrics import PAGE, render

# Both exporters accept what matches (Ray: src/ray/stats/metric.cc).
NAME = re.compile(r"[a-z][a-z0-9_]*")

every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


@every_metric
def test_a_metric_is_whole(metric: Metric) -> None:
    assert NAME.fullmatch(metric.name)
    assert not metric.name.endswith("_total"), "exporters add it"
    assert metric.unit
    assert metric.meaning
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert set(COMMON_LABELS[metric.home]).isdisjoint(label.name for label in metric.labels)
    for label in metric.labels:
        assert NAME.fullmatch(label.name)
        assert all(label.values.values())


@every_metric
def test_the_spelling_is_the_one_that_prometheus_exports(metric: Metric) -> None:
    registry = prometheus_client.CollectorRegistry()
    makers = {
        "counter": prometheus_client.Counter,
        "gauge": prometheus_client.Gauge,
        "histogram": prometheus_client.Histogram,
    }
    made = makers[metric.kind](
        metric.family, metric.meaning, list(metric.label_names), registry=registry
    )
    made.labels(*("x" for _ in metric.label_names))
    text = prometheus_client.generate_latest(registry).decode()
    suffix = "_count" if metric.kind == "histogram" else ""
    assert f"\n{metric.prometheus}{suffix}{{" in text
    assert metric.ray == "ray_" + metric.prometheus.replace(":", "_")


def test_names_are_unique_in_both_spellings() -> None:
    for names in ([m.name for m in METRICS], [m.ray for m in METRICS]):
        assert len(set(names)) == len(names)


def test_every_reason_that_a_pair_is_dropped_for_is_listed() -> None:
    (label,) = LABELLED["dropped"].labels
    assert set(label.values) == set(get_args(DropReason))


def test_the_tables_of_the_page_are_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page), "run: python -m tools.docs.metrics"
    assert all(f"`{metric.prometheus}`" in page for metric in METRICS)
    stale = page.replace("remaps applied", "remaps")
    assert render(stale) == page, "negative control"
