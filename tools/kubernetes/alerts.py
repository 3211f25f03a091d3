"""Alerts, as a PrometheusRule with one group for each spelling of the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from tools.kubernetes.dashboards import ENGINE
from tools.kubernetes.metrics import Series, Spelling, kubernetes, ours, vllm

# Where each alert has a section of its own, with what to do. A deployment puts the address of that
# page in its place (k8s/components/observability/runbooks.yaml).
RUNBOOKS = "docs/alerts.md"

# Pods of a KubeRay cluster by their names: RayService, five letters, group, kind.
HEADS = 'condition="true", pod=~"memshare-.*-head-.*"'
ENGINES = 'condition="true", pod=~"memshare-.*-engines-worker-.*"'


@dataclass(frozen=True)
class Alert:
    """One alert. It is there for those spellings that have all its series.

    In ``text``, ``{0}`` and so on stand for the names of ``series``, ``{engine}`` for the labels
    that tell engines apart. Ray exports a counter from its first count on: where one may be
    missing, ``unless`` is right and ``and ... == 0`` is not.
    """

    name: str
    text: str
    series: tuple[Series, ...]
    minutes: int
    severity: str
    summary: str

    def exists(self, spelling: Spelling) -> bool:
        """Whether all its series have that spelling."""
        return all(spelling in series.names for series in self.series)

    def spelled(self, spelling: Spelling) -> str:
        """The PromQL."""
        names = [s.buckets(spelling) if s.kind == "histogram" else s[spelling] for s in self.series]
        return self.text.format(*names, engine=f"model_name, {ENGINE[spelling]}")


ALERTS = (
    Alert(
        "MemSharePreemptionThrash",
        "sum by ({engine}) (rate({0}[10m])) > 0.05"
        " unless sum by ({engine}) (rate({0}[10m])) <= 0.2 * sum by ({engine}) (rate({1}[10m]))",
        (vllm("num_preemptions"), vllm("request_success")),
        10,
        "warning",
        "An engine preempts more than one request for every five that it finishes.",
    ),
    Alert(
        "MemShareReclaimQueueEmptyUnderPressure",
        'max by ({engine}) ({0}{{policy="paper"}}) == 0 and max by ({engine}) ({1}) > 0.95',
        (ours("queue_length"), vllm("kv_cache_usage_perc")),
        10,
        "warning",
        "Memory is short, and no verified pair waits to be reclaimed.",
    ),
    Alert(
        "MemShareNothingReclaimedUnderPressure",
        "sum by ({engine}) (rate({0}[10m])) > 0.05 and max by ({engine}) ({2}) >= 0"
        " unless sum by ({engine}) (rate({1}[10m])) > 0",
        (vllm("num_preemptions"), ours("blocks_reclaimed"), ours("free_blocks")),
        10,
        "warning",
        "An engine preempts, and MemShare reclaims nothing.",
    ),
    Alert(
        "MemShareEvaluatorLag",
        "histogram_quantile(0.95, sum by (le, {engine}) (rate({0}[10m]))) > 1",
        (ours("evaluator_lag_seconds"),),
        10,
        "warning",
        "One step in twenty waits longer than a second for its candidates.",
    ),
    Alert(
        "MemShareEvaluatorFaults",
        "sum by ({engine}) (rate({0}[10m])) > 0.1",
        (ours("evaluator_faults"),),
        10,
        "warning",
        "Evaluators fail every few seconds.",
    ),
    Alert(
        "MemShareIntegrityFailure",
        'sum by ({engine}) (increase({0}{{result="failed"}}[15m])) > 0'
        " or max by ({engine}) ({1}) > 0",
        (ours("integrity_checks"), ours("sharing_stopped")),
        0,
        "critical",
        "MemShare's books and vLLM's differ. Remaps have stopped; the engine serves on.",
    ),
    Alert(
        "MemShareRemapMiss",
        "sum by ({engine}) (increase({0}[15m])) > 0",
        (ours("remap_misses"),),
        0,
        "critical",
        "A worker did not know the request of a remap.",
    ),
    Alert(
        "MemShareQualityGuardStopped",
        # Not increase(): it sees no first count.
        "max by ({engine}) ({0}) > 0 or sum by ({engine}) ({1})"
        " unless sum by ({engine}) ({1}) <= sum by ({engine}) ({1} offset 15m)",
        (ours("guard_stopped"), ours("guard_alarms")),
        0,
        "critical",
        "Answers differ from the exact model's by more than the bound. New requests run exact.",
    ),
    Alert(
        "MemShareQualityGuardBlind",
        "sum by ({engine}) (increase({0}{{outcome=~\"dropped|failed\"}}[1h])) > 5"
        " unless sum by ({engine}) (increase({0}{{outcome=\"scored\"}}[1h])) > 0",
        (ours("guard_shadows"),),
        15,
        "warning",
        "The quality guard chooses answers and scores none: nobody watches quality.",
    ),
    # Evaluators, and pods of an engine beside its first, are never ready: only a cluster in which
    # no engine's pod is counts.
    Alert(
        "MemShareNoEngineReady",
        f"max by (namespace) ({{0}}{{{{{HEADS}}}}}) >= 0"
        f" unless on (namespace) max by (namespace) ({{0}}{{{{{ENGINES}}}}}) > 0",
        (kubernetes("kube_pod_status_ready"),),
        15,
        "critical",
        "A cluster has a head and no engine that is ready: nothing is served.",
    ),
)  # fmt: skip

HEAD = """\
# Written by tools/make_k8s.py from tools/kubernetes/alerts.py. Change that, then run it again.
# What to do when one fires: docs/alerts.md.
"""


def manifest() -> dict[str, Any]:
    """The PrometheusRule."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "memshare"},
        "spec": {"groups": [_group("ray"), _group("vllm")]},
    }


def render() -> str:
    """The PrometheusRule as YAML."""
    return HEAD + yaml.safe_dump(manifest(), sort_keys=False, width=100)


def _group(spelling: Spelling) -> dict[str, Any]:
    rules = [_rule(alert, spelling) for alert in ALERTS if alert.exists(spelling)]
    return {"name": f"memshare-{spelling}", "rules": rules}


def _rule(alert: Alert, spelling: Spelling) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": alert.name, "expr": alert.spelled(spelling)}
    if alert.minutes:
        rule["for"] = f"{alert.minutes}m"
    rule["labels"] = {"severity": alert.severity}
    rule["annotations"] = {
        "summary": alert.summary,
        "runbook_url": f"{RUNBOOKS}#{alert.name.lower()}",
    }
    return rule
