"""MemShare's numbers on vLLM's own metrics path (``/metrics``, and the periodic log line)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

from memshare.engine.compatibility import config_of
from memshare.telemetry.metric import Metric
from memshare.telemetry.metrics import BLOCKS, COUNTERS, GAUGES, HISTOGRAMS, LABELLED
from memshare.telemetry.stats import Payload, empty_payload, merge_payloads

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MemShareStats(KVConnectorStats):
    """A payload of :mod:`memshare.telemetry.stats` in vLLM's wrapper."""

    def __init__(self, data: Payload | None = None) -> None:
        super().__init__(cast("dict[str, Any]", empty_payload() if data is None else data))

    @property
    def payload(self) -> Payload:
        """The numbers."""
        return cast(Payload, self.data)

    def reset(self) -> None:
        """Forget everything."""
        self.data = cast("dict[str, Any]", empty_payload())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Fold ``other``, which is later, into this one."""
        merge_payloads(self.payload, cast(Payload, other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        """The interval's counters and latest gauges, for vLLM's log line."""
        lines: dict[str, int | float] = dict(self.payload["counters"])
        lines.update(self.payload["gauges"])
        return {f"memshare {name.replace('_', ' ')}": value for name, value in lines.items()}

    def is_empty(self) -> bool:
        """Whether nothing has happened."""
        return not any(self.data.values())


class MemSharePromMetrics(KVConnectorPromMetrics):
    """Registers the metrics and adds each payload to them, by engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        # vLLM passes its own classes when metrics go through Ray; they are built alike.
        counter = cast(type[Counter], metric_types[Counter])
        gauge = cast(type[Gauge], metric_types[Gauge])
        histogram = cast(type[Histogram], metric_types[Histogram])

        def labels(metric: Metric) -> list[str]:
            return [*labelnames, "policy", *(label.name for label in metric.labels)]

        self._counters = {
            name: counter(metric.family, metric.meaning, labels(metric))
            for name, metric in (*COUNTERS.items(), *LABELLED.items())
        }
        self._gauges = {
            name: gauge(
                metric.family, metric.meaning, labels(metric), multiprocess_mode="mostrecent"
            )
            for name, metric in (*GAUGES.items(), (BLOCKS.name, BLOCKS))
        }
        self._histograms = {
            name: histogram(metric.family, metric.meaning, labels(metric), buckets=metric.buckets)
            for name, metric in HISTOGRAMS.items()
        }
        config = config_of(vllm_config)
        policy = "off" if config.mode == "off" else config.policy.name  # adapters may share alone
        self._values = {
            engine: (*values, policy) for engine, values in per_engine_labelvalues.items()
        }
        # Series exist from the start, at zero: a rate() over a counter's birth would miss it.
        for values in self._values.values():
            for name in COUNTERS:
                self._counters[name].labels(*values)
            for name in GAUGES:
                self._gauges[name].labels(*values)
            for name in HISTOGRAMS:
                self._histograms[name].labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one payload."""
        payload = cast(Payload, transfer_stats_data)
        values = self._values[engine_idx]
        for name, count in payload["counters"].items():
            self._counters[name].labels(*values).inc(count)
        for name, by_label in payload["labelled"].items():
            for label, count in by_label.items():
                self._counters[name].labels(*values, label).inc(count)
        for name, value in payload["gauges"].items():
            self._gauges[name].labels(*values).set(value)
        for kind, blocks in payload["blocks"].items():
            self._gauges[BLOCKS.name].labels(*values, kind).set(blocks)
        for distance in payload["distances"]:
            self._histograms["distance"].labels(*values).observe(distance)
        for lag in payload["lags"]:
            self._histograms["evaluator_lag_seconds"].labels(*values).observe(lag)
        for seconds in payload["packings"]:
            self._histograms["packing_seconds"].labels(*values).observe(seconds)
