"""A worker's block tables, behind one small interface for both model runners.

A remap edits one entry of one request's row. The edit happens before the runner prepares the step's
inputs, so the attention kernels and CUDA graphs see an ordinary table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from memshare.core.interfaces import CacheGroup, WorkerTables

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1ModelRunner


class V1Tables:
    """Model runner V1 (vllm/v1/worker/gpu_model_runner.py).

    The table lives twice: per request (``requests[r].block_ids``), from which a row is rebuilt when
    a request re-enters the batch, and as the batch's row itself, copied to the device every step.
    """

    def __init__(self, runner: V1ModelRunner, group: int) -> None:
        self._runner = runner
        self._group = group

    def repoint(self, request_id: str, index: int, block_id: int) -> bool:
        """See :meth:`WorkerTables.repoint`."""
        request = self._runner.requests.get(request_id)
        if request is None:
            return False
        self._wait_for_previous_step()
        request.block_ids[self._group][index] = block_id
        row = self._runner.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            self._runner.input_batch.block_table[self._group].block_table.np[row, index] = block_id
        return True

    def block_ids(self, request_id: str, count: int) -> list[int] | None:
        """See :meth:`WorkerTables.block_ids`. The batch's row wins: it is what attention reads."""
        request = self._runner.requests.get(request_id)
        if request is None:
            return None
        row = self._runner.input_batch.req_id_to_index.get(request_id)
        if row is None:
            return list(request.block_ids[self._group][:count])
        table = self._runner.input_batch.block_table[self._group]
        in_row = int(table.num_blocks_per_row[row])
        return [int(block) for block in table.block_table.np[row, : min(count, in_row)]]

    def _wait_for_previous_step(self) -> None:
        # Async scheduling: the previous step may still be copying the pinned rows to the device
        # (gpu_model_runner.py, synchronize_input_prep waits for the same event).
        event = self._runner.prepare_inputs_event
        if event is not None:
            event.synchronize()


class V2Tables:
    """Model runner V2 (vllm/v1/worker/gpu/model_runner.py), the default on GPUs.

    Rows live on the device; writes are staged and applied by the runner before its forward pass.
    Tested with vLLM's own tables and kernels, which Triton's interpreter runs on a CPU, and a
    stand-in for the runner; not tested on a GPU.
    """

    def __init__(self, runner: V2ModelRunner, group: int) -> None:
        self._runner = runner
        self._group = group

    def repoint(self, request_id: str, index: int, block_id: int) -> bool:
        """See :meth:`WorkerTables.repoint`."""
        row = self._runner.req_states.req_id_to_index.get(request_id)
        if row is None:
            return False
        self._runner.block_tables.block_tables[self._group].stage_write(row, index, [block_id])
        return True

    def block_ids(self, request_id: str, count: int) -> list[int] | None:
        """See :meth:`WorkerTables.block_ids`. Synchronises with the device; for checks only."""
        row = self._runner.req_states.req_id_to_index.get(request_id)
        if row is None:
            return None
        in_row = int(self._runner.block_tables.num_blocks.np[self._group, row])
        blocks = self._runner.block_tables.block_tables[self._group].gpu[row, : min(count, in_row)]
        return [int(block) for block in blocks.tolist()]


def tables_of(runner: V1ModelRunner | V2ModelRunner, group: CacheGroup) -> WorkerTables:
    """See :meth:`Adapter.worker_tables`."""
    if hasattr(runner, "block_tables"):
        return V2Tables(cast("V2ModelRunner", runner), group.index)
    return V1Tables(runner, group.index)
