"""The guard of a replica's engine, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.guard.answers import Answer, AnswerWatch
from cluster.guard.config import GuardConfig
from cluster.guard.guard import Guard, GuardMetrics
from cluster.guard.shadows import ShadowScorer
from cluster.routing.load import LoadMeter
from cluster.tenancy.gate import Gate

if TYPE_CHECKING:
    from cluster.engine.client import GatedAsyncLLM


def start_guard(
    config: GuardConfig,
    engine: GatedAsyncLLM,
    gate: Gate,
    meter: LoadMeter,
    metrics: GuardMetrics,
    always: bool,
) -> Guard[Answer]:
    """Let a guard watch the answers of an engine; to be called on the event loop.

    Args:
        config: the guard's.
        engine: through which all requests come.
        gate: knows the tenants' salts.
        meter: knows the engine's load.
        metrics: are told what happens.
        always: whether requests are approximated without a block being given up, as pages that
            attention does not read are.
    """

    def is_quiet(most: float) -> bool:
        load = meter.read()
        return load is None or (load.waiting == 0 and load.used <= most)

    guard = Guard(config, ShadowScorer(engine, gate), is_quiet, metrics)
    engine.answers = AnswerWatch(guard, always)
    guard.start()
    return guard
