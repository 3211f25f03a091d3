"""The process environment for local runs, and a launcher that applies it.

    python tools/runtime_env.py pytest -m engine

What an engine's process needs is known to ``memshare/process_env.py``; here is what a cluster on
one machine, and tests beside it, need on top. Every value is a default: what the caller's
environment already sets stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from memshare import process_env

DEFAULTS = process_env.DEFAULTS | {
    # A proxy that has died is noticed within 2 s, instead of 10.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # Proxies read no larger gRPC message into memory, instead of 2 GiB.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(72 * 2**20),
    # A token reaches its proxy by gRPC, not as a Ray object. What is larger than gRPC's own 4 MiB
    # must pass there, too: requests in replicas, replies in proxies.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(72 * 2**20),
    # Proxies close connections whose clients take too long to send a request.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.http.proxy.middlewares",
    # Ray's memory monitor kills Serve replicas when anything else on the machine uses the RAM.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray starts workers at nice 15, and the engine would inherit it.
    "RAY_worker_niceness": "0",
    # Never join (and on exit shut down) a Ray cluster that happens to run on this machine.
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The default model is made locally. Set HF_HUB_OFFLINE=0 to serve a model by its hub id.
    "HF_HUB_OFFLINE": "1",
    # Several engines run side by side, in replicas and in tests that share the machine.
    "OMP_NUM_THREADS": "1",
}


def runtime_env(base: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of ``base`` with our defaults, this venv first on PATH, and tcmalloc."""
    env = process_env.engine_env({**DEFAULTS, **base})
    bin_dir = str(Path(sys.executable).parent)
    env["PATH"] = os.pathsep.join([bin_dir, env.get("PATH", os.defpath)])
    return env


def main() -> None:
    """Replace this process by the command on the command line."""
    if len(sys.argv) < 2:
        sys.exit("usage: runtime_env.py COMMAND [ARGUMENT ...]")
    env = runtime_env(os.environ)
    # execvpe looks the command up in the PATH of `env`, so the venv's scripts are found.
    os.execvpe(sys.argv[1], sys.argv[1:], env)


if __name__ == "__main__":
    main()
