"""One admitted call: who makes it, what it uses, and how it ends or is refused."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from cluster.tenancy.keys import MemSharePermissions
from cluster.tenancy.limits import Limits

LOCAL = "local"
"""The tenant of a server without keys."""

Why = Literal[
    "no_key", "unknown_key", "not_local", "not_operator", "model", "memshare", "requests",
    "tokens", "closed",
]  # fmt: skip
"""Why something was refused; a metric label."""

CallOutcome = Literal["served", "refused", "failed", "aborted"]


class RefusedError(Exception):
    """A caller may not do this, or not now. The text names the reason and the fix."""

    def __init__(self, why: Why, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.why: Why = why
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> Literal["unauthenticated", "forbidden", "limited", "unavailable"]:
        """What a protocol turns into a status."""
        if self.why == "closed":
            return "unavailable"
        if self.why in ("no_key", "unknown_key", "not_local"):
            return "unauthenticated"
        return "limited" if self.why in ("requests", "tokens") else "forbidden"


class Caller(NamedTuple):
    """Whom a key belongs to."""

    tenant: str
    limits: Limits
    sequences_per_request: int | None
    models: tuple[str, ...] | None
    operator: bool
    permissions: MemSharePermissions
    connection: str | None = None
    """By which a caller without a key came, and which has bounds therefore."""


class RequestTokens(Protocol):
    """One request of a call in the engine; counts rise."""

    def tokens(self) -> tuple[int, int]:
        """Tokens of the prompt, and tokens generated so far."""
        ...


class Call:
    """One admitted HTTP request or gRPC call."""

    def __init__(self, caller: Caller, salt: str) -> None:
        """Start with nothing used."""
        self.caller = caller
        self.salt = salt
        """``cache_salt`` of everything that is computed for the tenant."""
        self.sequences = 0
        """Sequences that are generated for it now."""
        self.outcome: CallOutcome = "served"
        """How it ended."""
        self._running: dict[str, RequestTokens] = {}
        # Of what has ended only the sum is kept: beam search makes a request of every beam for
        # every token.
        self._prompt = 0
        self._generated = 0

    def began(self, request_id: str, usage: RequestTokens) -> None:
        """A request of the call runs in the engine, under an id that no other one of it has now."""
        self._running[request_id] = usage

    def ended(self, request_id: str) -> None:
        """It runs no more, if it ever did."""
        usage = self._running.pop(request_id, None)
        if usage is not None:
            prompt, generated = usage.tokens()
            self._prompt += prompt
            self._generated += generated

    def tokens(self) -> tuple[int, int]:
        """Tokens of all prompts, and tokens generated so far, of all its requests."""
        counts = [usage.tokens() for usage in self._running.values()]
        prompt = self._prompt + sum(count[0] for count in counts)
        return prompt, self._generated + sum(count[1] for count in counts)

    def end(self, outcome: CallOutcome) -> None:
        """Say how it ended; that it was refused has been said before, if it was."""
        if self.outcome != "refused":
            self.outcome = outcome
