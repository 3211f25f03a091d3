"""Which connectors MemShare may stand beside, and on what terms.

The rule: what another connector copies, and what MemShare may change, are disjoint. A connector
that stores prompts alone is safe beside a MemShare that protects all of the prompt; one that
stores generated tokens would hand approximate KV, or a block that changed hands while it was
copied, to another request as exact. And what it loads must not go into a block that a step in
flight still reads: MemShare frees blocks of running requests, which vLLM's own fence
(vllm/v1/core/sched/scheduler.py, ``defer_block_free``) does not cover.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from memshare.config import MemShareConfig
from memshare.engine.beside.children import children
from memshare.plug_in import CONNECTOR, MULTI_CONNECTOR

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

_FIX_STORES = "leave it out: generated tokens would be copied that MemShare may change"


def _offloading(child: KVTransferConfig) -> Iterator[str]:
    if not child.kv_connector_extra_config.get("offload_prompt_only", True):
        yield f"offload_prompt_only is false; {_FIX_STORES}"


def _lmcache(child: KVTransferConfig) -> Iterator[str]:
    asked = child.kv_connector_extra_config.get("lmcache.save_decode_cache", False)
    if asked:
        yield f"lmcache.save_decode_cache is {asked}; {_FIX_STORES}"
    if os.environ.get("LMCACHE_SAVE_DECODE_CACHE", "false").lower() in ("1", "true", "yes"):
        yield f"LMCACHE_SAVE_DECODE_CACHE is set; {_FIX_STORES}"


def _nixl(child: KVTransferConfig) -> Iterator[str]:
    if child.kv_role != "kv_consumer":
        yield (
            f"kv_role is {child.kv_role!r}; set it to 'kv_consumer': MemShare works where tokens "
            "are generated, on the decode side"
        )
    if child.kv_connector_extra_config.get("bidirectional_kv_xfer", False):
        yield "bidirectional_kv_xfer is true; leave it out: it would send generated tokens"


_TERMS: Mapping[str, Callable[[KVTransferConfig], Iterator[str]]] = {
    "OffloadingConnector": _offloading,
    "LMCacheConnectorV1": _lmcache,
    "NixlConnector": _nixl,
}
_WHY_NOT = {
    "LMCacheMPConnector": "it stores generated tokens, too, by a block table of its own that does "
    "not follow remaps (vllm/.../lmcache_mp_connector.py); use OffloadingConnector",
    "SimpleCPUOffloadConnector": "it holds blocks by references of its own, which integrity checks "
    "cannot tell from lost ones; use OffloadingConnector",
}
ACCEPTED = tuple(_TERMS)
"""Connectors that MemShare may stand beside."""


def beside_faults(vllm_config: VllmConfig, config: MemShareConfig) -> Iterator[str]:
    """What is wrong with the connectors beside MemShare's, and the way out; nothing if there are
    none."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != MULTI_CONNECTOR:
        return
    names = [str(child.kv_connector) for child in children(transfer)]
    if names[:1] != [CONNECTOR] or CONNECTOR in names[1:]:
        yield (
            f"connectors are {', '.join(names) or 'none'}; name {CONNECTOR} once, and first: vLLM "
            "asks one after another whether blocks are about to be free, until one says yes"
        )
    if config.agents.shares:
        yield (
            f"agents.scheme is {config.agents.scheme!r}; shared caches of adapters have not been "
            "run beside another connector; leave one of the two out"
        )
    if config.mode != "off":
        yield from _overlaps(transfer, config)
        if vllm_config.max_concurrent_batches > 1:
            yield (
                "async scheduling is on; add --no-async-scheduling: what a connector loads could "
                "overwrite a block that MemShare has freed while the step in flight still reads it"
            )


def _overlaps(transfer: KVTransferConfig, config: MemShareConfig) -> Iterator[str]:
    """What another connector copies although MemShare may change it, and the way out."""
    for child in children(transfer):
        name = str(child.kv_connector)
        if name == CONNECTOR:
            continue
        if name in _TERMS:
            yield from (f"{name}: {fault}" for fault in _TERMS[name](child))
        else:
            unknown = f"it has not been run with MemShare; use one of {', '.join(ACCEPTED)}"
            yield f"{name} cannot stand beside {CONNECTOR}: {_WHY_NOT.get(name, unknown)}"
    if config.protect.prompt_tokens != "all":
        yield (
            f"protect.prompt_tokens is {config.protect.prompt_tokens}; leave it at 'all': another "
            "connector copies prompts, and must find them as they were computed"
        )
