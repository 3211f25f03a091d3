"""The connector that vLLM loads: ``"kv_connector": "MemShareConnector"``. It only routes calls.

vLLM builds one in the scheduler's process and one on every worker (KVConnectorRole); each holds the
half that belongs there. The hooks are vLLM's own
(vllm/distributed/kv_transfer/kv_connector/v1/base.py).
"""

from __future__ import annotations

import logging
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from memshare.engine.adapter import vllm_adapter
from memshare.engine.agents import load_family
from memshare.engine.beside.children import is_ours
from memshare.engine.compatibility import (
    check_before_load,
    check_cache,
    check_workers,
    compile_steps,
    config_of,
    hybrid_note,
    policy_choice,
)
from memshare.engine.experts import ExpertStats, ExpertWatch
from memshare.engine.family_side import FamilySide
from memshare.engine.messages import SchedulerMessage, WorkerHandshake, WorkerMessage
from memshare.engine.prometheus import MemSharePromMetrics, MemShareStats
from memshare.engine.scheduler_side import SchedulerSide
from memshare.engine.speculation import unsettled_tokens
from memshare.engine.worker_side import WorkerSide
from memshare.search.bridge import EvaluatorBridge
from memshare.search.evaluate import open_source
from memshare.telemetry.logs import set_up_logging

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_NOTHING = SchedulerMessage()


class MemShareConnector(KVConnectorBase_V1, SupportsHMA):
    """MemShare's place in the engine. With mode ``off`` both halves are None and nothing is
    reclaimed.

    ``SupportsHMA`` says that it works beside vLLM's hybrid manager, which gives each kind of layer
    a block table of its own. Without it vLLM would treat all layers as full attention.

    Attributes:
        scheduler_side: the half in the scheduler's process.
        family_side: what is in its place where adapters share a cache.
        worker_side: the half in a worker.
        worker_family: key of the adapters that share the worker's cache; the worker class sets it.
        expert_stats: in the scheduler's process, where experts are counted.
        expert_watch: what counts them in a worker; the worker class sets it.
        reports_late: whether a worker's handshake comes with the first step, because vLLM hands on
            that of a connector beside this one; the worker class sets it.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_before_load(vllm_config)
        config = config_of(vllm_config)
        set_up_logging(config.logs)
        self.scheduler_side: SchedulerSide | None = None
        self.worker_side: WorkerSide | None = None
        self.worker_family: str | None = None
        self.family_side: FamilySide | None = None
        self.expert_stats: ExpertStats | None = None
        self.expert_watch: ExpertWatch | None = None
        self.reports_late = False
        self._adapter = vllm_adapter()
        self._world_size = vllm_config.parallel_config.world_size
        if role == KVConnectorRole.SCHEDULER:
            self.expert_stats = ExpertStats() if config.experts.counts else None
            family = load_family(vllm_config, config.agents)
            if family is not None:
                logger.info("MemShare agents: %s, family %s", config.agents, family.key)
                head_dim = vllm_config.model_config.get_head_size()
                self.family_side = FamilySide(family, kv_cache_config, head_dim)
        if config.mode == "off":
            return
        check_cache(kv_cache_config, vllm_config, config)
        if role == KVConnectorRole.WORKER:
            self.worker_side = WorkerSide(config, vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed off, so a preemption must not drop output that is in flight."""
        return False

    def shutdown(self) -> None:
        """Stop threads and close files."""
        if self.scheduler_side is not None:
            self.scheduler_side.close()

    # ---- scheduler ----

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Build the scheduler half around vLLM's block tables."""
        super().bind_kv_cache_manager(kv_cache_manager)
        config = config_of(self._vllm_config)
        if config.mode == "off":
            return
        logger.info("MemShare configuration: %s", config.model_dump_json())
        if reason := policy_choice(self._vllm_config).reason:
            logger.info("MemShare policy: %s (auto): %s", config.policy.name, reason)
        group = self._adapter.editable_group(self._kv_cache_config)
        if note := hybrid_note(self._kv_cache_config):
            logger.info("MemShare: %s", note)
        self.scheduler_side = SchedulerSide(
            config,
            self._adapter.block_tables(kv_cache_manager, group),
            world_size=self._world_size,
            unsettled_tokens=unsettled_tokens(self._vllm_config),
            compile_steps=lambda: compile_steps(self._vllm_config, config),
            open_bridge=lambda: EvaluatorBridge(
                lambda: open_source(config), config.evaluator.queue_size
            ),
        )
        self.scheduler_side.reclaimer.enabled = False  # until the workers have reported

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Start-up guard: every rank must have reported that its table can be edited, and that it
        has read the same adapters. vLLM's core makes its block hasher right after this call.

        Beside a connector with handshakes of its own, vLLM hands on those, and ours come later.
        """
        if not is_ours(metadata.values()):
            return
        self._check_workers(cast("list[WorkerHandshake]", list(metadata.values())))
        if self.family_side is not None:
            self.family_side.requests.hash_blocks()

    def _check_workers(self, handshakes: list[WorkerHandshake]) -> None:
        side, family = self.scheduler_side, self.family_side
        if side is None and family is None:
            return
        check_workers(
            handshakes,
            self._world_size,
            None if family is None else family.requests.family.key,
            None if side is None else side.config.policy.name,
        )
        if side is not None:
            side.workers_are_ready()

    def on_new_request(self, request: Request) -> None:
        """Begin to follow a request."""
        if self.scheduler_side is not None:
            self.scheduler_side.follow(request)
        elif self.family_side is not None:
            self.family_side.requests.follow(request)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Stop following a request; vLLM frees its blocks itself.

        What is returned here reaches the request's last output as ``kv_transfer_params``.
        """
        usage = None
        if self.scheduler_side is not None:
            usage = self.scheduler_side.finish(request)
        elif self.family_side is not None:
            usage = self.family_side.finish(request, len(block_ids))
        return False, cast("dict[str, Any] | None", usage)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, as vLLM asks a connector that works beside its hybrid manager. Groups differ in
        their blocks, not in what they are told of."""
        return self.request_finished(request, [block for group in block_ids for block in group])

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """vLLM is about to admit a request, if it fits. No KV comes from outside."""
        if self.scheduler_side is not None:
            self.scheduler_side.waits(request)
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """A waiting request has been admitted, or resumed."""
        if self.scheduler_side is not None:
            self.scheduler_side.admitted(request.request_id)

    def has_pending_block_frees(self) -> bool:
        """Asked before each preemption: whether reclaiming can free a block instead."""
        return self.scheduler_side is not None and self.scheduler_side.before_preemption()

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The message that goes to the workers with this step."""
        if self.family_side is not None:
            self.family_side.take(self._adapter.read_growth(scheduler_output))
        if self.scheduler_side is None:
            return _NOTHING
        return self.scheduler_side.build_message(self._adapter.read_schedule(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the workers' answers."""
        message = connector_output.kv_connector_worker_meta
        if not isinstance(message, WorkerMessage):
            return
        if message.handshakes:
            self._check_workers(message.handshakes)
        if self.scheduler_side is not None:
            self.scheduler_side.receive(message)
        if self.expert_stats is not None and message.experts is not None:
            self.expert_stats.take(message.experts)

    # ---- worker ----

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Remember the KV caches."""
        if self.worker_side is not None:
            self.worker_side.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the start-up guard looks at."""
        return None if self.reports_late else self._handshake()

    def _handshake(self) -> WorkerHandshake | None:
        if self.worker_side is not None:
            return self.worker_side.handshake()
        if self.worker_family is not None:
            return WorkerHandshake(hooked=True, family=self.worker_family)
        return None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Called behind the forward pass: compare blocks, return what is ready."""
        message = None if self.worker_side is None else self.worker_side.after_step()
        experts = None if self.expert_watch is None else self.expert_watch.after_step()
        late = self._handshake() if self.reports_late else None
        if experts is None and late is None:
            return message
        message = message or WorkerMessage()
        message.experts = experts
        if late is not None:
            message.handshakes.append(late)
            self.reports_late = False
        return message

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """No KV comes from outside."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No KV comes from outside."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """No KV goes outside."""

    def wait_for_save(self) -> None:
        """No KV goes outside."""

    # ---- metrics ----

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What has changed since the last step (scheduler side)."""
        side = self.scheduler_side or self.family_side
        stats: list[KVConnectorStats] = [
            MemShareStats(payload)
            for half in (side, self.expert_stats)
            if half is not None and (payload := half.take_stats()) is not None
        ]
        return reduce(lambda earlier, later: earlier.aggregate(later), stats) if stats else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        """Wrap a payload that has crossed to the front end."""
        return MemShareStats(cast("Any", data))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """Register the metrics on vLLM's ``/metrics``."""
        config = config_of(vllm_config)
        if config.mode == "off" and not config.agents.shares and not config.experts.counts:
            return None
        return MemSharePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def reset_cache(self) -> bool | None:
        """Nothing is cached here."""
        return True
