"""Deployments that only replicas call, once a second each: their calls are nothing to log."""

from __future__ import annotations

import logging


def log_no_calls() -> None:
    """Leave Ray Serve's line for each call out of this process's log.

    ``logging_config`` of a deployment could do the same, but would take the place of the whole of
    the application's own, its encoding included.
    """
    logging.getLogger("ray.serve").addFilter(_is_no_call)


def _is_no_call(record: logging.LogRecord) -> bool:
    return not getattr(record, "serve_access_log", False)
