"""An engine is ended with the first of its workers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.processes.workers import Workers, shared_memory

# An engine with two workers, which are told by the beginning of their command lines.
ENGINE = """
import os, subprocess, sys
for _ in range(2):
    subprocess.Popen(["WORKER of a test", "60"], executable="/bin/sleep")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def engine() -> Iterator[psutil.Process]:
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    yield family[0]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def test_a_lost_worker_is_noticed_and_ends_its_engine(engine: psutil.Process) -> None:
    workers = Workers("WORKER")
    assert len(workers) == 2
    assert not workers.one_is_lost()
    engine.children()[1].kill()
    end = time.monotonic() + 5
    while not workers.one_is_lost():  # a zombie, since its parent does not ask for its status
        assert time.monotonic() < end
    workers.kill_engines()
    psutil.wait_procs([engine], timeout=60)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    workers.kill_engines()  # nothing left to kill, and no error


NAMES = ("vllm_dist_1-tp:0-[0-1]-cpushm_0", "psm_1", "plasma1", "model.safetensors")

# Maps files of shared memory, and makes a semaphore, as a worker does.
MAPS = """
import mmap, os, sys
from multiprocessing import get_context, spawn
spawn.set_executable(sys.argv[1])  # it does not know it, with such a title
held = [mmap.mmap(os.open(name, os.O_RDWR), 4096) for name in sys.argv[2:]]
lock = get_context("spawn").Lock()
print("ready", lock._semlock.name, flush=True)
sys.stdin.read()
"""


def test_shared_memory_of_workers_is_found_but_not_that_of_others(tmp_path: Path) -> None:
    names = [Path("/dev/shm") / f"{name}-{tmp_path.name}-{os.getpid()}" for name in NAMES]
    for name in names:
        name.write_bytes(bytes(4096))
    worker = subprocess.Popen(
        ["WORKER of a test", "-c", MAPS, sys.executable, *names],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert worker.stdout is not None
        ready, lock = worker.stdout.readline().decode().split()
        semaphore = Path("/dev/shm") / f"sem.{lock.removeprefix('/')}"
        assert ready == "ready"
        assert {*names, semaphore} <= shared_memory(psutil.Process(worker.pid))
        found = Workers("WORKER").shared_memory()
        assert {p for p in found if p in names} == set(names[:2])
        assert semaphore in found
        names[0].unlink()
        assert names[0] not in shared_memory(psutil.Process(worker.pid)), "it has no name"
    finally:
        worker.communicate()
        for name in names:
            name.unlink(missing_ok=True)


def test_where_there_are_none_none_is_lost() -> None:
    workers = Workers("no process is called so")
    assert len(workers) == 0
    assert not workers.one_is_lost()
    workers.kill_engines()
