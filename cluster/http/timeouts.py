"""How long a client may take to send a request, as Ray Serve's proxies see it.

A proxy serves all applications and knows the arguments of none, so these are variables of its
environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from memshare.config import ConfigError

HEAD_VARIABLE = "PROXY_HEAD_TIMEOUT_S"
BODY_VARIABLE = "PROXY_BODY_TIMEOUT_S"


class Timeouts(NamedTuple):
    """Seconds that a client has to send a request."""

    head: float = 10.0
    """From the first byte, or from the connection's start, to the end of the headers."""
    body: float = 60.0
    """From there to the end of the body, or of a gRPC call's message."""


def timeouts(environ: Mapping[str, str]) -> Timeouts:
    """Read the variables :data:`HEAD_VARIABLE` and :data:`BODY_VARIABLE`.

    Raises:
        ConfigError: a value is no positive number.
    """
    return Timeouts(
        _seconds(environ, HEAD_VARIABLE, Timeouts().head),
        _seconds(environ, BODY_VARIABLE, Timeouts().body),
    )


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise ConfigError(
            f"{name} = {text!r} is no positive number\n    fix: set it to seconds, or unset it"
        )
    return seconds
