"""What a call can end with, other than a reply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc

from memshare.errors import UserError


class CallError(UserError):
    """A call failed. Its text is what the server, or gRPC, says."""

    def __init__(
        self, code: grpc.StatusCode, details: str, retry_after_s: float | None = None
    ) -> None:
        """Take gRPC's status, and when the server wants to be asked again."""
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.retry_after_s = retry_after_s
        """Seconds; None if the server does not say."""


class InvalidRequestError(CallError):
    """The request is wrong: the text names the field. Sending it again is no use."""


class NotAllowedError(CallError):
    """The key is missing or unknown, or not for this."""


class NotFoundError(CallError):
    """There is no such model or application."""


class OverloadedError(CallError):
    """The server is full, or a limit of the key is reached. Later it may work."""


class UnavailableError(CallError):
    """Nobody is at the address, or the engine or replica has died. Sending it again may work."""


class TimedOutError(CallError):
    """The time is up. The request has been aborted on the server."""


class AbortedError(CallError):
    """The call was cancelled, by this client or on the way."""


_ERRORS: dict[grpc.StatusCode, type[CallError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: NotAllowedError,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOutError,
    grpc.StatusCode.CANCELLED: AbortedError,
}


@contextmanager
def call_errors() -> Iterator[None]:
    """Turn gRPC's one error into ours.

    Raises:
        CallError: of the class for the status.
    """
    try:
        yield
    except grpc.RpcError as error:
        # Both kinds of call are errors themselves; only their stubs don't say so.
        code = error.code()
        details = error.details() or ""
        retry_after_s = _retry_after_s(error.trailing_metadata() or ())
        raise _ERRORS.get(code, CallError)(code, details, retry_after_s) from error


def _retry_after_s(metadata: Iterable[Any]) -> float | None:
    for name, value in metadata:
        if name == "retry-after":
            with suppress(ValueError):
                return float(value)
    return None
