"""What a cluster file says about how to reach the server, and what to tell whoever started it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cluster.config import parse_cluster_args
from memshare.config import ENV_KEY, ConfigError

KEY = "OPENAI_API_KEY"
"""The variable in which OpenAI's clients look for a key."""
OURS = "cluster.app:build"
QUESTION = "What is the capital of Japan?"
"""One that the small model answers rightly, whatever a CPU's rounding makes of near ties."""

# Flush left, so that the calls can be pasted as they are. Temperature 0: so small a model wanders.
READY = """
Ready after {seconds:.0f} s: {model} at {url}
"""
WITH_KEY = """
The server wants a key of its table ({table}); `memshare keys new` makes one. For the calls below:

export {variable}=...
"""
CALLS = """
Ask with curl:

curl {url}/v1/chat/completions \\
  -H 'Content-Type: application/json' \\{header}
  -d '{{"model": "{model}", "max_tokens": 200, "temperature": 0,
       "messages": [{{"role": "user", "content": "{question}"}}]}}'

Ask from Python, streamed:

.venv/bin/python - <<'END'
from openai import OpenAI

client = OpenAI(base_url="{url}/v1"{api_key})
stream = client.chat.completions.create(
    model="{model}", max_tokens=200, temperature=0, stream=True,
    messages=[{{"role": "user", "content": "{question}"}}])
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
END
"""
CALLS_GRPC = """
Ask over gRPC, and see what it cost in KV memory:

{prefix}.venv/bin/memshare chat --address 127.0.0.1:{port} --temperature 0 "{question}"
"""
PRESSURE = """
Put it under pressure, by a dozen long stories that do not fit its KV cache, and look at the page:

{prefix}.venv/bin/memshare demo --address 127.0.0.1:{port}
"""
RUNNING = """
Page: {url}/memshare/     Metrics: {url}/metrics     Log: {log}
Ctrl-C stops the cluster.
"""


class ServeError(Exception):
    """The server cannot run. The text says why."""


class LocalServer(NamedTuple):
    """A cluster as seen from this machine."""

    http: int
    grpc: int | None
    model: str
    """The model's name in the API."""
    keys: str | None
    """Where the key table is; None without one."""
    is_small: bool
    """Whether the KV cache is kept smaller than memory allows."""
    grace: float
    """Seconds that running requests have when it is told to stop."""

    @property
    def url(self) -> str:
        """Of the HTTP API."""
        return f"http://127.0.0.1:{self.http}"


def read_setup(config: Path) -> LocalServer:
    """Read a configuration of Ray Serve.

    Raises:
        ServeError: the file is missing, is none, or an application's arguments are wrong.
    """
    try:
        document = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ServeError(f"cannot read {config}: {error}") from error
    if not isinstance(document, dict) or "applications" not in document:
        raise ServeError(f"{config} is not a Ray Serve configuration: it has no `applications`")
    grpc_options = document.get("grpc_options") or {}
    serves_grpc = grpc_options.get("grpc_servicer_functions")
    http = (document.get("http_options") or {}).get("port", 8000)
    grpc = grpc_options.get("port", 9000) if serves_grpc else None
    return LocalServer(http, grpc, *_of_ours(document["applications"], config))


def _of_ours(
    applications: list[dict[str, Any]], config: Path
) -> tuple[str, str | None, bool, float]:
    """Of the first application that is MemShare's: from :attr:`LocalServer.model` on."""
    ours = next((a for a in applications if a.get("import_path") == OURS), None)
    if ours is None:
        return "MODEL", None, False, 0.0
    try:
        args = parse_cluster_args(ours.get("args") or {})
    except ConfigError as error:
        raise ServeError(f"{config}: {error}") from None
    table = args.auth.file or args.auth.variable
    return (
        args.public_name,
        table and str(table),
        args.engine.num_gpu_blocks_override is not None,
        args.replica.graceful_shutdown_timeout_s,
    )


def greeting(setup: LocalServer, seconds: float, log: Path) -> str:
    """What to paste now. A key never stands in it, only where it goes.

    Args:
        setup: what was started.
        seconds: how long that took.
        log: the file that holds its output.
    """
    keyed = setup.keys is not None
    parts = [READY.format(seconds=seconds, model=setup.model, url=setup.url)]
    if keyed:
        parts.append(WITH_KEY.format(table=setup.keys, variable=KEY))
    parts.append(
        CALLS.format(
            url=setup.url,
            model=setup.model,
            question=QUESTION,
            header=f'\n  -H "Authorization: Bearer ${KEY}" \\' if keyed else "",
            # With keys the client finds it where it always looks.
            api_key="" if keyed else ', api_key="none"',
        )
    )
    if setup.grpc is not None:
        prefix = f'{ENV_KEY}="${KEY}" ' if keyed else ""
        parts.append(CALLS_GRPC.format(prefix=prefix, port=setup.grpc, question=QUESTION))
        if setup.is_small:
            parts.append(PRESSURE.format(prefix=prefix, port=setup.grpc))
    parts.append(RUNNING.format(url=setup.url, log=log))
    return "".join(parts)
