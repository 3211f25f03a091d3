"""A cluster on this machine, as ``serve run`` starts it: for tests, soak runs and benchmarks.

Processes are found among this process's descendants, so that clusters of other people on the same
machine are left alone. The roles are those of ``docs/faults.md``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import yaml

from memshare.client import Client
from tools.runtime_env import DEFAULTS

if TYPE_CHECKING:
    import openai
    from ray.serve.schema import ReplicaState

ROOT = Path(__file__).resolve().parents[2]
START_S = 600.0  # until the model answers; machines that run tests are busy
# For Ray's own processes and for everything that they start.
_ENVIRONMENT = {"PYTHONPATH": str(ROOT)} | {
    name: DEFAULTS[name]
    for name in (
        "RAY_memory_monitor_refresh_ms", "RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE",
        "RAY_SERVE_PROXY_USE_GRPC", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
        "VLLM_NO_USAGE_STATS", "OMP_NUM_THREADS",
    )
}  # fmt: skip
ROLES = {
    "evaluator": "ray::Evaluator",
    "engine": "VLLM::EngineCore",
    "worker": "VLLM::Worker",
    "replica": "ray::ServeReplica:memshare:Engine",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}
"""What can be killed: role to the beginning of its process's title."""


@dataclass
class Server:
    """A running ``serve run``."""

    process: subprocess.Popen[bytes]
    url: str
    grpc_address: str
    log: Path
    started_s: float = 0.0

    @property
    def client(self) -> openai.OpenAI:
        """A client that tries once."""
        import openai  # a second of CPU, for which unit tests have no use

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def grpc_client(self, **options: Any) -> Client:
        """A client of the gRPC interface."""
        return Client(self.grpc_address, **options)

    def metrics(self) -> str:
        """What ``/metrics`` says."""
        return httpx.get(f"{self.url}/metrics", timeout=60).text

    def metric(self, name: str) -> float:
        """Sum of a metric's series."""
        lines = self.metrics().splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")]
        assert values, f"{name} is not on /metrics"
        return sum(values)

    def completes(self) -> bool:
        """Whether a request succeeds now."""
        import openai

        try:
            answer = self.client.completions.create(model="smollm2", prompt="Hello", max_tokens=1)
        except openai.APIError:
            return False
        return len(answer.choices) == 1

    def wait_until_it_answers(self) -> float:
        """Returns how long it took, in seconds."""
        began = time.monotonic()
        while time.monotonic() - began < START_S:
            try:
                answer = httpx.get(f"{self.url}/v1/models", timeout=30)
                if answer.status_code == 200:
                    return time.monotonic() - began
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.2)
        raise AssertionError(f"no answer in {START_S} s:\n{self.log.read_text()[-4000:]}")

    def wait_until_idle(self, timeout_s: float) -> None:
        """Wait until no request runs; fails after ``timeout_s`` seconds."""
        end = time.monotonic() + timeout_s
        while self.metric("vllm:num_requests_running") > 0:
            assert time.monotonic() < end, "a request runs on for nobody"
            time.sleep(0.1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(folder: Path, document: dict[str, Any]) -> Server:
    """Start ``serve run``; returns at once."""
    port = document["http_options"]["port"] = free_port()
    grpc_port = document["grpc_options"]["port"] = free_port()
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(document))
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            # As from a terminal: a shell's background jobs, and what they start, ignore Ctrl-C.
            ["env", "--default-signal=INT", "serve", "run", str(file)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in our terminal is ours: `stop` tells the server
        )
    return Server(process, f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", log)


def stop(server: Server) -> None:
    """Ctrl-C, and again if nothing happens: one was seen to be lost while Ray was printing."""
    try:
        for _ in range(4):
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(timeout=30)
                return
        raise AssertionError(f"does not stop:\n{server.log.read_text()[-4000:]}")
    finally:
        server.process.kill()
        _forget_controller()


@contextlib.contextmanager
def running_server(folder: Path, document: dict[str, Any]) -> Iterator[Server]:
    """A server that answers; it is stopped at the end, also if it never does."""
    server = start(folder, document)
    try:
        server.started_s = server.wait_until_it_answers()
        print(f"\nstarted in {server.started_s:.1f} s", flush=True)
        yield server
    finally:
        stop(server)


def _forget_controller() -> None:
    """Ray Serve remembers in this process the controller that has just ended: the next server has
    another one."""
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()


def cluster_file(name: str = "cluster.yaml") -> dict[str, Any]:
    """A file of ``configs/``, to be changed at will."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / name).read_text())
    return document


def memshare_in(document: dict[str, Any]) -> dict[str, Any]:
    """MemShare's section of a cluster file."""
    section: dict[str, Any] = document["applications"][0]["args"]["memshare"]
    return section


def processes(*titles: str) -> list[psutil.Process]:
    """Descendants of this process (Ray is one) whose title starts with one of ``titles``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(titles):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextlib.contextmanager
def local_ray() -> Iterator[str]:
    """A fresh Ray cluster, which this process is connected to; yields its address."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    os.environ.update(_ENVIRONMENT)
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    folder = tempfile.mkdtemp(prefix="memshare-", dir="/tmp")  # short: it holds Unix sockets
    ray.init(
        num_cpus=8,  # as bookkeeping; the machine may have fewer
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    address: str = ray.get_runtime_context().gcs_address
    os.environ["RAY_ADDRESS"] = address
    try:
        yield address
    finally:
        ray.shutdown()
        del os.environ["RAY_ADDRESS"]
        shutil.rmtree(folder, ignore_errors=True)


def staff() -> dict[str, list[psutil.Process]]:
    """The processes that play each role of :data:`ROLES` now."""
    found: dict[str, list[psutil.Process]] = {role: [] for role in ROLES}
    for process in processes(*ROLES.values()):
        with contextlib.suppress(psutil.Error, IndexError):
            title = process.cmdline()[0]
            for role, beginning in ROLES.items():
                if title.startswith(beginning):
                    found[role].append(process)
    return found


def victims(role: str) -> list[psutil.Process]:
    """The processes that play one role now."""
    return staff()[role]


@dataclass(frozen=True)
class Killed:
    """A fault, and what was there before.

    Attributes:
        role: of the process that was killed.
        pid: its id.
        at: when, by ``time.monotonic``.
        before: how many processes played each role.
    """

    role: str
    pid: int
    at: float
    before: dict[str, int]


def kill(role: str) -> Killed:
    """Kill the first process of a role by SIGKILL, as a crash or the kernel would."""
    found = staff()
    victim = found[role][0]
    before = {name: len(those) for name, those in found.items()}
    at = time.monotonic()
    victim.kill()
    return Killed(role, victim.pid, at, before)


def wait_until_whole(server: Server, killed: Killed, timeout_s: float = START_S) -> float:
    """Wait until everything is back that was there before; returns seconds since the fault.

    Whole means as many processes of every role as before without the killed one, all replicas
    running by Ray Serve's own account, and an answered request. This process must be connected to
    the same Ray cluster.
    """
    end = killed.at + timeout_s
    while not (_is_staffed(killed) and _all_running(killed) and server.completes()):
        assert time.monotonic() < end, f"not whole {timeout_s} s after a {killed.role} was killed"
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        time.sleep(0.3)
    return time.monotonic() - killed.at


def _is_staffed(killed: Killed) -> bool:
    found = staff()
    if any(process.pid == killed.pid for process in found[killed.role]):
        return False
    return {role: len(those) for role, those in found.items()} == killed.before


def _all_running(killed: Killed) -> bool:
    from ray.serve.schema import ReplicaState

    return replica_states() == {ReplicaState.RUNNING: killed.before["replica"]}


def replica_states() -> dict[ReplicaState, int]:
    """How many of our replicas are in each state, by Ray Serve's own account."""
    from ray import serve

    return serve.status().applications["memshare"].deployments["Engine"].replica_states
