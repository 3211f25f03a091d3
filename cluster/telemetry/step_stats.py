"""What every engine step reports, for whoever listens: the live page, tracing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from cluster.telemetry.step_sample import StepSample
from memshare.telemetry.stats import Payload

logger = logging.getLogger(__name__)


class StepFeed:
    """Hands on what every engine step reports, to whoever listens."""

    def __init__(self, count_fault: Callable[[str], None]) -> None:
        """Have no listeners yet.

        Args:
            count_fault: called with ``record`` when a listener raises.
        """
        self.listeners: list[Callable[[StepSample], None]] = []
        self._count_fault = count_fault
        self._sound = True

    def logger(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        """One of vLLM's stat loggers."""
        return _StepLogger(self)

    def publish(self, step: StepSample) -> None:
        """Tell the listeners. Never raises: it runs in vLLM's output loop, which would end."""
        for listener in self.listeners:
            try:
                listener(step)
            except Exception:
                self._count_fault("record")
                if self._sound:
                    self._sound = False
                    logger.exception("a step could not be recorded; counted from now on")


class _StepLogger(StatLoggerBase):
    def __init__(self, feed: StepFeed) -> None:
        self._feed = feed

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None or not self._feed.listeners:
            return
        self._feed.publish(
            StepSample(
                usage=scheduler_stats.kv_cache_usage,
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                tokens=iteration_stats.num_generation_tokens if iteration_stats else 0,
                preempted=iteration_stats.num_preempted_reqs if iteration_stats else 0,
                payload=cast("Payload | None", scheduler_stats.kv_connector_stats),
            )
        )

    def log_engine_initialized(self) -> None:
        pass
