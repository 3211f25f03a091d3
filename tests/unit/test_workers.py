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

from cluster.workers import Workers, shared_memory

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
    psutil.wait_procs([engine], timeout=5)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    workers.kill_engines()  # nothing left to kill, and no error


KINDS = ("vllm_dist", "psm")

# Maps two files of shared memory, as a worker of two ranks does.
MAPS = """
import mmap, os, sys
held = [mmap.mmap(os.open(name, os.O_RDWR), 4096) for name in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.read()
"""


def test_buffers_that_workers_share_lose_their_names(tmp_path: Path) -> None:
    names = [Path("/dev/shm") / f"{kind}_{tmp_path.name}-{os.getpid()}" for kind in KINDS]
    for name in names:
        name.write_bytes(bytes(4096))
    worker = subprocess.Popen(
        ["WORKER of a test", "-c", MAPS, "", *names],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        assert set(names) <= shared_memory(psutil.Process(worker.pid))
        workers = Workers("WORKER")
        workers.unlink_buffers()
        assert [name.exists() for name in names] == [False, True], "others keep theirs"
        assert worker.poll() is None
        workers.unlink_buffers()  # gone already, and no error
    finally:
        worker.communicate()
        for name in names:
            name.unlink(missing_ok=True)


def test_where_there_are_none_none_is_lost() -> None:
    workers = Workers("no process is called so")
    assert len(workers) == 0
    assert not workers.one_is_lost()
    workers.kill_engines()
