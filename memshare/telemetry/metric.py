"""What a metric is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Home = Literal["engine", "replica"]

# Labels that every series of a home carries before the metric's own.
COMMON_LABELS: Mapping[Home, tuple[str, ...]] = {
    "engine": ("model_name", "engine", "policy"),
    "replica": ("model_name",),
}
_PREFIX: Mapping[Home, str] = {"engine": "vllm:memshare_", "replica": "memshare_"}
_SUFFIX: Mapping[Kind, str] = {"counter": "_total", "gauge": "", "histogram": ""}


@dataclass(frozen=True, slots=True)
class Label:
    """A label of one metric.

    Attributes:
        name: of the label.
        values: its values, each with its meaning; empty if they are not known beforehand.
    """

    name: str
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as it is counted by, without prefix and suffix.
        kind: Prometheus' type.
        unit: what 1 means, in the plural.
        meaning: what is counted or shown, as one phrase.
        labels: beyond ``COMMON_LABELS``.
        buckets: upper bounds, ascending; histograms only.
        home: ``engine``: counted in the engine's process, the way of vLLM's own metrics.
            ``replica``: counted in the Ray Serve replica; not there with plain vLLM.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    home: Home = "engine"

    @property
    def family(self) -> str:
        """The name that exporters are given; they add a suffix to it."""
        return _PREFIX[self.home] + self.name

    @property
    def prometheus(self) -> str:
        """The name on ``/metrics`` of the HTTP port."""
        return self.family + _SUFFIX[self.kind]

    @property
    def ray(self) -> str:
        """The name on the metrics port of a Ray node."""
        return "ray_" + self.prometheus.replace(":", "_")

    @property
    def label_names(self) -> tuple[str, ...]:
        """All labels; the node's port adds ``ReplicaId``."""
        return (*COMMON_LABELS[self.home], *(label.name for label in self.labels))
