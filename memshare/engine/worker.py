"""The worker class to give vLLM: ``--worker-cls memshare.engine.worker.MemShareWorker``.

A connector alone cannot reach the model runner's block table; a worker class can. It adds one call
before each step and is otherwise vLLM's own worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from memshare.engine.adapter import vllm_adapter
from memshare.engine.agents import load_family
from memshare.engine.beside.children import exchanges_handshakes, own_connector, own_message
from memshare.engine.compatibility import (
    check_before_load,
    check_layers,
    config_of,
    edits_view,
)
from memshare.engine.experts import ExpertWatch, watch_experts
from memshare.engine.worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker
else:
    BaseWorker = vllm_adapter().base_worker()


class MemShareWorker(BaseWorker):
    """vLLM's worker, with MemShare's table edits before each step."""

    _memshare: WorkerSide | None = None
    _family: str | None = None
    _experts: ExpertWatch | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check configuration and set-up first: nothing is loaded for a set-up that can't work."""
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        check_before_load(vllm_config)
        super().__init__(*args, **kwargs)

    def load_model(self, **options: Any) -> None:
        """Load the model; let its attention read tables through a view if a mechanism needs it,
        choose pages, cache what adapters share, and count experts, if it is to."""
        super().load_model(**options)
        config = config_of(self.vllm_config)
        if config.mode != "off":
            check_layers(self.vllm_config, config)
        if edits_view(config):
            vllm_adapter().install_view(self.vllm_config)
        if config.selection.on:
            vllm_adapter().install_selection(self.vllm_config)
        family = load_family(self.vllm_config, config.agents)
        if family is not None:
            vllm_adapter().install_family(self.vllm_config, self.model_runner, family)
            self._family = family.key
        self._experts = watch_experts(self.vllm_config, self.model_runner, config.experts)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Create the KV cache, then attach MemShare to the model runner."""
        super().initialize_from_config(kv_cache_config)
        if has_kv_transfer_group():
            group = get_kv_transfer_group()
            connector = own_connector(group)
            if connector is not None:
                connector.reports_late = exchanges_handshakes(group)
                connector.worker_family = self._family
                connector.expert_watch = self._experts
                if connector.worker_side is not None:
                    self._memshare = connector.worker_side
                    self._memshare.attach(self.model_runner)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Let mechanisms edit the block tables, then run the step."""
        if self._experts is not None:
            requests = len(scheduler_output.num_scheduled_tokens)
            self._experts.before_step(scheduler_output.total_num_scheduled_tokens, requests)
        if self._memshare is not None:
            message = own_message(scheduler_output.kv_connector_metadata)
            if message is not None:
                self._memshare.before_step(message)
        return cast("ModelRunnerOutput | None", super().execute_model(scheduler_output))

    def execute_dummy_batch(self) -> None:
        """Keep up with other ranks while there is nothing to run."""
        if self._memshare is not None:
            self._memshare.forget_step()
        super().execute_dummy_batch()

    def check_memshare_integrity(self) -> str:
        """Ask for an integrity check at the next engine step; call by ``collective_rpc``."""
        if self._memshare is None:
            return "MemShare is off"
        self._memshare.want_check()
        return "requested; the result is logged and counted with the next engine step"
