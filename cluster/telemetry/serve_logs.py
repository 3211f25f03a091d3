"""The logs of Ray Serve and of vLLM, in processes of ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

from ray.serve.exceptions import gRPCStatusError

_SERVE = logging.getLogger("ray.serve")


def log_no_calls() -> None:
    """Leave Ray Serve's line for each call out of this process's log: for deployments that only
    replicas call, once a second each, and for replicas, which have a better one
    (:mod:`cluster.telemetry.access_log`).

    ``logging_config`` of a deployment could do the same, but would take the place of the whole of
    the application's own, its encoding included.
    """
    _SERVE.addFilter(_is_no_call)


def log_no_refusals() -> None:
    """Leave out Ray Serve's traceback of each gRPC call that ended with a status of our choice, for
    proxies and replicas: the access log has the call, and of a fault of ours, the replica's log has
    the traceback. Any client could fill the log with them.
    """
    _SERVE.addFilter(_is_no_refusal)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not isinstance(record.exc_info[1], gRPCStatusError)


def _is_no_call(record: logging.LogRecord) -> bool:
    return not getattr(record, "serve_access_log", False) or hasattr(record, "tenant")


def say_refusals_in_a_line() -> None:
    """Leave tracebacks of requests that were refused out of vLLM's log. To be called after vLLM was
    imported, which sets its log up.

    Some of vLLM's routes log whatever ends a request as a fault of the server's: whoever sends
    requests that are refused would fill the log.
    """
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(_say_refusal_in_a_line)


def _say_refusal_in_a_line(record: logging.LogRecord) -> bool:
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, VLLMClientError | GracefulHTTPError):
        text = record.getMessage()
        if str(error) not in text:
            text = f"{text} {error}"
        record.msg, record.args = " ".join(text.split()), None  # a client's text may have lines
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


@contextmanager
def logs_kept() -> Iterator[None]:
    """Around the start of vLLM, which closes every handler of the process (``vllm/logger.py``
    configures logging by ``dictConfig``, and that does).

    Ray Serve's handler then writes nowhere. And the replica can't say where its log is, which a
    controller asks that comes back after a crash: it would take the replica for dead, and replace
    it (``ReplicaActor.is_allocated`` in ``ray/serve/_private/replica.py``).
    """
    targets = [(h, h.target) for h in _SERVE.handlers if isinstance(h, MemoryHandler)]
    try:
        yield
    finally:
        for handler, target in targets:
            handler.setTarget(target)
