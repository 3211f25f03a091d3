"""Options of vLLM that ask for a connector, where MemShare's has to be."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from memshare.errors import UserError
from memshare.plug_in import CONNECTOR, MULTI_CONNECTOR, host_memory

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig


def take_beside(options: Namespace) -> list[dict[str, Any]]:
    """Connectors that options of vLLM ask for, to be given as ``beside``; they are taken out, as
    there is room for one.

    Raises:
        UserError: one of them cannot stand beside MemShare's.
    """
    beside = []
    given: KVTransferConfig | None = options.kv_transfer_config
    if given is not None and given.kv_connector == MULTI_CONNECTOR:
        raise UserError(
            f"--kv-transfer-config: kv_connector is {MULTI_CONNECTOR!r}, and MemShare writes that "
            "itself\n"
            "    fix: name the connector that is to stand beside it"
        )
    if given is not None and given.kv_connector not in (None, CONNECTOR):
        beside.append(_changed(given))
        options.kv_transfer_config = None
    if options.kv_offloading_size is not None:
        if options.kv_offloading_backend != "native":
            raise UserError(
                f"--kv-offloading-backend is {options.kv_offloading_backend!r}, and its connector "
                "stores generated tokens, too\n    fix: set it to 'native'"
            )
        beside.append(host_memory(options.kv_offloading_size))
        options.kv_offloading_size = None
    if beside and options.async_scheduling is None:
        options.async_scheduling = False
    return beside


def _changed(transfer: KVTransferConfig) -> dict[str, Any]:
    """The fields that differ from vLLM's defaults, but for the engine's id, which is drawn."""
    from vllm.config import KVTransferConfig

    plain = asdict(KVTransferConfig())
    return {
        name: value
        for name, value in asdict(transfer).items()
        if name != "engine_id" and value != plain[name]
    }
