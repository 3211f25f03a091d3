"""Serve on this machine: start ``serve run``, wait until it answers, print how to call it.

    python tools/serve_local.py configs/cluster.yaml

Stays in the foreground; Ctrl-C or SIGTERM shuts the cluster down cleanly. Exits with status 1, and
the end of the log, if the server dies or is not healthy in time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import yaml
from runtime_env import runtime_env
from serve_log import ServeLog

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / ".run" / "serve.log"
TAIL_LINES = 60
# Ray tries a replica that failed to start again; what failed twice will fail a third time.
REPLICA_ATTEMPTS = 2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ray closes replicas, proxies and its own processes one after the other.
SHUTDOWN_SECONDS = 90.0

# Flush left, so that the calls can be pasted as they are. Temperature 0: so small a model wanders.
READY = """
Ready after {seconds:.0f} s: {model} at {url}

Ask with curl:

curl {url}/v1/chat/completions \\
  -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "max_tokens": 200, "temperature": 0,
       "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

Ask from Python, streamed:

{python} - <<'END'
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="none")
stream = client.chat.completions.create(
    model="{model}", max_tokens=200, temperature=0, stream=True,
    messages=[{{"role": "user", "content": "What is the capital of France?"}}])
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
END
"""
READY_GRPC = """
Ask over gRPC, and see what it cost in KV memory:

{memshare} chat --address 127.0.0.1:{port} --temperature 0 "What is the capital of France?"
"""
RUNNING = """
Page: {url}/memshare/     Metrics: {url}/metrics     Log: {log}
Ctrl-C stops the cluster.
"""


class ServeError(Exception):
    """The server cannot run. The text says why."""


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """A signal asked us to stop."""


class Ports(NamedTuple):
    """Where a cluster answers locally."""

    http: int
    grpc: int | None

    @property
    def url(self) -> str:
        """Of the HTTP API."""
        return f"http://127.0.0.1:{self.http}"


def read_ports(config: Path) -> Ports:
    """Return the ports that this Serve configuration opens.

    Raises:
        ServeError: the file is missing or is no Serve configuration.
    """
    try:
        document = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ServeError(f"cannot read {config}: {error}") from error
    if not isinstance(document, dict) or "applications" not in document:
        raise ServeError(f"{config} is not a Ray Serve configuration: it has no `applications`")
    grpc_options = document.get("grpc_options") or {}
    return Ports(
        http=(document.get("http_options") or {}).get("port", 8000),
        grpc=grpc_options.get("port", 9000)
        if grpc_options.get("grpc_servicer_functions")
        else None,
    )


def require_free_port(port: int, section: str) -> None:
    """Refuse to start where somebody else answers: we would take their health for ours.

    Raises:
        ServeError: the port is in use.
    """
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ServeError(
                f"port {port} is in use by another program; stop it, or set another port in "
                f"`{section}` of the configuration"
            )


def fetch(url: str) -> bytes | None:
    """Return the body of a 200 answer, or None for anything else (not up yet)."""
    # Only loopback is asked: no proxy from the environment may stand in between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url)
    if key := os.environ.get("OPENAI_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        # While no replica is ready, Serve holds the request back: a short timeout would only fill
        # the log with cancelled requests.
        with opener.open(request, timeout=30.0) as answer:
            body: bytes = answer.read()
            return body if answer.status == 200 else None
    except (urllib.error.URLError, OSError):
        return None


def served_model(url: str) -> str:
    """Return the id of the first model the server lists; a placeholder if it lists none to us."""
    body = fetch(f"{url}/v1/models")
    if body is None:
        return "MODEL"
    return str(json.loads(body)["data"][0]["id"])


def start(config: Path) -> subprocess.Popen[bytes]:
    """Start ``serve run`` with its output in the log file; return the process."""
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("wb") as log:
        return subprocess.Popen(
            ["serve", "run", str(config)],
            cwd=ROOT,
            env=runtime_env(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A group of its own: Ctrl-C reaches only us, and we pass it on once.
            start_new_session=True,
        )


def watch_health(url: str) -> threading.Event:
    """Poll ``/health`` in the background; return an event that is set by its first 200."""
    healthy = threading.Event()

    def poll() -> None:
        while fetch(f"{url}/health") is None:
            time.sleep(1.0)
        healthy.set()

    threading.Thread(target=poll, name="health", daemon=True).start()
    return healthy


def wait_until_healthy(child: subprocess.Popen[bytes], url: str, minutes: float) -> float:
    """Wait for ``/health`` and show progress; return the seconds it took.

    Raises:
        ServeError: the child ended, a replica cannot start, or the time is up.
    """
    started = time.monotonic()
    progress = Progress()
    log = ServeLog(LOG)
    told_failures = 0
    healthy = watch_health(url)
    while not healthy.wait(0.5):
        seconds = time.monotonic() - started
        progress.show(seconds)
        log.read_on()
        if child.poll() is not None:
            raise ServeError(f"the server ended during start-up (exit {child.returncode})")
        if log.build_failed:
            raise ServeError(f"the application cannot be built: {log.reason}")
        if log.replica_failures >= REPLICA_ATTEMPTS:
            raise ServeError(f"a replica cannot start: {log.reason}")
        if log.replica_failures > told_failures:
            told_failures = log.replica_failures
            progress.say(f"a replica failed to start, Ray tries again (see {relative(LOG)})")
        if seconds > 60 * minutes:
            raise ServeError(f"the server was not healthy within {minutes:g} minutes")
    progress.clear()
    return time.monotonic() - started


class Progress:
    """The time that has passed: one changing line on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._next_line = 10.0

    def show(self, seconds: float) -> None:
        """Show that the start has taken ``seconds``."""
        if self._terminal:
            hint = "about a minute; the very first start takes longer"
            print(f"\r[serve] starting: {seconds:.0f} s ({hint})", end="", flush=True)
        elif seconds >= self._next_line:
            self._next_line = seconds + 10.0
            print(f"[serve] starting: {seconds:.0f} s", flush=True)

    def clear(self) -> None:
        """Remove the changing line."""
        if self._terminal:
            print("\r\033[K", end="", flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.clear()
        print(f"[serve] {text}", flush=True)


def relative(path: Path) -> Path:
    """Return ``path`` as seen from the top folder of the project."""
    return path.relative_to(ROOT)


def stop(child: subprocess.Popen[bytes]) -> None:
    """End the cluster: politely, then with force. Returns when the child is gone."""
    if child.poll() is None:
        print("\n[serve] shutting down ...", flush=True)
        # `serve run` removes its applications on an interrupt, not on SIGTERM.
        child.send_signal(signal.SIGINT)
        try:
            child.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"[serve] not gone after {SHUTDOWN_SECONDS:.0f} s: killing it", flush=True)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    print("[serve] stopped", flush=True)


def raise_stopped(signum: int, frame: FrameType | None) -> None:
    """Turn the first signal into an exception; ignore the following ones, the shutdown runs."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def serve(config: Path, minutes: float) -> None:
    """Run the cluster until the user stops it.

    Raises:
        ServeError: it cannot start, or it ended by itself.
    """
    LOG.unlink(missing_ok=True)  # so that an error before the start shows no older log
    ports = read_ports(config)
    require_free_port(ports.http, "http_options")
    if ports.grpc is not None:
        require_free_port(ports.grpc, "grpc_options")
    url = ports.url
    for number in STOP_SIGNALS:
        signal.signal(number, raise_stopped)
    print(f"[serve] serve run {config}   (log: {relative(LOG)})", flush=True)
    child = None
    try:
        child = start(config)
        seconds = wait_until_healthy(child, url, minutes)
        ready = READY.format(
            seconds=seconds,
            model=served_model(url),
            url=url,
            python=".venv/bin/python",
        )
        if ports.grpc is not None:
            ready += READY_GRPC.format(memshare=".venv/bin/memshare", port=ports.grpc)
        print(ready + RUNNING.format(url=url, log=relative(LOG)), flush=True)
        status = child.wait()
        raise ServeError(f"the server ended by itself (exit {status})")
    except Stopped:
        pass  # what the user asked for; the shutdown below is all that is left to do
    finally:
        if child is not None:
            stop(child)


def main() -> int:
    """Parse the command line and serve; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/cluster.yaml"))
    parser.add_argument("--minutes", type=float, default=15.0, help="time to become healthy")
    args = parser.parse_args()
    try:
        serve(args.config, args.minutes)
    except ServeError as error:
        if LOG.exists():
            print(
                f"\n----- end of {relative(LOG)} -----\n{ServeLog(LOG).tail(TAIL_LINES)}",
                file=sys.stderr,
            )
        print(f"\n[serve] ERROR: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
