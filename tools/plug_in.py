"""The arguments that make a vLLM engine a MemShare engine, as tools and tests give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plug_in(memshare: Mapping[str, object]) -> dict[str, Any]:
    """Engine arguments for MemShare's options (``kv_connector_extra_config``)."""
    return {
        "kv_transfer_config": {
            "kv_connector": "MemShareConnector",
            "kv_connector_module_path": "memshare.engine.connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": dict(memshare),
        },
        "worker_cls": "memshare.engine.worker.MemShareWorker",
    }
