"""A spec for vLLM's offloading connector that runs where there is no GPU.

Its own spec copies by CUDA. Here blocks are copied by the CPU, at once or some steps late, as an
asynchronous copy may be. Everything else is vLLM's: connector, scheduler, host memory's manager.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


@dataclass(frozen=True)
class Job:
    """A copy between KV cache and host memory."""

    job_id: int
    due: int
    cache: GPULoadStoreSpec
    host: BlockIDsLoadStoreSpec
    stores: bool


class HostWorker(OffloadingWorker):
    """Copies blocks; loads at once, stores ``lag`` steps later.

    Attributes:
        stored: cache blocks of all stores, in order.
        loaded: and of all loads.
        memory: the host's, ``[chunks, bytes of a block]`` for each tensor of the cache.
    """

    def __init__(self, caches: CanonicalKVCaches, chunks: int, lag: int) -> None:
        self.stored: list[int] = []
        self.loaded: list[int] = []
        self._cache = [each.tensor for each in caches.tensors]
        self._references = caches.group_data_refs
        self.memory = [
            torch.zeros((chunks, each[0].numel() * each.element_size()), dtype=torch.int8)
            for each in self._cache
        ]
        self._lag, self._tick = lag, 0
        self._jobs: list[Job] = []
        self._done: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: BlockIDsLoadStoreSpec
    ) -> bool:
        self.stored += [int(block) for block in src_spec.block_ids]
        self._jobs.append(Job(job_id, self._tick + self._lag, src_spec, dst_spec, stores=True))
        return True

    def submit_load(
        self, job_id: int, src_spec: BlockIDsLoadStoreSpec, dst_spec: GPULoadStoreSpec
    ) -> bool:
        self.loaded += [int(block) for block in dst_spec.block_ids]
        self._jobs.append(Job(job_id, self._tick, dst_spec, src_spec, stores=False))
        return True

    def get_finished(self) -> list[TransferResult]:
        self._tick += 1
        self._run([job for job in self._jobs if job.due < self._tick])
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        self._run([job for job in self._jobs if job.job_id in job_ids])

    def _run(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._jobs.remove(job)
            self._copy(job)
            self._done.append(TransferResult(job.job_id, success=True))

    def _copy(self, job: Job) -> None:
        blocks = [int(block) for block in job.cache.block_ids]
        chunks = [int(chunk) for chunk in job.host.block_ids]
        groups = [
            references
            for references, size in zip(self._references, job.cache.group_sizes, strict=True)
            for _ in range(size)
        ]
        for block, chunk, references in zip(blocks, chunks, groups, strict=True):
            for reference in references:
                there = self.memory[reference.tensor_idx][chunk]
                here = self._cache[reference.tensor_idx][block].reshape(-1).view(torch.int8)
                if job.stores:
                    there.copy_(here)
                else:
                    here.copy_(there)


class HostSpec(CPUOffloadingSpec):
    """vLLM's spec of host memory, with a worker for CPUs."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> HostWorker:
        lag = int(self.extra_config.get("lag", 0))
        return HostWorker(kv_caches, self.num_chunks, lag)


def host_memory(
    prompts_only: bool = True, lag: int = 0, memory_bytes: int = 64 << 20
) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` of an offloading connector with this spec."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "HostSpec", "spec_module_path": __name__,
            "cpu_bytes_to_use": memory_bytes, "offload_prompt_only": prompts_only, "lag": lag,
        },
    }  # fmt: skip
