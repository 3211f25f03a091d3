"""Who is calling, what they may do, and what they used. One gate for HTTP and gRPC.

A front end *identifies* a caller by the key that came with a request, and then lets the
:class:`Gate` *admit* the call: within limits, and with the :class:`Call` in the context of
everything that runs for it. The engine client (:mod:`cluster.engine.client`) takes it from there:
it salts prompts, checks what the request asks for, and notes what it generates. So a front end
can't forget that part, and a request that went past the gate is refused when keys are configured.

Without keys there is one caller, ``local``, who is on this machine and may do everything, but not
hold the server alone: a request and a connection have bounds then, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Protocol

from cluster.tenancy.call import LOCAL, Call, Caller, RefusedError, Why
from cluster.tenancy.keys import Grant, KeylessConfig, MemSharePermissions, WatchedKeys
from cluster.tenancy.limits import REPORT_S, Limiter, LimitReachedError, Limits

logger = logging.getLogger(__name__)

_NOBODY = "-"  # where the tenant is not known; no tenant can be called so


def _local_caller(bounds: KeylessConfig) -> Caller:
    limits, sequences = Limits(None, None), bounds.sequences_per_request
    return Caller(LOCAL, limits, sequences, None, True, MemSharePermissions())


class TenantCounters(Protocol):
    """Where things are counted: :class:`cluster.telemetry.metrics.ReplicaMetrics`."""

    def count(self, name: str, *values: str, by: int = 1) -> None:
        """Count ``by`` under a name and the values of its labels."""
        ...


_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


class Gate:
    """Admits calls to one replica. For one event loop."""

    def __init__(
        self,
        keys: WatchedKeys | None,
        limiter: Limiter,
        counts: TenantCounters,
        keyless: KeylessConfig | None = None,
    ) -> None:
        """Make a gate.

        Args:
            keys: the key table; None lets in who is on this machine.
            limiter: enforces the tenants' limits.
            counts: is told what happens.
            keyless: bounds without a key table; the defaults if None.
        """
        self._keys = keys
        self._keyless = keyless or KeylessConfig()
        self._local = _local_caller(self._keyless)
        self._connections: Counter[str] = Counter()  # requests of each, without a key table
        self._limiter = limiter
        self._counts = counts
        # Salts matter within one engine only, so that a secret of this process is enough. Nobody
        # has to configure it, nothing can leak it, and no client can compute a salt.
        self._secret = secrets.token_bytes(32)
        self._calls: dict[Call, tuple[int, int]] = {}
        self._desk_faults = 0
        self._closed_s: int | None = None

    @property
    def under_way(self) -> int:
        """Calls that have been admitted and have not ended."""
        return len(self._calls)

    @property
    def is_closed(self) -> bool:
        """Whether nobody is admitted any more."""
        return self._closed_s is not None

    def close(self, retry_after_s: int) -> None:
        """Admit nobody any more; what is under way goes on.

        Args:
            retry_after_s: seconds after which callers are told to come again.
        """
        self._closed_s = retry_after_s

    def require_open(self, tenant: str = _NOBODY) -> None:
        """Keep out who comes when the server is about to end.

        Raises:
            RefusedError: unavailable.
        """
        if self._closed_s is not None:
            raise self._refusal(
                "closed",
                f"the server is shutting down; try again in {self._closed_s} s",
                tenant,
                self._closed_s,
            )

    def identify(
        self, key: str | None, peer: str | None, *sites: str, connection: str = ""
    ) -> Caller:
        """Say who is calling.

        Args:
            key: what came with the request; None if nothing did.
            peer: address of the client; None if it is not known.
            sites: hosts that the request names as its target or origin. A browser on this machine
                may be led here by any page it shows, and then names that page's.
            connection: a name for the one that the request came by.

        Raises:
            RefusedError: unauthenticated.
        """
        if self._keys is None:
            foreign = next((site for site in sites if not is_local(site)), None)
            if foreign is not None:
                raise self._refusal(
                    "not_local",
                    f"this server has no keys and is not for {foreign!r}; call it as 127.0.0.1 or "
                    "localhost, or set 'auth' of the application ('memshare keys new' makes an "
                    "entry)",
                )
            if is_local(peer):
                return self._local._replace(connection=connection)
            raise self._refusal(
                "not_local",
                f"this server has no keys and serves its own machine only, not {peer or 'unknown'};"
                " set 'auth' of the application ('memshare keys new' makes an entry)",
            )
        if not key:
            raise self._refusal("no_key", "a key is needed; send 'Authorization: Bearer KEY'")
        grant = self._keys.find(key)
        if grant is None:
            raise self._refusal("unknown_key", "the key is not known; check it for missing letters")
        return _caller(grant)

    def require_operator(self, caller: Caller, what: str) -> None:
        """Keep what is no inference for operators.

        Raises:
            RefusedError: forbidden.
        """
        if not caller.operator:
            raise self._refusal(
                "not_operator", f"{what} is for operators; use a key of theirs", caller.tenant
            )

    def require_model(self, call: Call, model: str) -> None:
        """Check that the caller may use ``model``, by its name in the API.

        Raises:
            RefusedError: forbidden.
        """
        models = call.caller.models
        if models is not None and model not in models:
            raise self._refusal_within(
                call,
                "model",
                f"the key is not for the model {model!r}; use one of: {', '.join(models)}",
            )

    @asynccontextmanager
    async def admit(self, caller: Caller) -> AsyncIterator[Call]:
        """A call within the caller's limits, in the context of what runs inside.

        Raises:
            RefusedError: limited, or unavailable.
        """
        self.require_open(caller.tenant)
        with self._counted(caller.connection):
            async with self._admitted(caller) as call:
                yield call

    @contextmanager
    def _counted(self, connection: str | None) -> Iterator[None]:
        if connection is None:
            yield
            return
        limit = self._keyless.requests_per_connection
        if self._connections[connection] >= limit:
            raise self._refusal(
                "requests",
                f"the limit of {limit} requests at one time by one connection is reached; try "
                "again in 1 s, or raise auth.without_keys.requests_per_connection",
                LOCAL,
                1,
            )
        self._connections[connection] += 1
        try:
            yield
        finally:
            self._connections[connection] -= 1
            if not self._connections[connection]:
                del self._connections[connection]

    @asynccontextmanager
    async def _admitted(self, caller: Caller) -> AsyncIterator[Call]:
        try:
            await self._limiter.admit(caller.tenant, caller.limits)
        except LimitReachedError as error:
            raise self._refusal(
                error.what, str(error), caller.tenant, error.retry_after_s
            ) from None
        call = Call(caller, self._salt(caller.tenant))
        self._calls[call] = (0, 0)
        _CALL.set(call)  # not reset: a task serves one call, and may end in another context
        try:
            yield call
        except (asyncio.CancelledError, GeneratorExit):
            call.end("aborted")
            raise
        except BaseException:
            call.end("failed")
            raise
        finally:
            self._note(call)
            del self._calls[call]
            self._limiter.release(caller.tenant)
            self._counts.count("tenant_requests", caller.tenant, call.outcome)

    def call(self) -> Call:
        """The call for which this code runs.

        Raises:
            RefusedError: unauthenticated; a front end has not asked the gate.
        """
        call = _CALL.get()
        if call is not None:
            return call
        if self._keys is None:
            return Call(self._local, self._salt(LOCAL))
        raise self._refusal("no_key", "this way into the server does not check keys")

    @contextmanager
    def acting_for(self, call: Call) -> Iterator[None]:
        """What runs inside is the server's own work on what a tenant's call has computed: under
        its salt, beside its limits, and charged to nobody."""
        token = _CALL.set(Call(call.caller, call.salt))
        try:
            yield
        finally:
            _CALL.reset(token)

    def refuse_options(self, call: Call, name: str) -> RefusedError:
        """The refusal of a MemShare option that the caller may not use."""
        return self._refusal_within(
            call, "memshare", f"the key does not allow {name}; leave it out"
        )

    async def tend(self) -> None:
        """Keep limits and keys up to date, for as long as the replica lives."""
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                for call in list(self._calls):
                    self._note(call)
                await self._limiter.report()
                faults, self._desk_faults = self._desk_faults, self._limiter.desk_faults
                self._counts.count("limit_ledger_faults", by=self._desk_faults - faults)
                if self._keys is not None:
                    result = await asyncio.to_thread(self._keys.look)
                    if result is not None:
                        self._counts.count("key_table_reloads", result)
            except Exception:
                # Never seen, but if this loop ended, limits would go stale and keys stay valid.
                logger.exception("limits and keys could not be brought up to date")

    def _note(self, call: Call) -> None:
        """Charge what the call has used since the last time."""
        tenant = call.caller.tenant
        prompt, generated = call.tokens()
        prompt_before, generated_before = self._calls[call]
        self._calls[call] = (prompt, generated)
        new_prompt, new_output = prompt - prompt_before, generated - generated_before
        self._counts.count("tenant_tokens", tenant, "prompt", by=new_prompt)
        self._counts.count("tenant_tokens", tenant, "output", by=new_output)
        self._limiter.spend(tenant, new_prompt + new_output)

    def _salt(self, tenant: str) -> str:
        return hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest()

    def _refusal_within(self, call: Call, why: Why, message: str) -> RefusedError:
        """Of a call that was admitted, and will be counted when it ends."""
        call.outcome = "refused"
        self._counts.count("tenant_refusals", call.caller.tenant, why)
        return RefusedError(why, message)

    def _refusal(
        self, why: Why, message: str, tenant: str = _NOBODY, retry_after_s: int | None = None
    ) -> RefusedError:
        self._counts.count("tenant_requests", tenant, "refused")
        self._counts.count("tenant_refusals", tenant, why)
        return RefusedError(why, message, retry_after_s)


def _caller(grant: Grant) -> Caller:
    tenant = grant.tenant
    return Caller(
        grant.name,
        Limits(tenant.concurrent_requests, tenant.tokens_per_minute),
        tenant.sequences_per_request,
        tenant.models,
        tenant.operator,
        tenant.permissions,
    )


def key_of(header: Callable[[str], str | None]) -> str | None:
    """The key among headers or metadata: ``Authorization: Bearer KEY``, or ``x-api-key: KEY``.

    Args:
        header: value of a header, by its name in lower case.
    """
    scheme, _, key = (header("authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return header("x-api-key")


def is_local(host: str | None) -> bool:
    """Whether an address is this machine's loopback."""
    if host is None:
        return False
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
