"""The connector's worker half: edits the block table, compares blocks, answers checks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from memshare.config import MemShareConfig
from memshare.engine.messages import SchedulerMessage, WorkerHandshake, WorkerMessage
from memshare.engine.vllm_0_32.worker_tables import WorkerTable, table_of
from memshare.kv.comparer import StageTwo

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class WorkerSide:
    """One rank's half. Built with the connector, completed by :meth:`attach`."""

    def __init__(self, config: MemShareConfig, vllm_config: VllmConfig) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._kv_caches: dict[str, Tensor] = {}
        self._table: WorkerTable | None = None
        self._stage_two: StageTwo | None = None
        self._message = SchedulerMessage()
        self._remap_misses = 0
        self._check_wanted = False

    def register(self, kv_caches: dict[str, Tensor]) -> None:
        """Remember the caches, ``[blocks, heads, slots, 2 * channels]`` by layer name."""
        self._kv_caches = kv_caches

    def attach(self, runner: object) -> None:
        """Take hold of the model runner, whose table is edited.

        Raises:
            StageTwoUnsupported: blocks of this model cannot be compared.
        """
        self._table = table_of(runner)  # type: ignore[arg-type]
        if self._config.uses_stages:
            layers = self._vllm_config.compilation_config.static_forward_context
            model = runner.get_model()  # type: ignore[attr-defined]
            self._stage_two = StageTwo(self._config.distance, model, layers, self._kv_caches)
        logger.info(
            "MemShare hooked %s; stage two compares %s",
            type(runner).__name__,
            ", ".join(self._stage_two.layer_names) if self._stage_two else "nothing",
        )

    def handshake(self) -> WorkerHandshake:
        """What this rank reports to the scheduler before the first step."""
        return WorkerHandshake(hooked=self._table is not None)

    def before_step(self, message: SchedulerMessage) -> None:
        """Apply the step's remaps. Must run before the runner reads its table."""
        self._message = message
        if self._table is None:
            return
        for remap in message.remaps:
            if not self._table.repoint(remap.request_id, remap.index, remap.block_id):
                self._remap_misses += 1

    def after_step(self) -> WorkerMessage | None:
        """Start this step's comparisons, and return what is ready; None if nothing is."""
        message, self._message = self._message, SchedulerMessage()
        results = {}
        if self._stage_two is not None:
            if message.batches:
                self._stage_two.launch(message.batches)
            results = self._stage_two.collect()
        faults = self._compare_tables(message.tables) if message.tables is not None else None
        if not results and faults is None and not self._check_wanted and not self._remap_misses:
            return None
        answer = WorkerMessage(results, faults, self._check_wanted, self._remap_misses)
        self._check_wanted, self._remap_misses = False, 0
        return answer

    def want_check(self) -> None:
        """Ask the scheduler, with the next answer, for an integrity check."""
        self._check_wanted = True

    def _compare_tables(self, expected: dict[str, list[int]]) -> list[str]:
        assert self._table is not None
        faults = []
        for request_id, blocks in expected.items():
            ours = self._table.block_ids(request_id, len(blocks))
            if ours is not None and ours != blocks:
                wrong = next(
                    (i for i, (a, b) in enumerate(zip(ours, blocks, strict=False)) if a != b),
                    len(ours),
                )
                faults.append(
                    f"request {request_id}: worker's table differs from the scheduler's at entry "
                    f"{wrong} ({ours[wrong : wrong + 1]} against {blocks[wrong : wrong + 1]})"
                )
        return faults
