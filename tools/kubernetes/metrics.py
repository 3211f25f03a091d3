"""The metrics that exist, in both spellings. What is not here can't be put on a dashboard.

Ours come from :mod:`memshare.telemetry.metrics`, vLLM's from the source of the installed vLLM,
Ray's from the dashboards that the installed Ray brings. Of kube-state-metrics, which comes with the
usual set-ups of the Prometheus operator, one is in use.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from memshare.telemetry.metrics import METRICS

Spelling = Literal["vllm", "ray"]
Kind = Literal["counter", "gauge", "histogram"]

# kube-state-metrics' own documentation of pods: names, and their labels.
KUBERNETES = {"kube_pod_status_ready": frozenset({"namespace", "pod", "uid", "condition"})}

_CLASSES: Mapping[str, Kind] = {
    "_counter_cls": "counter", "_gauge_cls": "gauge", "_histogram_cls": "histogram",
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A metric as queries name it, by spelling; a spelling is missing where nobody exports it."""

    names: Mapping[Spelling, str]
    kind: Kind

    def __getitem__(self, spelling: Spelling) -> str:
        """The name of a counter or gauge.

        Raises:
            ValueError: it is a histogram, which has no such series.
        """
        if self.kind == "histogram":
            raise ValueError(f"{self.names} is a histogram: use buckets()")
        return self.names[spelling]

    def buckets(self, spelling: Spelling) -> str:
        """The name of a histogram's buckets.

        Raises:
            ValueError: it is none.
        """
        if self.kind != "histogram":
            raise ValueError(f"{self.names} is no histogram")
        return f"{self.names[spelling]}_bucket"


def ours(name: str) -> Series:
    """A metric of :mod:`memshare.telemetry.metrics`.

    Raises:
        KeyError: there is none of that name.
    """
    metric = {metric.name: metric for metric in METRICS}[name]
    return Series({"vllm": metric.prometheus, "ray": metric.ray}, metric.kind)


def vllm(name: str) -> Series:
    """A metric of vLLM's own, without its prefix.

    Raises:
        KeyError: the installed vLLM has none of that name.
    """
    kind = _vllm_metrics()[name]
    suffix = "_total" if kind == "counter" else ""
    return Series({"vllm": f"vllm:{name}{suffix}", "ray": f"ray_vllm_{name}{suffix}"}, kind)


def ray(name: str) -> Series:
    """A metric of Ray's, as it is exported.

    Raises:
        KeyError: the installed Ray's dashboards know none of that name.
    """
    histogram = f"{name}_bucket" in ray_names()
    if name not in ray_names() and not histogram:
        raise KeyError(f"Ray's dashboards know no {name!r}")
    kind: Kind = "gauge"
    if histogram:
        kind = "histogram"
    elif name.endswith("_total"):
        kind = "counter"
    return Series({"ray": name}, kind)


def kubernetes(name: str) -> Series:
    """A gauge of kube-state-metrics, which is there where Ray's nodes are pods.

    Raises:
        KeyError: none of that name is known here.
    """
    if name not in KUBERNETES:
        raise KeyError(f"{name!r} is no metric of kube-state-metrics that is known here")
    return Series({"ray": name}, "gauge")


def exported(spelling: Spelling) -> set[str]:
    """Names of all series with one spelling."""
    everything = [ours(metric.name) for metric in METRICS] + [
        vllm(name) for name in _vllm_metrics()
    ]
    names = {name for series in everything for name in _names(series, spelling)}
    return names | ray_names() | set(KUBERNETES) if spelling == "ray" else names


def labels_of(name: str) -> set[str] | None:
    """Labels of one of our own series, or of Kubernetes'; None for others."""
    if name in KUBERNETES:
        return set(KUBERNETES[name])
    for metric in METRICS:
        known = {metric.prometheus, metric.ray}
        if metric.kind == "histogram":
            known = {f"{base}{end}" for base in known for end in ("_bucket", "_sum", "_count")}
        if name in known:
            return {*metric.label_names, "le", "ReplicaId", "instance", "namespace", "pod"}
    return None


def _names(series: Series, spelling: Spelling) -> Iterator[str]:
    name = series.names[spelling]
    if series.kind == "histogram":
        yield from (f"{name}{end}" for end in ("_bucket", "_sum", "_count"))
    else:
        yield name


@cache
def _vllm_metrics() -> Mapping[str, Kind]:
    # Read, not imported: `import vllm` takes many seconds.
    source = _package("vllm") / "v1" / "metrics" / "loggers.py"
    found: dict[str, Kind] = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg == "name" and isinstance(value, ast.Constant):
                text = str(value.value)
                if text.startswith("vllm:") and node.func.attr in _CLASSES:
                    found[text.removeprefix("vllm:")] = _CLASSES[node.func.attr]
    return found


@cache
def ray_names() -> set[str]:
    """Names in the queries of Ray's own dashboards, without vLLM's."""
    folder = _package("ray") / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*_panels.py"))
    return {name for name in re.findall(r"\bray_\w+", text) if not name.startswith("ray_vllm_")}


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
