"""What MemShare touches of vLLM: every name that it imports, and members of classes by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "memshare", ROOT / "cluster")


class Import(NamedTuple):
    """A name of vLLM that one of our files imports; ``name`` is ``""`` for a module itself."""

    module: str
    name: str
    file: str
    line: int


MEMBERS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager"): (
        "block_pool", "coordinator", "watermark_blocks",
    ),
    ("vllm.v1.core.block_pool", "BlockPool"): (
        "touch", "free_blocks", "get_num_free_blocks", "blocks", "null_block",
    ),
    ("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator"): ("single_type_managers",),
    ("vllm.v1.core.single_type_kv_cache_manager", "SingleTypeKVCacheManager"): (
        "req_to_blocks", "num_cached_block", "block_size",
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"): (
        "requests", "input_batch", "prepare_inputs_event", "attn_groups",
    ),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"): ("req_states", "block_tables"),
    ("vllm.v1.worker.utils", "AttentionGroup"): (
        "metadata_builders", "backend", "layer_names",
    ),
    ("vllm.v1.attention.backend", "CommonAttentionMetadata"): (
        "block_table_tensor", "seq_lens", "query_start_loc", "num_reqs",
    ),
    ("vllm.v1.attention.backend", "AttentionMetadataBuilder"): ("build",),
    ("vllm.lora.worker_manager", "WorkerLoRAManager"): ("_load_adapter", "_adapter_manager"),
    ("vllm.v1.engine.core", "EngineCore"): ("scheduler", "model_executor"),
}  # fmt: skip
"""Members that no import names (docs/porting.md)."""

INTERFACES: Mapping[str, tuple[str, str]] = {
    "EngineRequest": ("vllm.v1.request", "Request"),
    "Block": ("vllm.v1.core.kv_cache_utils", "KVCacheBlock"),
}
"""Our interfaces (memshare/core/interfaces.py) that objects of vLLM's satisfy as they are."""


def imports() -> Iterator[Import]:
    """Every import of vLLM in our packages, also those within functions and for types alone."""
    for package in PACKAGES:
        for file in sorted(package.rglob("*.py")):
            place = str(file.relative_to(ROOT))
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and _is_vllm(node.module or ""):
                    for alias in node.names:
                        yield Import(node.module or "", alias.name, place, node.lineno)
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        if _is_vllm(alias.name):
                            yield Import(alias.name, "", place, node.lineno)


def _is_vllm(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


def members() -> Iterator[tuple[str, str, str]]:
    """(module, class, member) of all that is touched besides."""
    for (module, owner), names in MEMBERS.items():
        for name in names:
            yield module, owner, name
    source = (ROOT / "memshare" / "core" / "interfaces.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in INTERFACES:
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield (*INTERFACES[node.name], part.name)
