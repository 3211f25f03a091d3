"""What an engine step reports, for whoever listens: the live page, tracing."""

from __future__ import annotations

from dataclasses import dataclass

from memshare.telemetry.stats import Payload


@dataclass(frozen=True)
class StepSample:
    """What an engine step reports, as the front end of vLLM gets it."""

    usage: float
    running: int
    waiting: int
    tokens: int
    preempted: int
    payload: Payload | None
