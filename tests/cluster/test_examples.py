"""``docs/examples/ray_serve.py``, run as a reader runs it, on a real Ray cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine import DTYPE
from tools.bench.local_cluster import ROOT, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.complete, pytest.mark.engine]


def test_the_application_from_python(ray_address: str, tmp_path: Path) -> None:
    """It joins the cluster that RAY_ADDRESS names: no second one is started."""
    assert os.environ["RAY_ADDRESS"] == ray_address
    example = ROOT / "docs" / "examples" / "ray_serve.py"
    command = [sys.executable, example, "--dtype", DTYPE, "--port", str(free_port())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = re.findall(r"^(?:What|Name) .*?[?.] (['\"]).*\w.*\1$", done.stdout, re.MULTILINE)
    assert len(answers) == 3, done.stdout
