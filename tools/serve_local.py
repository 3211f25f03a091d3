"""Serve on this machine: start the cluster, wait until it answers, print how to call it.

    python tools/serve_local.py configs/cluster.yaml

Stays in the foreground. Ctrl-C or SIGTERM shuts the cluster down: what is under way may finish, new
requests are refused; a second one ends it at once. Exits with status 1, and the end of the log, if
the server dies or is not healthy in time.
"""

from __future__ import annotations

import argparse
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

from runtime_env import runtime_env
from serving.log import ServeLog
from serving.setup import KEY, ServeError, greeting, read_setup

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / ".run" / "serve.log"
TAIL_LINES = 60
# Ray tries a replica that failed to start again; what failed twice will fail a third time.
REPLICA_ATTEMPTS = 2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ray closes replicas, proxies and its own processes one after the other.
SHUTDOWN_SECONDS = 90.0


class ServerFailedError(ServeError):
    """The server was started, and ended or cannot become healthy: its log says more."""


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """A signal asked us to stop."""


def require_free_port(port: int, section: str) -> None:
    """Refuse to start where somebody else answers: we would take their health for ours.

    Raises:
        ServeError: the port is in use.
    """
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ServeError(
                f"port {port} is in use by another program, perhaps another `make serve`; stop it, "
                f"or set another port in `{section}` of the configuration"
            )


def fetch(url: str) -> bytes | None:
    """Return the body of a 200 answer, or None for anything else (not up yet)."""
    # Only loopback is asked: no proxy from the environment may stand in between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url)
    if key := os.environ.get(KEY):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        # While no replica is ready, Serve holds the request back, and writes "Client ...
        # disconnected" for each that is given up: wait as long as a start usually takes.
        with opener.open(request, timeout=300.0) as answer:
            body: bytes = answer.read()
            return body if answer.status == 200 else None
    except (urllib.error.URLError, OSError):
        return None


def start(config: Path) -> subprocess.Popen[bytes]:
    """Start the cluster with its output in the log file; return the process."""
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.run", str(config)],
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
        ServerFailedError: the child ended, a replica cannot start, or the time is up.
    """
    started = time.monotonic()
    progress = StartProgress()
    log = ServeLog(LOG)
    told_failures = 0
    healthy = watch_health(url)
    while not healthy.wait(0.5):
        seconds = time.monotonic() - started
        progress.show(seconds)
        log.read_on()
        if child.poll() is not None:
            raise ServerFailedError(f"the server ended during start-up (exit {child.returncode})")
        if log.build_failed:
            raise ServerFailedError(f"the application cannot be built: {log.reason}")
        if log.replica_failures >= REPLICA_ATTEMPTS:
            raise ServerFailedError(f"a replica cannot start: {log.reason}")
        if log.replica_failures > told_failures:
            told_failures = log.replica_failures
            progress.say(f"a replica failed to start, Ray tries again (see {relative(LOG)})")
        if seconds > 60 * minutes:
            raise ServerFailedError(f"the server was not healthy within {minutes:g} minutes")
    progress.clear()
    return time.monotonic() - started


class StartProgress:
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


def stop(child: subprocess.Popen[bytes], grace: float) -> None:
    """End the cluster: politely, then with force. Returns when the child is gone.

    Args:
        child: the process to end.
        grace: seconds that running requests have to finish. A further signal cuts that short.
    """

    def hurry(signum: int, frame: FrameType | None) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        child.send_signal(signal.SIGINT)

    if child.poll() is None:
        print(
            f"\n[serve] shutting down; running requests have {grace:.0f} s to finish, Ctrl-C ends "
            "them now",
            flush=True,
        )
        for number in STOP_SIGNALS:
            signal.signal(number, hurry)
        child.send_signal(signal.SIGINT)
        try:
            child.wait(grace + SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            print("[serve] not gone in time: killing it", flush=True)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    print("[serve] stopped", flush=True)


def raise_stopped(signum: int, frame: FrameType | None) -> None:
    """Turn the first signal into an exception; until :func:`stop` runs, no other is heard."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def serve(config: Path, minutes: float) -> None:
    """Run the cluster until the user stops it.

    Raises:
        ServeError: nothing was started, because the file is wrong or a port is in use.
        ServerFailedError: it cannot start, or it ended by itself.
    """
    setup = read_setup(config)
    require_free_port(setup.http, "http_options")
    if setup.grpc is not None:
        require_free_port(setup.grpc, "grpc_options")
    for number in STOP_SIGNALS:
        signal.signal(number, raise_stopped)
    print(f"[serve] starting {config}   (log: {relative(LOG)})", flush=True)
    child = None
    try:
        child = start(config)
        seconds = wait_until_healthy(child, setup.url, minutes)
        print(greeting(setup, seconds, relative(LOG)), flush=True)
        status = child.wait()
        raise ServerFailedError(f"the server ended by itself (exit {status})")
    except Stopped:
        pass  # what the user asked for; the shutdown below is all that is left to do
    finally:
        if child is not None:
            stop(child, setup.grace)


def main() -> int:
    """Parse the command line and serve; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/cluster.yaml"))
    parser.add_argument("--minutes", type=float, default=15.0, help="time to become healthy")
    args = parser.parse_args()
    try:
        serve(args.config, args.minutes)
    except ServeError as error:
        # Before anything was started the log is an older one's, or that of a server that runs.
        if isinstance(error, ServerFailedError):
            print(
                f"\n----- end of {relative(LOG)} -----\n{ServeLog(LOG).tail(TAIL_LINES)}",
                file=sys.stderr,
            )
        print(f"\n[serve] ERROR: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
