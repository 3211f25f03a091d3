"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def serving(
    command: Sequence[str], port: int, folder: Path, path: str = str(ROOT), **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start ``python -m COMMAND`` and wait until it is healthy; killed at the end if it still runs.

    Args:
        command: a module and its arguments.
        port: on which it listens.
        folder: to run in, and for its log.
        path: its ``PYTHONPATH``.
        environment: of the process, besides ours.
    """
    # As a user's shell: engines in tests run in the test's process.
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=inherited | {"PYTHONPATH": path} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while not _answers(url):
            assert process.poll() is None, log.read_text()[-9000:]
            assert time.monotonic() < end, log.read_text()[-9000:]
            time.sleep(0.5)
        yield url, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.TransportError:
        return False
