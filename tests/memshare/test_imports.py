"""Who may import what: the library never Ray, and only what lives in or drives an engine vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import memshare
from tools.check_imports import faults_of

PACKAGE = Path(memshare.__file__).parent
ROOT = PACKAGE.parent
LIGHT = [
    "config",
    "request_options",
    "search.evaluate",
    "search.bridge",
    "search.steps",
    "search.vocabulary",
    "mechanisms.remap.policy",
    "client",
    "cli.chat",
]


def lint(*command: str) -> subprocess.CompletedProcess[str]:
    """A command of ``make lint``."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_vllm_is_imported_where_it_may_be() -> None:
    done = lint(sys.executable, "tools/check_imports.py")
    assert done.returncode == 0, done.stderr
    assert re.search(r"[1-9]\d* in adapters, [1-9]\d* in rest of engine/", done.stdout)
    assert "0 in elsewhere" in done.stdout


@pytest.mark.parametrize(
    ("path", "source", "faults"),
    [
        ("core/reclaimer.py", "from vllm import LLM", 1),
        ("core/x.py", "if TYPE_CHECKING:\n    from vllm.v1.request import Request", 1),
        ("kv/x.py", "def f():\n    import vllm.envs", 1),
        ("engine/connector.py", "from vllm.v1.core.block_pool import BlockPool", 1),
        ("engine/connector.py", "from vllm.v1.request import Request", 0),
        ("engine/vllm_0_32/x.py", "from vllm.v1.core.block_pool import BlockPool", 0),
        ("lab/bench/run.py", "from vllm import LLM", 0),
        ("core/x.py", "import vllm_stubs", 0),
    ],
)
def test_vllm_imported_elsewhere_would_be_seen(path: str, source: str, faults: int) -> None:
    assert len(list(faults_of(path, source))) == faults


def test_every_room_builds_on_those_below_it() -> None:
    lint_imports = str(Path(sys.executable).parent / "lint-imports")
    done = lint(lint_imports, "--no-logo", "--no-cache")
    assert done.returncode == 0, done.stdout
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert f"Contracts: {len(contracts['contracts'])} kept, 0 broken" in done.stdout


def test_the_layers_name_every_room() -> None:
    """A folder that stands in no layer may import what it likes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name.strip() for layer in layers for name in re.split("[:|]", layer)}
    rooms = {f"memshare.{file.parent.name}" for file in PACKAGE.glob("*/__init__.py")}
    assert rooms - named == {"memshare.client", "memshare.proto"}, "these build on nothing here"


def test_stage_one_loads_neither_torch_nor_ray_nor_vllm() -> None:
    """Evaluator actors and the command line start in a moment, and by the hundred."""
    code = f"import sys; import {', '.join('memshare.' + name for name in LIGHT)}; "
    code += "sys.exit(', '.join({'torch', 'ray', 'vllm', 'numba'} & set(sys.modules)) or None)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_nobody_edits_the_path_that_modules_are_found_on() -> None:
    edit = re.compile(r"\bsys\.path(\[.*\])?(\.\w+\(| *\+?= )")
    # Hands its own path to the interpreter that it starts, as multiprocessing does.
    spared = {ROOT / "cluster/processes/engine_prewarm.py", Path(__file__)}
    files = [
        f
        for room in ("memshare", "cluster", "tools", "tests")
        for f in ROOT.glob(f"{room}/**/*.py")
    ]
    assert len(files) > 300
    assert not [f for f in files if f not in spared and edit.search(f.read_text(encoding="utf-8"))]
