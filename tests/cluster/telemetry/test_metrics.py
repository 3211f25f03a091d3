"""Counters of a replica: bounded labels, both exporters."""

from __future__ import annotations

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.telemetry.metrics import OTHER, BoundedLabel, ReplicaMetrics


@given(st.lists(st.text(min_size=1, max_size=3), max_size=40), st.integers(1, 8))
def test_a_label_has_few_values_and_each_value_stays_what_it_was(
    values: list[str], most: int
) -> None:
    bound = BoundedLabel(most)
    shown = [bound(value) for value in values]
    assert len(set(shown)) <= most + 1
    assert [bound(value) for value in values] == shown
    distinct = set(values)
    if len(distinct) <= most:
        assert shown == values


@pytest.fixture
def registry() -> prometheus_client.CollectorRegistry:
    return prometheus_client.CollectorRegistry()


def make(registry: prometheus_client.CollectorRegistry, most: int = 2) -> ReplicaMetrics:
    return ReplicaMetrics("smollm2", "replica-1", most, registry)


def test_counts_by_tenant(registry: prometheus_client.CollectorRegistry) -> None:
    metrics = make(registry)
    for tenant in ("red", "blue", "green", "grey", "red"):
        metrics.count("tenant_requests", tenant, "served")
    metrics.count("tenant_tokens", "red", "output", by=70)
    metrics.count("tenant_tokens", "red", "output", by=0)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "smollm2", **labels})

    requests = "memshare_tenant_requests_total"
    assert value(requests, tenant="red", outcome="served") == 2
    assert value(requests, tenant="blue", outcome="served") == 1
    assert value(requests, tenant=OTHER, outcome="served") == 2
    assert value(requests, tenant="green", outcome="served") is None
    assert value("memshare_tenant_tokens_total", tenant="red", kind="output") == 70


@pytest.mark.parametrize("values", [("red",), ("red", "served", "x"), ("red", "eaten")])
def test_wrong_labels_are_refused(
    registry: prometheus_client.CollectorRegistry, values: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - zip's own, or ours
        make(registry).count("tenant_requests", *values)
