"""Who may import what: the library never Ray, and only what lives in or drives an engine vLLM."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import memshare

PACKAGE = Path(memshare.__file__).parent
VLLM = {"engine", "bench", "evals", "replay", "simulate"}  # the plug-in, and the instruments
VLLM_FILES = {"plug_in.py", "commands/serve.py"}  # what vLLM calls, and what starts its server
TYPES_ONLY = {  # import it for annotations
    "core/request_tracker.py",
    "core/requests.py",
    "kv/comparer.py",
    "kv/layout.py",
}
LIGHT = [
    "config",
    "request_options",
    "search.evaluate",
    "search.bridge",
    "search.steps",
    "search.vocabulary",
    "mechanisms.remap.policy",
    "client",
    "commands.chat",
]


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_only_plug_in_and_instruments_import_vllm_and_nothing_imports_ray() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        names = imported(file)
        assert names.isdisjoint({"ray", "cluster"}), file
        if "vllm" in names and file.relative_to(PACKAGE).parts[0] not in VLLM:
            assert file.relative_to(PACKAGE).as_posix() in TYPES_ONLY | VLLM_FILES, file
    # Negative control: the look through the files does see such imports.
    assert any("vllm" in imported(file) for file in (PACKAGE / "engine").glob("*.py"))


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
