"""What a replica counts itself, in both exporters: ``/metrics`` and the Ray node's port.

The engine's metrics come by vLLM's way (:mod:`memshare.engine.prometheus`); these are counted in
front of it. Both follow :mod:`memshare.telemetry.metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator

import prometheus_client
from ray.util import metrics as ray_metrics

from memshare.telemetry.metric import Kind, Label, Metric
from memshare.telemetry.replica_metrics import REPLICA

OTHER = "other"


class BoundedLabel:
    """Keeps the values of a label few, however many there are: each value costs a time series."""

    def __init__(self, most: int) -> None:
        """The first ``most`` values stay; later ones become ``other``."""
        self._most = most
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value to put on the label."""
        if value not in self._seen:
            if len(self._seen) >= self._most:
                return OTHER
            self._seen.add(value)
        return value


class ReplicaMetrics:
    """Counts and shows ``memshare.telemetry.replica_metrics.REPLICA``. Thread-safe, as both
    exporters are."""

    def __init__(
        self,
        model_name: str,
        replica_id: str,
        most_values: int = 100,
        registry: prometheus_client.CollectorRegistry = prometheus_client.REGISTRY,
    ) -> None:
        """Register the series; once in a process.

        Args:
            model_name: label of every series.
            replica_id: Ray Serve's, for the label ``ReplicaId`` of the Ray node's port.
            most_values: of a label whose values are not known beforehand, such as ``tenant``.
            registry: the one that ``/metrics`` shows.
        """

        def of_kind(kind: Kind) -> Iterator[tuple[str, Metric, _Tags]]:
            for name, metric in REPLICA.items():
                if metric.kind == kind:
                    yield name, metric, _Tags(metric, model_name, replica_id, most_values)

        self._counters = {n: _Counter(m, tags, registry) for n, m, tags in of_kind("counter")}
        self._gauges = {n: _Gauge(m, tags, registry) for n, m, tags in of_kind("gauge")}

    def count(self, name: str, *values: str, by: int = 1) -> None:
        """Count.

        Args:
            name: of a counter of ``memshare.telemetry.replica_metrics.REPLICA``.
            values: of the metric's own labels, in their order.
            by: how many.

        Raises:
            ValueError: the metric has other labels, or a label no such value.
        """
        self._counters[name].count(values, by)

    def show(self, name: str, *values: str, value: float) -> None:
        """Set a gauge.

        Args:
            name: of a gauge of ``memshare.telemetry.replica_metrics.REPLICA``.
            values: of the metric's own labels, in their order.
            value: in the metric's unit.

        Raises:
            ValueError: as for :meth:`count`.
        """
        self._gauges[name].show(values, value)


class _Tags:
    """The labels of one metric's series, for both exporters."""

    def __init__(self, metric: Metric, model_name: str, replica_id: str, most_values: int) -> None:
        self._metric = metric
        self._model_name = model_name
        self._replica_id = replica_id
        self._bounds = [BoundedLabel(most_values) for _ in metric.labels]

    def __call__(self, values: tuple[str, ...]) -> dict[str, str]:
        """The labels on ``/metrics``."""
        own = {
            label.name: self._bound(i, label, value)
            for i, (label, value) in enumerate(zip(self._metric.labels, values, strict=True))
        }
        return {"model_name": self._model_name, **own}

    def on_node(self, tags: dict[str, str]) -> dict[str, str]:
        """The same on the Ray node's port, where replicas must be told apart."""
        return {**tags, "ReplicaId": self._replica_id}

    def _bound(self, index: int, label: Label, value: str) -> str:
        if not label.values:
            return self._bounds[index](value)
        if value not in label.values:
            raise ValueError(f"{self._metric.name}: {label.name} has no value {value!r}")
        return value


class _Counter:
    def __init__(
        self, metric: Metric, tags: _Tags, registry: prometheus_client.CollectorRegistry
    ) -> None:
        names = metric.label_names
        self._tags = tags
        self._prometheus = prometheus_client.Counter(
            metric.family, metric.meaning, names, registry=registry
        )
        self._ray = ray_metrics.Counter(metric.family, metric.meaning, (*names, "ReplicaId"))

    def count(self, values: tuple[str, ...], by: int) -> None:
        if by == 0:
            return
        tags = self._tags(values)
        self._prometheus.labels(**tags).inc(by)
        self._ray.inc(by, tags=self._tags.on_node(tags))


class _Gauge:
    def __init__(
        self, metric: Metric, tags: _Tags, registry: prometheus_client.CollectorRegistry
    ) -> None:
        names = metric.label_names
        self._tags = tags
        self._prometheus = prometheus_client.Gauge(
            metric.family, metric.meaning, names, registry=registry
        )
        self._ray = ray_metrics.Gauge(metric.family, metric.meaning, (*names, "ReplicaId"))

    def show(self, values: tuple[str, ...], value: float) -> None:
        tags = self._tags(values)
        self._prometheus.labels(**tags).set(value)
        self._ray.set(value, tags=self._tags.on_node(tags))
