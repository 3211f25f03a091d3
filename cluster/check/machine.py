"""Whether this machine has what a set-up wants: processors, memory, limits."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.check.report import GIB, CheckFinding, gib
from cluster.config import ClusterArgs

SECTION = "machine"
# Besides weights and KV cache, measured with SmolLM2 on a CPU: a replica and its engine hold about
# 1.7 GiB of programs, Ray and Ray Serve 0.8 GiB (both rounded up).
REPLICA_BYTES = 2 * GIB
RAY_BYTES = 1 * GIB
SHM_BYTES = 1 * GIB
"""Ray keeps objects, and vLLM its messages between workers, in shared memory."""
OPEN_FILES = 4096
"""Each connection takes one in the proxy and one in the replica; Ray's own take hundreds."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is.

    Attributes:
        cpus: cores that this process may use.
        free_bytes: memory that programs can still have.
        shm_bytes: free bytes in /dev/shm.
        open_files: most files that a process may have open.
        gpus: memory of each GPU, bytes.
    """

    cpus: int
    free_bytes: int
    shm_bytes: int
    open_files: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Needs:
    """What one machine would have to bring for a whole application.

    Attributes:
        replicas: copies of the engine; of one that is spread over nodes, its parts.
        cpus: cores of one of them.
        gpus: GPUs of one of them.
        extra_cpus: cores of everything else.
    """

    replicas: int = 1
    cpus: float = 1.0
    gpus: int = 0
    extra_cpus: float = 0.0


def needs_of(cluster: ClusterArgs) -> Needs:
    """What a Ray Serve application reserves when it is at its largest."""
    ranks, replica = cluster.engine.tensor_parallel_size, cluster.replica
    evaluator = cluster.memshare.evaluator
    by_ray = cluster.engine.distributed_executor_backend == "ray"
    gpus = ranks if by_ray else round(replica.gpus)
    return Needs(
        replicas=cluster.most_replicas * replica.nodes,
        cpus=replica.cpus / replica.nodes,
        gpus=-(-gpus // replica.nodes),
        extra_cpus=evaluator.actors * evaluator.cpus_per_actor if cluster.uses_pool else 0.0,
    )


def look_at_this_machine() -> Machine:
    """Ask the system. Loads torch."""
    import psutil
    import torch

    count = torch.cuda.device_count()
    return Machine(
        cpus=len(os.sched_getaffinity(0)),
        free_bytes=psutil.virtual_memory().available,
        shm_bytes=shutil.disk_usage("/dev/shm").free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus=tuple(torch.cuda.get_device_properties(i).total_memory for i in range(count)),
    )


def check_machine(machine: Machine, needs: Needs) -> Iterator[CheckFinding]:
    """What one replica wants must be here; other replicas may find their place on other nodes."""
    yield from _amount(
        "GPU", "engine.tensor_parallel_size and replica.gpus", len(machine.gpus), needs.gpus,
        needs.replicas * needs.gpus,
    )  # fmt: skip
    yield from _amount(
        "CPU core", "replica.cpus", machine.cpus, needs.cpus,
        needs.replicas * needs.cpus + needs.extra_cpus,
    )  # fmt: skip
    if machine.shm_bytes < SHM_BYTES:
        yield CheckFinding(
            SECTION,
            "warn",
            f"{gib(machine.shm_bytes)} free in /dev/shm; Ray and vLLM want {gib(SHM_BYTES)}",
            "in a container, start it with more, such as --shm-size=8g",
        )
    if machine.open_files < OPEN_FILES:
        yield CheckFinding(
            SECTION,
            "warn",
            f"a process may have {machine.open_files} files open",
            f"run `ulimit -n {16 * OPEN_FILES}` first",
        )


def check_host_memory(
    machine: Machine, needs: Needs, fixed_bytes: int, kv_bytes: int, ranks: int, runs: bool
) -> Iterator[CheckFinding]:
    """Whether replicas on CPUs find memory enough.

    Args:
        machine: what there is.
        needs: what is wanted.
        fixed_bytes: weights and LoRA slots of one worker.
        kv_bytes: of one worker.
        ranks: workers of a replica.
        runs: whether a MemShare server runs here already, and has taken memory.
    """
    one = REPLICA_BYTES + ranks * (fixed_bytes + kv_bytes)
    wanted = RAY_BYTES + needs.replicas * one
    text = f"{gib(wanted)} of memory wanted by Ray and {needs.replicas} x {gib(one)} of replicas"
    if wanted <= machine.free_bytes:
        yield CheckFinding(SECTION, "ok", f"{text}; {gib(machine.free_bytes)} are free")
    elif runs:
        yield CheckFinding(
            SECTION,
            "warn",
            f"{text}, but {gib(machine.free_bytes)} are free beside the server that runs here",
            "nothing for that server; before you start another one, stop it",
        )
    else:
        here = RAY_BYTES + one <= machine.free_bytes
        yield CheckFinding(
            SECTION,
            "warn" if here else "fail",
            f"{text}, but {gib(machine.free_bytes)} are free",
            "lower 'replicas', make the KV cache smaller, or add nodes for the rest",
        )


def _amount(what: str, fields: str, here: int, one: float, total: float) -> Iterator[CheckFinding]:
    """Enough for one replica, and for all of them?"""
    if one == 0 and total == 0:
        return
    if here < one:
        yield CheckFinding(
            SECTION,
            "fail",
            f"a replica needs {one:g} {what}s, and this machine has {here}",
            f"run the check where replicas will run, or lower {fields}",
        )
    elif here < total:
        yield CheckFinding(
            SECTION,
            "warn",
            f"{total:g} {what}s are reserved, and this machine has {here}",
            "add nodes that bring the rest, or lower 'replicas': Ray waits for ever otherwise",
        )
    else:
        yield CheckFinding(SECTION, "ok", f"{here} {what}s, of which {total:g} reserved")
