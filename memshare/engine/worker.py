"""The worker class to give vLLM: ``--worker-cls memshare.engine.worker.MemShareWorker``.

A connector alone cannot reach the model runner's block table; a worker class can. It adds one call
before each step and is otherwise vLLM's own worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from memshare.engine.adapter import vllm_adapter
from memshare.engine.compatibility import check_before_load
from memshare.engine.connector import MemShareConnector
from memshare.engine.messages import SchedulerMessage
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check configuration and set-up first: nothing is loaded for a set-up that can't work."""
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        check_before_load(vllm_config)
        super().__init__(*args, **kwargs)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Create the KV cache, then attach MemShare to the model runner."""
        super().initialize_from_config(kv_cache_config)
        if has_kv_transfer_group():
            connector = get_kv_transfer_group()
            if isinstance(connector, MemShareConnector) and connector.worker_side is not None:
                self._memshare = connector.worker_side
                self._memshare.attach(self.model_runner)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Let mechanisms edit the block tables, then run the step."""
        message = scheduler_output.kv_connector_metadata
        if self._memshare is not None and isinstance(message, SchedulerMessage):
            self._memshare.before_step(message)
        return cast("ModelRunnerOutput | None", super().execute_model(scheduler_output))

    def check_memshare_integrity(self) -> str:
        """Ask for an integrity check at the next engine step; call by ``collective_rpc``."""
        if self._memshare is None:
            return "MemShare is off"
        self._memshare.want_check()
        return "requested; the result is logged and counted with the next engine step"
