"""Metrics of a Ray Serve replica: counted in front of the engine, and not there with plain vLLM."""

from __future__ import annotations

from memshare.telemetry.metric import Label, Metric, named

_TENANT = Label("tenant")

REPLICA = named(
    Metric(
        "tenant_requests",
        "counter",
        "requests",
        "requests by tenant; tenants beyond the first hundred count as `other`",
        (
            _TENANT,
            Label(
                "outcome",
                {
                    "served": "answered",
                    "refused": "refused: key, permission or limit",
                    "failed": "an error in the server",
                    "aborted": "the client left",
                },
            ),
        ),
        home="replica",
    ),
    Metric(
        "tenant_tokens",
        "counter",
        "tokens",
        "tokens by tenant, in prompts and in output",
        (_TENANT, Label("kind", {"prompt": "in prompts", "output": "generated"})),
        home="replica",
    ),
    Metric(
        "tenant_refusals",
        "counter",
        "requests",
        "refused requests by tenant (`-` if unknown) and reason",
        (
            _TENANT,
            Label(
                "reason",
                {
                    "no_key": "it has no key",
                    "unknown_key": "its key is not in the table",
                    "not_local": "there are no keys, and it came from another machine",
                    "not_operator": "it is for operators only",
                    "model": "its key is not for that model",
                    "memshare": "its key does not allow that MemShare option",
                    "requests": "the tenant already has as many requests as it may at one time",
                    "tokens": "the tenant has used its tokens",
                    "closed": "the server is shutting down",
                },
            ),
        ),
        home="replica",
    ),
    Metric(
        "key_table_reloads",
        "counter",
        "tables",
        "changed key tables",
        (Label("result", {"used": "in use now", "refused": "wrong or gone; the old one stays"}),),
        home="replica",
    ),
    Metric(
        "limit_ledger_faults",
        "counter",
        "calls",
        "calls for which the limits' ledger could not be reached, so the replica enforced limits "
        "alone",
        home="replica",
    ),
    Metric(
        "monitoring_faults",
        "counter",
        "faults",
        "faults of the [live page](page.md) and of tracing; serving continues",
        (
            Label(
                "part",
                {
                    "record": "a step of the engine could not be read",
                    "report": "the board did not accept a replica's samples; they are kept",
                    "trace": "a request's trace could not be created or delivered",
                    "answer": "the board did not answer a browser",
                },
            ),
        ),
        home="replica",
    ),
    Metric(
        "guard_shadows",
        "counter",
        "requests",
        "requests that the [quality guard](quality-guard.md) chose",
        (
            Label(
                "outcome",
                {
                    "scored": "their answer was scored by the exact model",
                    "untouched": "MemShare gave up nothing of them: they were exact",
                    "unscorable": "they did not end by themselves, or lack log-probabilities",
                    "dropped": "too many waited, or the server shut down or has stopped MemShare",
                    "failed": "their shadow failed",
                },
            ),
        ),
        home="replica",
    ),
    Metric(
        "guard_tokens",
        "counter",
        "tokens",
        "prompt tokens computed by shadows: the guard's cost",
        home="replica",
    ),
    Metric(
        "guard_disagreement",
        "gauge",
        "fraction",
        "part of an approximated answer's tokens that the exact model rejects, mean of the last "
        "shadows with an interval of 95 %",
        (
            Label(
                "estimate",
                {"mean": "the mean", "low": "its least value", "high": "its greatest value"},
            ),
        ),
        home="replica",
    ),
    Metric(
        "guard_alarms",
        "counter",
        "alarms",
        "times that disagreement was proved to exceed its bound",
        home="replica",
    ),
    Metric(
        "guard_stopped",
        "gauge",
        "0 or 1",
        "1 while new requests run exact because of an alarm",
        home="replica",
    ),
    Metric(
        "guard_exact_requests",
        "counter",
        "requests",
        "requests that run exact because of an alarm",
        home="replica",
    ),
    Metric(
        "guard_resumes",
        "counter",
        "times",
        "ends of such a stop",
        (Label("by", {"operator": "let it go on", "cool_down": "`guard.cool_down_s` was over"}),),
        home="replica",
    ),
)
"""What a Ray Serve replica counts and shows."""
