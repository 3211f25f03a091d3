"""Grafana dashboards, one for each spelling of the metrics.

A query is written once, with a place for each series; the series are looked up in
:mod:`tools.kubernetes.metrics`, so that a dashboard can't name one that does not exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tools.kubernetes.metrics import Series, Spelling, ours, ray, vllm

Json = dict[str, Any]

WIDTH, HEIGHT = 8, 8  # of a panel, in Grafana's grid of 24 columns
TITLES: Mapping[Spelling, str] = {
    "ray": "MemShare (Ray nodes)", "vllm": "MemShare (plain vLLM)"
}  # fmt: skip
# What tells engines apart, beside the model's name.
ENGINE: Mapping[Spelling, str] = {"ray": "ReplicaId", "vllm": "instance"}
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Query:
    """One line of a panel.

    In ``text``, ``{0}`` and so on stand for the names of ``series``, ``{engine}`` for the label
    that tells engines apart and ``{only}`` for the matchers that follow Grafana's selection.
    """

    text: str
    series: tuple[Series, ...]
    legend: str = "{{{{{engine}}}}}"

    def spelled(self, spelling: Spelling) -> str:
        """The PromQL."""
        names = [s.buckets(spelling) if s.kind == "histogram" else s[spelling] for s in self.series]
        return self.text.format(*names, engine=ENGINE[spelling], only='model_name=~"$model"')

    def exists(self, spelling: Spelling) -> bool:
        """Whether all its series are exported with this spelling."""
        return all(spelling in series.names for series in self.series)


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    meaning: str
    unit: str
    queries: tuple[Query, ...]


def _by_engine(series: Series) -> Query:
    return Query("sum by ({engine}) ({0}{{{only}}})", (series,))


def _rate(series: Series, legend: str = "{{{{{engine}}}}}") -> Query:
    return Query("sum by ({engine}) (rate({0}{{{only}}}[$__rate_interval]))", (series,), legend)


def _total_rate(series: Series, legend: str) -> Query:
    return Query("sum (rate({0}{{{only}}}[$__rate_interval]))", (series,), legend)


def _quantile(share: float, series: Series, legend: str) -> Query:
    buckets = "sum by (le) (rate({0}{{{only}}}[$__rate_interval]))"
    return Query(f"histogram_quantile({share}, {buckets})", (series,), legend)


def _split(series: Series, label: str) -> Query:
    text = f"sum by ({label}) (rate({{0}}{{{{{{only}}}}}}[$__rate_interval]))"
    return Query(text, (series,), f"{{{{{{{{{label}}}}}}}}}")


def _at_proxies(series: Series, legend: str) -> Query:
    return Query("sum (rate({0}[$__rate_interval]))", (series,), legend)


AGENTS = "Agents that share a cache"
"""The row whose series only servers with such agents export."""

GUARD = "Quality guard"
"""The row whose series only servers with ``guard`` export."""


def _estimate(which: str) -> Query:
    text = f'max by ({{engine}}) ({{0}}{{{{estimate="{which}", {{only}}}}}})'
    return Query(text, (ours("guard_disagreement"),), which)


ROWS: Mapping[str, tuple[Panel, ...]] = {
    "Is there anything to gain": (
        Panel(
            "KV cache in use",
            "Near 100 % vLLM has to preempt. Far below, MemShare has nothing to do.",
            "percentunit",
            (_by_engine(vllm("kv_cache_usage_perc")),),
        ),
        Panel(
            "Preemptions",
            "Requests that lost all their blocks, and preemptions that a remap made unnecessary.",
            "ops",
            (
                _total_rate(vllm("num_preemptions"), "happened"),
                _total_rate(ours("preemptions_avoided"), "avoided"),
            ),
        ),
        Panel(
            "Requests",
            "Running, and waiting for memory.",
            "short",
            (
                Query("sum ({0}{{{only}}})", (vllm("num_requests_running"),), "running"),
                Query("sum ({0}{{{only}}})", (vllm("num_requests_waiting"),), "waiting"),
            ),
        ),
    ),
    "What MemShare does": (
        Panel(
            "Blocks reclaimed",
            "KV blocks that remaps returned to the free pool.",
            "ops",
            (_rate(ours("blocks_reclaimed")),),
        ),
        Panel(
            "A pair's way",
            "What is lost between two lines was rejected or dropped.",
            "ops",
            (
                _total_rate(ours("candidates"), "candidates"),
                _total_rate(ours("compared"), "compared"),
                _total_rate(ours("verified"), "verified"),
                _total_rate(ours("applied"), "applied"),
            ),
        ),
        Panel(
            "Dropped pairs",
            "By reason; `finished`: the request ended before its pair was needed.",
            "ops",
            (_split(ours("dropped"), "reason"),),
        ),
        Panel(
            "Re-pointed entries",
            "How approximate the engines are now.",
            "short",
            (_by_engine(ours("shared_entries")),),
        ),
        Panel("Free blocks", "KV blocks.", "short", (_by_engine(ours("free_blocks")),)),
        Panel(
            "Reclaim queue",
            "Verified pairs that wait for memory to be short (policy `paper`), and candidates that "
            "wait for stage two.",
            "short",
            (
                Query("sum ({0}{{{only}}})", (ours("queue_length"),), "reclaim queue"),
                Query("sum ({0}{{{only}}})", (ours("pairs_waiting"),), "waiting for stage two"),
            ),
        ),
        Panel(
            "Distance of compared pairs",
            "1 - similarity.",
            "short",
            (
                _quantile(0.1, ours("distance"), "p10"),
                _quantile(0.5, ours("distance"), "p50"),
                _quantile(0.9, ours("distance"), "p90"),
            ),
        ),
        Panel(
            "Requests left exact",
            "By reason.",
            "ops",
            (_split(ours("opted_out"), "reason"),),
        ),
    ),
    AGENTS: (
        Panel(
            "Tokens found, not computed",
            "By adapter. Near 0 for one: its roles wait too long, or its conversations do not stay "
            "on one replica.",
            "ops",
            (_split(ours("agent_tokens_found"), "adapter"),),
        ),
        Panel(
            "Of these, written by other adapters",
            "What sharing saves, by the adapter that reads.",
            "ops",
            (_split(ours("agent_tokens_shared"), "adapter"),),
        ),
        Panel(
            "Low-rank columns",
            "What they take of the KV cache, with their padding.",
            "bytes",
            (_by_engine(ours("low_rank_bytes")),),
        ),
    ),
    GUARD: (
        Panel(
            "Tokens the exact model rejects",
            "Of answers that MemShare approximated: the mean of the last shadows, and a 95 % "
            "interval.",
            "percentunit",
            (
                _estimate("mean"),
                _estimate("low"),
                _estimate("high"),
            ),
        ),
        Panel(
            "Shadows",
            "Chosen requests, by what became of them.",
            "ops",
            (_split(ours("guard_shadows"), "outcome"),),
        ),
        Panel(
            "Alarms, and exact requests because of them",
            "After an alarm new requests run exact.",
            "ops",
            (
                _total_rate(ours("guard_alarms"), "alarms"),
                _total_rate(ours("guard_exact_requests"), "exact requests"),
            ),
        ),
    ),
    "Evaluators and integrity": (
        Panel(
            "Evaluator lag",
            "From a finished step to its candidates.",
            "s",
            (
                _quantile(0.5, ours("evaluator_lag_seconds"), "p50"),
                _quantile(0.95, ours("evaluator_lag_seconds"), "p95"),
            ),
        ),
        Panel(
            "Faults of evaluators, steps they never saw",
            "They cost pairs, never a request.",
            "ops",
            (
                _split(ours("evaluator_faults"), "reason"),
                _total_rate(ours("steps_dropped"), "steps dropped"),
            ),
        ),
        Panel(
            "Integrity checks",
            "`failed` and a stopped engine are faults of ours: please report them.",
            "ops",
            (
                _split(ours("integrity_checks"), "result"),
                Query("sum ({0}{{{only}}})", (ours("sharing_stopped"),), "engines that stopped"),
            ),
        ),
    ),
    "Serving": (
        Panel(
            "Time to first token",
            "vLLM's.",
            "s",
            (
                _quantile(0.5, vllm("time_to_first_token_seconds"), "p50"),
                _quantile(0.95, vllm("time_to_first_token_seconds"), "p95"),
            ),
        ),
        Panel(
            "Time between tokens",
            "vLLM's.",
            "s",
            (
                _quantile(0.5, vllm("inter_token_latency_seconds"), "p50"),
                _quantile(0.95, vllm("inter_token_latency_seconds"), "p95"),
            ),
        ),
        Panel(
            "Tokens",
            "Prompt tokens computed and tokens generated.",
            "ops",
            (
                _total_rate(vllm("prompt_tokens"), "prompt"),
                _total_rate(vllm("generation_tokens"), "output"),
            ),
        ),
        Panel(
            "Requests by tenant",
            "Ray Serve only.",
            "ops",
            (_split(ours("tenant_requests"), "tenant"),),
        ),
        Panel(
            "Requests at Ray Serve's proxies",
            "HTTP and gRPC.",
            "ops",
            (
                _at_proxies(ray("ray_serve_num_http_requests_total"), "HTTP"),
                _at_proxies(ray("ray_serve_num_grpc_requests_total"), "gRPC"),
            ),
        ),
    ),
}  # fmt: skip


def render(spelling: Spelling) -> str:
    """The dashboard as Grafana's JSON. Panels whose series are not exported are left out."""
    panels: list[Json] = []
    top = 0
    for title, row in ROWS.items():
        shown = [panel for panel in row if all(q.exists(spelling) for q in panel.queries)]
        if not shown:
            continue
        panels.append(_row(len(panels) + 1, title, top))
        top += 1
        for index, panel in enumerate(shown):
            x, y = index % 3 * WIDTH, top + index // 3 * HEIGHT
            panels.append(_panel(len(panels) + 1, panel, spelling, x, y))
        top += -(-len(shown) // 3) * HEIGHT
    dashboard = {
        "title": TITLES[spelling],
        "uid": f"memshare-{spelling}",
        "tags": ["memshare"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables(spelling)},
        "panels": panels,
    }
    return json.dumps(dashboard, indent=1) + "\n"


def _variables(spelling: Spelling) -> list[Json]:
    series = ours("free_blocks")[spelling]
    return [
        {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "model",
            "label": "Model",
            "type": "query",
            "datasource": _SOURCE,
            "query": f"label_values({series}, model_name)",
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "refresh": 2,
        },
    ]


def _row(number: int, title: str, top: int) -> Json:
    grid = {"x": 0, "y": top, "w": 24, "h": 1}
    return {"id": number, "type": "row", "title": title, "gridPos": grid, "panels": []}


def _panel(number: int, panel: Panel, spelling: Spelling, x: int, y: int) -> Json:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.meaning,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": query.spelled(spelling),
                "legendFormat": query.legend.format(engine=ENGINE[spelling]),
            }
            for index, query in enumerate(panel.queries)
        ],
    }
