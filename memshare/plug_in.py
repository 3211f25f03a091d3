"""The options that make a vLLM engine a MemShare engine, and the connector's name in vLLM."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memshare.config import AgentsConfig

CONNECTOR = "MemShareConnector"
CONNECTOR_MODULE = "memshare.engine.connector"
ROLE = "kv_producer"
MULTI_CONNECTOR = "MultiConnector"
WORKER_CLASS = "memshare.engine.worker.MemShareWorker"

_LORA_RANKS = (8, 16, 32, 64, 128, 256)  # that vLLM's `max_lora_rank` may be


def register_connector() -> None:
    """Make the connector known to vLLM by its name alone, so that options need no module path.

    The entry point of ``vllm.general_plugins``, which vLLM calls in each of its processes, also
    where MemShare is not used: MemShare itself is imported with the first connector, not here.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    with contextlib.suppress(ValueError):  # registered before: vLLM may call more than once
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)


def connector_options(
    memshare: Mapping[str, object], beside: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` for MemShare's own options.

    The module path is there although the name is registered: installed metadata may be older than
    the code, and ``VLLM_PLUGINS`` may leave the entry point out.

    Args:
        memshare: MemShare's configuration.
        beside: ``kv_transfer_config`` of other connectors, which run beside MemShare's.
    """
    ours = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": ROLE,
        "kv_connector_extra_config": dict(memshare),
    }
    if not beside:
        return ours
    return {
        "kv_connector": MULTI_CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [ours, *map(dict, beside)]},
    }


def host_memory(gib: float) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` for prompts in host memory, as ``--kv-offloading-size`` has it;
    to be given as ``beside``.

    Args:
        gib: size of that memory, over all ranks, in GiB.
    """
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": int(gib * 2**30)},
    }


def plug_in(
    memshare: Mapping[str, object] | None, beside: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` or ``EngineArgs``; none for None, which is plain vLLM.

    Args:
        memshare: MemShare's configuration.
        beside: ``kv_transfer_config`` of other connectors (docs/other-connectors.md says which may
            be there). They need ``async_scheduling=False``, which is among the arguments then.

    Raises:
        ConfigError: a field is unknown or wrong, or adapters cannot share. The engine would say so
            later, in a process of its own, above tracebacks that end in "Engine core initialization
            failed".
    """
    if memshare is None:
        return {}
    from memshare.config import load_config  # not for `register_connector`, see there

    config = load_config(memshare)
    options: dict[str, Any] = {
        "kv_transfer_config": connector_options(memshare, beside), "worker_cls": WORKER_CLASS,
    }  # fmt: skip
    if beside:
        options["async_scheduling"] = False
    return options | adapter_options(config.agents)


def adapter_options(agents: AgentsConfig) -> dict[str, Any]:
    """Arguments of vLLM that make room for a configuration's adapters; none if it names none.

    Raises:
        ConfigError: an adapter cannot be read, or cannot share.
    """
    if not agents.adapters:
        return {}
    from memshare.agents.adapter import adapters_by_name
    from memshare.agents.refusals import check_adapters

    adapters = adapters_by_name(agents.adapters)
    check_adapters(adapters, agents)
    rank = max(adapter.rank for adapter in adapters)
    return {
        "enable_lora": True,
        # On CPUs vLLM computes requests of the base model with the last slot: one stays empty.
        "max_loras": len(adapters) + 1,
        "max_lora_rank": next((room for room in _LORA_RANKS if room >= rank), rank),
    }
