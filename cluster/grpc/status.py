"""What becomes of an error: the gRPC status with which a call ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import grpc
from pydantic import ValidationError
from ray.serve.grpc_util import RayServegRPCContext

from cluster.grpc.keys import CODES
from cluster.tenancy.call import RefusedError

logger = logging.getLogger(__name__)

# vLLM tells how bad an error is by an HTTP status.
_CODES = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNPROCESSABLE_ENTITY: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}


class StatusError(Exception):
    """Ends a call with a status. Plain, so that Ray Serve's proxy can unpickle it."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        """Take the status and what the caller is told."""
        super().__init__(details)
        self.code = code
        self.details = details

    @property
    def is_ours(self) -> bool:
        """Whether the server is to blame, and not the request."""
        return self.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)

    def __reduce__(self) -> tuple[type[StatusError], tuple[grpc.StatusCode, str]]:
        """Pickle with both arguments."""
        return StatusError, (self.code, self.details)


def invalid(field: str, problem: str) -> StatusError:
    """The refusal of a field of the request."""
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}")


@contextmanager
def statuses(context: RayServegRPCContext) -> Iterator[None]:
    """Let whatever is raised inside end the call with the right status.

    Cancellation passes: the client has left, or its deadline is over, and nobody is told anything.

    Raises:
        StatusError: in place of any other exception.
    """
    try:
        yield
    except Exception as error:
        failure = status_of(error)
        if failure.code == grpc.StatusCode.INTERNAL:
            logger.exception("a gRPC call failed")
        # Ray Serve takes the status from the context, when the method raises.
        context.set_code(failure.code)
        context.set_details(failure.details)
        raise failure from None


def status_of(error: BaseException) -> StatusError:
    """The status for an error, whoever raised it."""
    if isinstance(error, StatusError):
        return error
    if isinstance(error, ValidationError):
        return _invalid_body(error)
    if isinstance(error, RefusedError):
        return StatusError(CODES[error.kind], str(error))
    # Only here: the proxies and the controller import this module, too.
    from vllm.entrypoints.serve import create_error_response
    from vllm.exceptions import GracefulHTTPError
    from vllm.v1.engine.exceptions import EngineGenerateError

    if isinstance(error, EngineGenerateError) and error.__cause__ is not None:
        return status_of(error.__cause__)
    described = create_error_response(error if isinstance(error, Exception) else str(error)).error
    status = HTTPStatus(described.code)
    if isinstance(error, GracefulHTTPError) and status == HTTPStatus.SERVICE_UNAVAILABLE:
        return StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, described.message)  # its queue
    return http_status(status, described.message)


def http_status(status: HTTPStatus, message: str) -> StatusError:
    """The status for one of HTTP."""
    return StatusError(_CODES.get(status, grpc.StatusCode.INTERNAL), message)


def _invalid_body(error: ValidationError) -> StatusError:
    """The first fault that vLLM's model of the request found; further ones often follow from it."""
    fault = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in fault["loc"]) or "request"
    return invalid(field, str(fault["msg"]))
