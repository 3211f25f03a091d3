"""Count who imports vLLM, and refuse those who must not: part of ``make lint``.

    python tools/check_imports.py

Within ``memshare/``, the adapters (``engine/vllm_*/``) may import anything of vLLM; the rest of
``engine/`` the public API below; the instruments, which drive engines, and two doors anything;
nobody else anything, not even for types.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTRUMENTS = ("lab",)
DOORS = {"cli/serve.py", "plug_in.py"}
"""What starts vLLM's own server, and what vLLM calls to learn the connector's name."""
PUBLIC = {
    # The interface for KV connectors, and the types that its hooks are given.
    "vllm.distributed.kv_transfer",
    "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics",
    "vllm.config",
    "vllm.forward_context",
    "vllm.v1.attention.backend",
    "vllm.v1.core.kv_cache_manager",
    "vllm.v1.core.sched.output",
    "vllm.v1.kv_cache_interface",
    "vllm.v1.outputs",
    "vllm.v1.request",
    # The class that `--worker-cls` extends.
    "vllm.v1.worker.gpu_worker",
}
"""What the engine plug-in may import outside its adapters."""


def vllm_imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of vLLM, wherever in a file."""
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules = [node.module]
        for module in modules:
            if module.partition(".")[0] == "vllm":
                yield node.lineno, module


def faults_of(path: str, source: str) -> Iterator[str]:
    """What a file of ``memshare/`` imports and must not.

    Args:
        path: in ``memshare/``, with slashes.
        source: its text.
    """
    room = path.partition("/")[0]
    if room in INSTRUMENTS or path in DOORS or re.match(r"engine/vllm_\w+/", path):
        return
    for line, module in vllm_imports(source):
        if room != "engine":
            yield f"memshare/{path}:{line}: imports {module}; only memshare/engine/ may"
        elif module not in PUBLIC:
            yield (
                f"memshare/{path}:{line}: imports {module}, which is not vLLM's public API; ask "
                "the adapter for it (memshare/engine/adapter.py)"
            )


def main() -> int:
    """Print the counts and the faults; return the exit status."""
    package = ROOT / "memshare"
    counts = dict.fromkeys(("adapters", "rest of engine/", "instruments", "doors", "elsewhere"), 0)
    faults = []
    for file in sorted(package.rglob("*.py")):
        path, source = file.relative_to(package).as_posix(), file.read_text(encoding="utf-8")
        if not any(vllm_imports(source)):
            continue
        faults += faults_of(path, source)
        if path.startswith("engine/"):
            counts["adapters" if path.startswith("engine/vllm_") else "rest of engine/"] += 1
        else:
            instrument = path.partition("/")[0] in INSTRUMENTS
            counts["instruments" if instrument else "doors" if path in DOORS else "elsewhere"] += 1
    listed = ", ".join(f"{count} in {where}" for where, count in counts.items())
    print(f"files of memshare/ that import vLLM: {listed}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
