"""Whether others can reach the server: without keys, only its own machine may.

Ray Serve's controller knows where proxies listen, however that was set: by a config file, by
``serve start``, by an environment variable or by Ray's API. An application's builder is also run
where there is no controller yet (``serve build``, ``serve run`` of an import path); so the question
is asked when the application is built, if it can be, and again by every replica that starts.

Proxies for gRPC always listen on all addresses; Ray Serve has no option for that. There, and for
HTTP once more, the gate looks at the address of each caller.
"""

from __future__ import annotations

import logging

from ray.serve.config import HTTPOptions, ProxyLocation

from cluster.config import AuthConfig
from cluster.processes.controller import ask_controller
from cluster.tenancy.gate import is_local
from memshare.config import ConfigError

logger = logging.getLogger(__name__)


def require_keys_or_localhost(auth: AuthConfig) -> None:
    """Refuse a server that anybody could use.

    Raises:
        ConfigError: there are no keys, and proxies listen where others can reach them.
    """
    if auth.keys.exists:
        return
    host = proxy_host()
    if host is not None:
        require_keys_beyond_localhost(auth, host)
    logger.warning(
        "no keys are configured: whoever is on this machine may use the server, others are refused"
    )


def require_keys_beyond_localhost(auth: AuthConfig, host: str) -> None:
    """The same for proxies that listen on ``host``, or are going to.

    Raises:
        ConfigError: there are no keys, and others can reach ``host``.
    """
    if not auth.keys.exists and not is_local(host):
        raise ConfigError(
            f"http_options.host = {host!r}: others could use the server, and there are no keys\n"
            "    fix: set 'auth.file' or 'auth.variable' of the application to a key table "
            "('memshare keys new' makes an entry), or http_options.host to 127.0.0.1"
        )


def proxy_host() -> str | None:
    """The host that HTTP proxies listen on; None if there are none, or if it is not known."""
    answers = ask_controller("get_proxy_location", "get_http_config")
    if answers is None:
        return None
    location: ProxyLocation | None
    options: HTTPOptions
    location, options = answers
    return None if location == ProxyLocation.Disabled else options.host
