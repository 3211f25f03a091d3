"""What a replica counts itself, in both exporters: ``/metrics`` and the Ray node's port.

The engine's metrics come by vLLM's way (:mod:`memshare.engine.prometheus`); these are counted in
front of it. Both follow :mod:`memshare.telemetry.metrics`.
"""

from __future__ import annotations

import prometheus_client
from ray.util import metrics as ray_metrics

from memshare.telemetry.metric import Label, Metric
from memshare.telemetry.metrics import REPLICA

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
    """Counts ``memshare.telemetry.metrics.REPLICA``. Thread-safe, as both exporters are."""

    def __init__(
        self,
        model_name: str,
        replica_id: str,
        most_values: int = 100,
        registry: prometheus_client.CollectorRegistry = prometheus_client.REGISTRY,
    ) -> None:
        """Register the counters; once in a process.

        Args:
            model_name: label of every series.
            replica_id: Ray Serve's, for the label ``ReplicaId`` of the Ray node's port.
            most_values: of a label whose values are not known beforehand, such as ``tenant``.
            registry: the one that ``/metrics`` shows.
        """
        self._model_name = model_name
        self._replica_id = replica_id
        self._counters = {
            name: _Counter(metric, most_values, registry) for name, metric in REPLICA.items()
        }

    def count(self, name: str, *values: str, by: int = 1) -> None:
        """Count.

        Args:
            name: one of ``memshare.telemetry.metrics.REPLICA``.
            values: of the metric's own labels, in their order.
            by: how many.

        Raises:
            ValueError: the metric has other labels, or a label no such value.
        """
        self._counters[name].count(self._model_name, self._replica_id, values, by)


class _Counter:
    def __init__(
        self, metric: Metric, most_values: int, registry: prometheus_client.CollectorRegistry
    ) -> None:
        self._metric = metric
        names = metric.label_names
        self._prometheus = prometheus_client.Counter(
            metric.family, metric.meaning, names, registry=registry
        )
        self._ray = ray_metrics.Counter(metric.family, metric.meaning, (*names, "ReplicaId"))
        self._bounds = [BoundedLabel(most_values) for _ in metric.labels]

    def count(self, model_name: str, replica_id: str, values: tuple[str, ...], by: int) -> None:
        if by == 0:
            return
        bounded = [
            self._bound(i, label, value)
            for i, (label, value) in enumerate(zip(self._metric.labels, values, strict=True))
        ]
        tags = dict(zip(self._metric.label_names, (model_name, *bounded), strict=True))
        self._prometheus.labels(**tags).inc(by)
        self._ray.inc(by, tags={**tags, "ReplicaId": replica_id})

    def _bound(self, index: int, label: Label, value: str) -> str:
        if not label.values:
            return self._bounds[index](value)
        if value not in label.values:
            raise ValueError(f"{self._metric.name}: {label.name} has no value {value!r}")
        return value
