"""The reaper against orphans, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Stands for a replica: guards itself, starts an "engine", tells its process id, and waits.
REPLICA = """
import subprocess, time
from multiprocessing.shared_memory import SharedMemory
from cluster.processes.orphan_reaper import OrphanReaper
reaper = OrphanReaper()
memory = SharedMemory(create=True, size=4096)
print(subprocess.Popen(["sleep", "3600"]).pid, memory.name, flush=True)
{then}
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("end", ["by itself", "SIGTERM", "SIGKILL"])
def test_the_engine_ends_with_the_replica(end: str) -> None:
    then = "" if end == "by itself" else "time.sleep(3600)"
    replica = subprocess.Popen(
        [sys.executable, "-c", REPLICA.format(then=then)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert replica.stdout is not None
    pid, segment = replica.stdout.readline().split()
    engine, segment_file = int(pid), Path("/dev/shm") / segment
    assert segment_file.exists()
    if end != "by itself":
        assert is_running(engine)
        os.kill(replica.pid, signal.Signals[end])
    replica.wait(timeout=120)
    deadline = time.monotonic() + 20
    while (is_running(engine) or segment_file.exists()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(engine)
    assert not segment_file.exists(), "shared memory outlives everybody"


# As Ray ends a worker, or the raylet one that was killed: by SIGKILL, its children and its process
# group with it, among them the resource tracker, whatever they still had to do.
KILL_ALL = """
import os, subprocess
from pathlib import Path
if {removes}:
    reaper.remove_at_the_end([Path("/dev/shm") / memory.name])
subprocess.run(["pkill", "-KILL", "-P", str(os.getpid())])
os.killpg(0, 9)
"""


@pytest.mark.parametrize("removes", [True, False])
def test_shared_memory_is_removed_though_ray_kills_who_would_do_it(removes: bool) -> None:
    replica = subprocess.run(
        [sys.executable, "-c", REPLICA.format(then=KILL_ALL.format(removes=removes))],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    segment_file = Path("/dev/shm") / replica.stdout.split()[1]
    try:
        deadline = time.monotonic() + (10 if removes else 1)
        while segment_file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert segment_file.exists() is not removes, "without it, the segment is left behind"
    finally:
        segment_file.unlink(missing_ok=True)
