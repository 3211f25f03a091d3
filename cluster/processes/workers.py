"""A worker that dies takes its engine along at once.

vLLM's engine notices it by itself, and then waits for the other workers to leave, for up to
``VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS`` and some more. Meanwhile clients wait for answers that
nobody writes, and no other engine can start. There is nothing to be saved.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_TITLE = "VLLM::Worker"  # vllm/v1/executor/multiproc_executor.py
# Shared memory and semaphores of Python and of joblib, and the buffers of vLLM's
# cpu_communicator.py. Nothing else that is mapped there: some keep a model's weights in /dev/shm.
_SHARED = Path("/dev/shm")
_OURS = ("psm_", "sem.mp-", "sem.loky-", "vllm_dist_")


class Workers:
    """The worker processes below this process, as they are when this is made."""

    def __init__(self, title: str = _TITLE) -> None:
        """Find them by the beginning of their title.

        Workers that are Ray actors are none of this process's: Ray watches those.
        """
        children = psutil.Process().children(recursive=True)
        self._workers = [child for child in children if _titled(child, title)]
        self._engines = {parent for worker in self._workers if (parent := worker.parent())}

    def __len__(self) -> int:
        """How many there were."""
        return len(self._workers)

    def one_is_lost(self) -> bool:
        """Whether any has ended."""
        return not all(_lives(worker) for worker in self._workers)

    def shared_memory(self) -> set[Path]:
        """The files in ``/dev/shm`` that only they, their engines and this process use."""
        users = [*self._workers, *self._engines, psutil.Process()]
        used = set().union(*map(shared_memory, users))
        return {path for path in used if path.name.startswith(_OURS)}

    def kill_engines(self) -> None:
        """Kill the processes that have started them."""
        for engine in self._engines:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.kill()


def shared_memory(process: psutil.Process) -> set[Path]:
    """The files in ``/dev/shm`` that a process has mapped; none of one that has ended.

    By their inodes: whoever makes a semaphore has it mapped by another name than its file's, since
    the C library makes it under a name of its own first.
    """
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    inodes = {line.split(maxsplit=5)[4] for line in maps if "/dev/shm/" in line}
    return {path for path in _SHARED.iterdir() if _inode(path) in inodes} if inodes else set()


def _inode(path: Path) -> str:
    try:
        return str(path.stat().st_ino)
    except FileNotFoundError:
        return ""


def _titled(process: psutil.Process, title: str) -> bool:
    try:
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith(title)
    except psutil.Error:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
