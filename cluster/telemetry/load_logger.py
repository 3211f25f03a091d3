"""The way from vLLM's stats to a :class:`~cluster.routing.load.LoadMeter`."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from cluster.routing.load import LoadMeter


class LoadLogger(StatLoggerBase):
    """What vLLM calls after every engine step, in the replica's event loop."""

    def __init__(self, meter: LoadMeter, vllm_config: VllmConfig) -> None:
        """Read the engine's number of slots."""
        self._meter = meter
        self._slots = vllm_config.scheduler_config.max_num_seqs

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        *_: object,
        **__: object,
    ) -> None:
        """See :meth:`vllm.v1.metrics.loggers.StatLoggerBase.record`."""
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._meter.record(
                used=scheduler_stats.kv_cache_usage,
                running=scheduler_stats.num_running_reqs,
                waiting=waiting,
                slots=self._slots,
            )
        if iteration_stats is not None:
            self._meter.preempted(iteration_stats.num_preempted_reqs)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
