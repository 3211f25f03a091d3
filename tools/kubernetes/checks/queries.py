"""What Prometheus and Grafana are told to ask."""

from __future__ import annotations

import json

from tools.kubernetes import alerts, promql
from tools.kubernetes.build import Found, Manifests
from tools.kubernetes.layout import ROOT

# On a PrometheusRule: the address of the page that its alerts' `runbook_url` lead to.
RUNBOOKS = "memshare/runbooks"


def queries(manifests: Manifests) -> Found:
    """Dashboards and alerts ask for series that exist, and every alert says what to do."""
    for rule in manifests.of("PrometheusRule"):
        pages = (ROOT / alerts.RUNBOOKS).read_text(encoding="utf-8")
        for group in rule["spec"]["groups"]:
            for alert in group["rules"]:
                for fault in promql.faults(alert["expr"]):
                    yield alert["alert"], fault
                if f"\n## {alert['alert']}\n" not in pages:
                    yield alert["alert"], f"{alerts.RUNBOOKS} has no section for it"
                page, _, section = alert["annotations"].get("runbook_url", "").partition("#")
                if section != alert["alert"].lower():
                    yield alert["alert"], "its runbook_url doesn't lead to its section"
                if page != rule["metadata"].get("annotations", {}).get(RUNBOOKS):
                    yield alert["alert"], "its runbook_url is not on the page that is set"
    for config in manifests.of("ConfigMap"):
        if "grafana_dashboard" not in config["metadata"].get("labels", {}):
            continue
        for file, text in config["data"].items():
            for panel in json.loads(text)["panels"]:
                for target in panel.get("targets", []):
                    for fault in promql.faults(target["expr"]):
                        yield f"{file}: {panel['title']}", fault
