"""The ledger of tenants' limits as a deployment, for several replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.telemetry.serve_logs import log_no_calls
from cluster.tenancy.limits import Ledger, TenantReport, TenantShare

_ANSWER_S = 2.0  # so long may the ledger take; then replicas enforce limits alone


class LimitLedger:
    """What all replicas use of the tenants' limits, in one actor.

    Ray Serve makes it anew when it dies. It then knows nothing, and learns within a second what is
    in use, as replicas report totals.
    """

    def __init__(self) -> None:
        log_no_calls()
        self._ledger = Ledger()

    async def settle(
        self, replica: str, reports: Mapping[str, TenantReport]
    ) -> dict[str, TenantShare]:
        """See :meth:`cluster.tenancy.limits.Ledger.settle`."""
        return self._ledger.settle(replica, reports)


class RayLedgerClient:
    """A replica's way to :class:`LimitLedger`."""

    def __init__(self, ledger: DeploymentHandle[Any]) -> None:
        self._ledger = ledger

    async def settle(
        self, replica: str, reports: Mapping[str, TenantReport]
    ) -> dict[str, TenantShare]:
        """See :meth:`cluster.tenancy.limits.LedgerClient.settle`."""
        answer: dict[str, TenantShare] = await asyncio.wait_for(
            self._ledger.settle.remote(replica, dict(reports)), _ANSWER_S
        )
        return answer
