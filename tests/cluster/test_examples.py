"""``docs/examples/ray_serve.py``, run as a reader runs it, on a real Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine import DTYPE
from tools.bench.local_cluster import ROOT, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


def test_the_application_from_python(ray_address: str, tmp_path: Path) -> None:
    """It joins the cluster that RAY_ADDRESS names: no second one is started."""
    assert os.environ["RAY_ADDRESS"] == ray_address
    example = ROOT / "docs" / "examples" / "ray_serve.py"
    command = [sys.executable, example, "--dtype", DTYPE, "--port", str(free_port())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "What is the capital of France? 'The capital of France is Paris" in done.stdout
    assert done.stdout.count("?") + done.stdout.count(".") >= 3
