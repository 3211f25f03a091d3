"""The options that make a vLLM engine a MemShare engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONNECTOR = "MemShareConnector"
CONNECTOR_MODULE = "memshare.engine.connector"
ROLE = "kv_producer"
WORKER_CLASS = "memshare.engine.worker.MemShareWorker"


def connector_options(memshare: Mapping[str, object]) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` for MemShare's own options."""
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": ROLE,
        "kv_connector_extra_config": dict(memshare),
    }


def plug_in(memshare: Mapping[str, object] | None) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` or ``EngineArgs``; none for None, which is plain vLLM."""
    if memshare is None:
        return {}
    return {"kv_transfer_config": connector_options(memshare), "worker_cls": WORKER_CLASS}
