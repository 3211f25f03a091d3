"""MemShare's place among the connectors of vLLM's ``MultiConnector``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from memshare.engine.messages import SchedulerMessage, WorkerHandshake
from memshare.plug_in import CONNECTOR, MULTI_CONNECTOR

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from memshare.engine.connector import MemShareConnector


def children(transfer: KVTransferConfig) -> list[KVTransferConfig]:
    """The connectors that a ``MultiConnector`` is made of, in order; [] of another connector.

    Raises:
        TypeError: a child has a field that vLLM does not know.
    """
    from vllm.config import KVTransferConfig

    if transfer.kv_connector != MULTI_CONNECTOR:
        return []
    listed: list[dict[str, Any]] = transfer.kv_connector_extra_config.get("connectors", [])
    return [KVTransferConfig(**{"engine_id": transfer.engine_id, **child}) for child in listed]


def own_transfer(transfer: KVTransferConfig | None) -> KVTransferConfig | None:
    """MemShare's part of vLLM's ``kv_transfer_config``: all of it, or of a ``MultiConnector`` one
    child; None if that has none."""
    if transfer is None or transfer.kv_connector != MULTI_CONNECTOR:
        return transfer
    ours = (child for child in children(transfer) if child.kv_connector == CONNECTOR)
    return next(ours, None)


def own_connector(group: KVConnectorBase_V1) -> MemShareConnector | None:
    """MemShare's connector in this process, alone or among others; None if there is none."""
    from memshare.engine.connector import MemShareConnector

    among = getattr(group, "sub_connectors", [group])
    return next((each for each in among if isinstance(each, MemShareConnector)), None)


def own_message(metadata: object) -> SchedulerMessage | None:
    """What the scheduler half has sent with a step; None if nothing.

    Args:
        metadata: of the engine's connector. A ``MultiConnector``'s holds its children's in order.
    """
    sent = getattr(metadata, "metadata", (metadata,))
    return next((each for each in sent if isinstance(each, SchedulerMessage)), None)


def is_ours(handshakes: Iterable[object]) -> bool:
    """Whether ranks have reported to MemShare, and not to another connector.

    A ``MultiConnector`` hands the first child's reports to all of them.
    """
    return all(isinstance(each, WorkerHandshake) for each in handshakes)


def exchanges_handshakes(group: KVConnectorBase_V1) -> bool:
    """Whether a connector beside MemShare's has reports of its own for its scheduler half."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    silent = KVConnectorBase_V1.get_handshake_metadata
    others = (each for each in getattr(group, "sub_connectors", ()) if own_connector(each) is None)
    return any(type(each).get_handshake_metadata is not silent for each in others)
