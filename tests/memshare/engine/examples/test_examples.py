"""The programs in ``docs/examples`` that start an engine, run as a reader runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import DTYPE
from tools.bench.local_cluster import free_port
from tools.runtime_env import runtime_env

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).resolve().parents[4] / "docs" / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a program away from the sources; gives what it prints."""
    # Engines of these tests live in their own process. A reader's does not.
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")

    def run(name: str, *options: object) -> str:
        command = [sys.executable, EXAMPLES / name, "--dtype", DTYPE, *map(str, options)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=runtime_env(os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def test_offline(run: Callable[..., str]) -> None:
    shown = run("offline_vllm.py")
    assert len(re.findall(r": ['\"].*\w.*['\"] \.\.\.$", shown, re.MULTILINE)) == 9, shown
    assert re.search(r"vllm:num_preemptions = \d+", shown)
    reclaimed = re.search(r"vllm:memshare_blocks_reclaimed = (\d+)", shown)
    assert reclaimed is not None
    assert int(reclaimed[1]) > 0, "memory is for two thirds of them"


def test_plain_server(run: Callable[..., str]) -> None:
    shown = run("plain_server.py", "--port", free_port())
    assert re.search(r'"content": ".*\w', shown)
    usage = re.search(r"KV memory: (\{.*\})", shown)
    assert usage is not None
    assert "peak_kv_blocks" in usage[1]
