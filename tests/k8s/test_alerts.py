"""Alerts fire when they should and not otherwise, evaluated by Prometheus's own promtool.

promtool is not on PyPI: these tests run where it is on PATH (Debian: package ``prometheus``). That
queries are valid and ask for what exists is tested everywhere (``test_manifests.py``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.kubernetes import alerts, dashboards, promql
from tools.kubernetes.alerts import ALERTS
from tools.kubernetes.build import build
from tools.kubernetes.layout import K8S
from tools.kubernetes.metrics import Spelling, kubernetes, ours, ray, vllm

SPELLINGS: tuple[Spelling, ...] = ("ray", "vllm")

# Name of a series (without labels) to its values, minute by minute, in promtool's notation.
Story = dict[str, str]


def stories(spelling: Spelling) -> dict[str, tuple[Story, Story]]:
    """For each alert a story in which it fires, and one, close to it, in which it does not."""
    preemptions, successes = vllm("num_preemptions")[spelling], vllm("request_success")[spelling]
    usage, queue = vllm("kv_cache_usage_perc")[spelling], ours("queue_length")[spelling]
    reclaimed, free = ours("blocks_reclaimed")[spelling], ours("free_blocks")[spelling]
    lag, faults = ours("evaluator_lag_seconds"), ours("evaluator_faults")[spelling]
    checks, stopped = ours("integrity_checks")[spelling], ours("sharing_stopped")[spelling]
    misses = ours("remap_misses")[spelling]
    alarms, guard = ours("guard_alarms")[spelling], ours("guard_stopped")[spelling]
    failed, scored = (
        f'{ours("guard_shadows")[spelling]}{{outcome="{outcome}"}}'
        for outcome in ("failed", "scored")
    )
    paper, dead = f'{queue}{{policy="paper"}}', f'{faults}{{reason="dead"}}'
    low, high = (f'{lag.buckets(spelling)}{{le="{le}"}}' for le in ("0.5", "2.5"))
    top = f'{lag.buckets(spelling)}{{le="+Inf"}}'
    found = {
        "MemSharePreemptionThrash": (
            {preemptions: "0+30x40", successes: "0+60x40"},
            {preemptions: "0+6x40", successes: "0+60x40"},
        ),
        "MemShareReclaimQueueEmptyUnderPressure": (
            {paper: "0x40", usage: "0.99x40"},
            {paper: "3x40", usage: "0.99x40"},
        ),
        "MemShareNothingReclaimedUnderPressure": (
            # Ray exports no counter before its first count: there is no series of it.
            {preemptions: "0+30x40", free: "2x40"},
            {preemptions: "0+30x40", free: "2x40", reclaimed: "0+30x40"},
        ),
        "MemShareEvaluatorLag": (
            {low: "0+50x40", high: "0+60x40", top: "0+60x40"},
            {low: "0+60x40", high: "0+60x40", top: "0+60x40"},
        ),
        "MemShareEvaluatorFaults": ({dead: "0+12x40"}, {dead: "0+1x40"}),
        "MemShareIntegrityFailure": (
            {f'{checks}{{result="failed"}}': "0x20 1x20", stopped: "0x40"},
            {f'{checks}{{result="passed"}}': "0+1x40", stopped: "0x40"},
        ),
        "MemShareQualityGuardStopped": (
            {alarms: "_x20 1x20"},
            {alarms: "1x40", guard: "0x40"},
        ),
        "MemShareQualityGuardBlind": (
            {failed: "0+1x40"},
            {failed: "0+1x40", scored: "0+1x40"},
        ),
        "MemShareRemapMiss": ({misses: "0x20 1x20"}, {misses: "1x40"}),
    }
    if spelling == "ray":
        found["MemShareNoEngineReady"] = no_engine_ready(kubernetes("kube_pod_status_ready")["ray"])
    return found


def no_engine_ready(ready: str) -> tuple[Story, Story]:
    """An engine that isn't ready; one that is, beside pods that never are."""
    head, engine, second, evaluator = (
        f'{ready}{{condition="true",pod="memshare-x7k2p-{name}"}}'
        for name in (
            *("head-a", "engines-worker-a", "engines-worker-b"),
            "evaluators-worker-a",
        )
    )
    return (
        {head: "1x40", engine: "0x40", second: "0x40", evaluator: "0x40"},
        {head: "1x40", engine: "1x40", second: "0x40", evaluator: "0x40"},
    )


def labelled(series: str, labels: dict[str, str]) -> str:
    own = ",".join(f'{name}="{value}"' for name, value in labels.items())
    name, _, rest = series.partition("{")
    return f"{name}{{{own},{rest}" if rest else f"{name}{{{own}}}"


def case(spelling: Spelling, alert: alerts.Alert, story: Story, fires: bool) -> dict[str, Any]:
    of_pods = "{engine}" not in alert.text  # its series are Kubernetes', which knows no models
    engine = {"model_name": "m", dashboards.ENGINE[spelling]: "r"}
    if of_pods:
        engine = {"namespace": "memshare"}
    rule = next(
        rule
        for group in alerts.manifest()["spec"]["groups"]
        if group["name"].endswith(spelling)
        for rule in group["rules"]
        if rule["alert"] == alert.name
    )
    expected = {
        "exp_labels": {**engine, "severity": alert.severity},
        "exp_annotations": rule["annotations"],
    }
    return {
        "interval": "1m",
        "input_series": [
            {"series": labelled(series, engine), "values": values}
            for series, values in story.items()
        ],
        "alert_rule_test": [
            {
                "eval_time": "30m",
                "alertname": alert.name,
                "exp_alerts": [expected] if fires else [],
            }
        ],
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(alerts.manifest()["spec"]))
    cases = [
        case(spelling, alert, story, fires)
        for spelling in SPELLINGS
        for alert in ALERTS
        if alert.exists(spelling)
        for fires, story in zip((True, False), stories(spelling)[alert.name], strict=True)
    ]
    tests = tmp_path / "tests.yaml"
    tests.write_text(
        yaml.safe_dump(
            {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": cases},
            sort_keys=False,
        )
    )
    for command in (["check", "rules", str(rules)], ["test", "rules", str(tests)]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_both_stories() -> None:
    for spelling in SPELLINGS:
        assert set(stories(spelling)) == {a.name for a in ALERTS if a.exists(spelling)}
    assert {alert.name for alert in ALERTS} == set(stories("ray")), "Kubernetes has all of them"


def test_pods_that_are_never_ready_wake_nobody() -> None:
    """Evaluators and further pods of an engine: no alert asks whether all pods are ready."""
    (alert,) = (alert for alert in ALERTS if alert.name == "MemShareNoEngineReady")
    pods = [
        matcher.value
        for vector in promql.selectors(alert.spelled("ray"))
        for matcher in vector.matchers.matchers
        if matcher.name == "pod"
    ]
    never = "memshare-x7k2p-evaluators-worker-8d2kq"
    assert [re.fullmatch(pattern, never) for pattern in pods] == [None, None]
    for name, pattern in zip(("head", "engines-worker"), pods, strict=True):
        assert re.fullmatch(pattern, f"memshare-x7k2p-{name}-8d2kq")
    asked = [a.name for a in ALERTS for s in a.series if "kube_pod" in str(s.names)]
    assert asked == ["MemShareNoEngineReady"]


def test_a_deployment_says_where_its_runbooks_are(tmp_path: Path) -> None:
    """One line, and every alert leads to its section on that page."""
    copy = tmp_path / "observability"
    shutil.copytree(K8S / "components" / "observability", copy)
    place = copy / "runbooks.yaml"
    page = "https://docs.invalid/memshare/alerts.html"
    place.write_text(
        place.read_text().replace("memshare/runbooks: docs/alerts.md", f"memshare/runbooks: {page}")
    )
    (tmp_path / "kustomization.yaml").write_text("components: [observability]\n")
    (rule,) = (m for m in build(tmp_path) if m["kind"] == "PrometheusRule")
    urls = {
        a["alert"]: a["annotations"]["runbook_url"]
        for g in rule["spec"]["groups"]
        for a in g["rules"]
    }
    assert urls == {alert.name: f"{page}#{alert.name.lower()}" for alert in ALERTS}


def test_what_does_not_exist_cannot_be_asked_for() -> None:
    """An unknown name is an error where a panel or an alert is written."""
    for lookup, name in (
        (ours, "preemption"),
        (vllm, "num_preemption"),
        (ray, "ray_serve_nothing"),
    ):
        with pytest.raises(KeyError):
            lookup(name)
    with pytest.raises(ValueError, match="is a histogram"):
        ours("distance")["ray"]
    with pytest.raises(ValueError, match="is no histogram"):
        ours("applied").buckets("ray")
