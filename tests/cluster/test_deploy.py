"""The cpu-demo overlay's own ``serveConfigV2``, deployed by ``serve deploy`` as KubeRay does.

Not in a pod, but as in one: an unprivileged user, a read-only file system, Ray's token. One
cluster, one engine for all tests.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from vllm.utils.network_utils import get_open_port

from memshare.client import Client, NotAllowedError, Sampling
from memshare.small_model.names import prepare_model
from memshare.telemetry.metrics import GAUGES
from tools.confine import USER
from tools.kubernetes.build import Manifests, build
from tools.kubernetes.dashboards import AGENTS, GUARD, ROWS
from tools.kubernetes.layout import IMAGE_MODELS, K8S, KEY_TABLE, ROOT
from tools.runtime_env import runtime_env

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.complete,
    pytest.mark.engine,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "mount"))),
        reason="only root can become another user on a read-only file system",
    ),
]

START_S = 600.0
CPU_DEMO = K8S / "overlays" / "cpu-demo"
DEMO_KEY = "msk_demo-key-that-everybody-knows"  # docs/kubernetes.md says so, too


@dataclass
class Node:
    """One Ray node, confined; head and worker in one, to spare the machine."""

    process: subprocess.Popen[bytes]
    log: Path
    ports: dict[str, int]
    token: str = field(repr=False)

    def url(self, port: str, path: str = "") -> str:
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    def serve(self, *command: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """Ray Serve's command line from outside, as an operator would use it."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        if token is not None:
            environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        return subprocess.run(
            ["serve", *command, "--address", self.url("dashboard")],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def status(self) -> str:
        """The application's status, asked for as KubeRay's operator does."""
        answer = httpx.get(
            self.url("dashboard", "/api/serve/applications/"),
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=60,
        )
        answer.raise_for_status()
        for application in answer.json()["applications"].values():  # at first there is none
            assert application["status"] != "DEPLOY_FAILED", _why(application)
            return str(application["status"])
        return "NOT_STARTED"

    def chat(self, key: str | None) -> httpx.Response:
        """One short answer."""
        return httpx.post(
            self.url("http", "/v1/chat/completions"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            json={
                "model": "smollm2",
                "max_tokens": 8,
                "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
            },
            timeout=300,
        )

    def tail(self) -> str:
        return self.log.read_text()[-4000:]

    def wait_for(self, url: str) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.tail()
            try:
                if httpx.get(url, timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"{url} does not answer:\n{self.tail()}")

    def processes(self) -> list[psutil.Process]:
        """Everything that runs as the confined user."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                process.cmdline()
                found.append(process)
            except psutil.Error:
                continue
        return found


def _why(application: dict[str, Any]) -> str:
    """What Ray Serve says of an application, and last of the deployment that failed."""
    deployments = application["deployments"].values()
    failed = [each["message"] for each in deployments if each["status"] != "HEALTHY"]
    return "\n".join([application["message"], *failed])


def serve_config(ports: dict[str, int]) -> dict[str, Any]:
    """What the overlay gives KubeRay, on ports that are free here."""
    config = Manifests(build(CPU_DEMO)).serve_config
    config["http_options"]["port"] = ports["http"]
    config["grpc_options"]["port"] = ports["grpc"]
    return config


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    log = tmp_path_factory.mktemp("pod") / "ray.log"
    names = ("gcs", "client", "dashboard", "agent", "metrics", "http", "grpc")
    ports = {name: get_open_port() for name in names}
    token = secrets.token_hex(32)
    command = [
        *("--mount", f"{prepare_model()}:{IMAGE_MODELS}/smollm2-135m"),
        *("--mount", f"{CPU_DEMO / 'keys.yaml'}:{KEY_TABLE}"),
        "--",
        *("ray", "start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--port", str(ports["gcs"])),
        *("--ray-client-server-port", str(ports["client"])),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports["dashboard"])),
        *("--dashboard-agent-listen-port", str(ports["agent"])),
        *("--metrics-export-port", str(ports["metrics"])),
    ]
    # As in a pod, nothing of who starts it: engines of other tests leave much in this environment.
    bare = runtime_env({"PATH": os.environ["PATH"]})
    environ = {k: v for k, v in bare.items() if not k.startswith("RAY_")} | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_niceness": "0",
        "HF_HUB_OFFLINE": "1",
    }

    scratches: list[Path] = []

    def launch() -> subprocess.Popen[bytes]:
        scratches.append(Path(tempfile.mkdtemp(prefix="ms-", dir="/tmp")))  # short: Unix sockets
        confine = [sys.executable, str(ROOT / "tools/confine.py"), "--scratch", str(scratches[-1])]
        with log.open("ab") as output:
            return subprocess.Popen(
                confine + command, env=environ, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    node = Node(launch(), log, ports, token)
    # The start-up and liveness probe of every pod; it needs no token.
    probe = node.url("agent", "/api/healthz")
    try:
        try:
            node.wait_for(probe)
        except AssertionError:
            # Ray gives a node 30 s, whatever else the machine does. A pod that ends starts again.
            if node.process.poll() is None:
                raise
            node.process = launch()
            node.wait_for(probe)
        yield node
    finally:
        process = node.process
        everything = node.processes() if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        _, alive = psutil.wait_procs(everything, timeout=20)
        for left in alive:
            left.kill()
        for scratch in scratches:
            shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def served(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Node:
    """The node after ``serve deploy``, when its readiness probe answers and the model is loaded."""
    file = tmp_path_factory.mktemp("config") / "serve.yaml"
    file.write_text(yaml.safe_dump(serve_config(node.ports)))
    done = node.serve("deploy", str(file), token=node.token)
    assert done.returncode == 0, done.stderr
    began = time.monotonic()
    while (status := node.status()) != "RUNNING":
        assert time.monotonic() - began < START_S, f"{status}\n{node.tail()}"
        time.sleep(1)
    print(f"\nrunning {time.monotonic() - began:.1f} s after `serve deploy`")
    node.wait_for(node.url("http", "/-/healthz"))  # the readiness probe of an engine
    return node


def test_without_the_token_nobody_gives_orders(node: Node) -> None:
    done = node.serve("status")
    assert done.returncode != 0
    assert "401" in done.stderr or "token" in done.stderr, done.stderr
    assert httpx.get(node.url("dashboard", "/api/serve/applications/")).status_code == 401
    assert node.serve("status", token=secrets.token_hex(32)).returncode != 0


def test_it_answers_over_http_to_those_with_a_key(served: Node) -> None:
    answer = served.chat(DEMO_KEY)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
    assert served.chat(None).status_code == 401
    assert served.chat(f"{DEMO_KEY}!").status_code == 401
    # Ray's token is no key, and a key no token.
    assert served.chat(served.token).status_code == 401
    assert served.serve("status", token=DEMO_KEY).returncode != 0


def test_it_answers_over_grpc_to_those_with_a_key(served: Node) -> None:
    address = f"127.0.0.1:{served.ports['grpc']}"
    question = [("user", "What is the capital of Japan?")]
    with Client(address, key=DEMO_KEY) as client:
        answer = client.chat(question, Sampling(max_tokens=8, temperature=0), timeout=300)
        assert answer.message.content
        assert 0 < answer.usage.completion_tokens <= 8
    for wrong in (None, served.token):
        with Client(address, key=wrong) as stranger, pytest.raises(NotAllowedError):
            stranger.chat(question, timeout=60)


def test_every_process_is_confined(served: Node) -> None:
    """An engine, its workers, proxies, Ray itself: one user, no way up, nothing to write to."""
    titles = set()
    for process in served.processes():
        try:
            titles.add(process.cmdline()[0].split(":")[0])
            assert set(process.uids()) == {USER}
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert "NoNewPrivs:\t1" in status
            assert "CapBnd:\t0000000000000000" in status
            mounts = Path(f"/proc/{process.pid}/mounts").read_text().splitlines()
        except (psutil.Error, FileNotFoundError):
            continue
        root = next(line.split() for line in mounts if line.split()[1] == "/")
        assert "ro" in root[3].split(","), root
    assert {"VLLM", "ray"} <= titles, titles


def test_dashboards_show_what_a_node_exports(served: Node) -> None:
    """Gauges and histograms are there from the start: all that a dashboard asks for are, but for
    those of adapters, of the guard and of remaps, which this server does not have."""
    asked = {
        series.buckets("ray") if series.kind == "histogram" else series["ray"]
        for row, panels in ROWS.items()
        if row not in (AGENTS, GUARD)
        for panel in panels
        for query in panel.queries
        for series in query.series
        if series.kind == "gauge"
    }
    asked -= {GAUGES[name].ray for name in ("queue_length", "pairs_waiting", "shared_entries")}
    asked.add(GAUGES["holes"].ray)
    exported: set[str] = set()
    end = time.monotonic() + 120  # Ray's agent exports every few seconds
    while True:
        served.chat(DEMO_KEY)  # an idle engine reports nothing anew, and a busy agent may lose some
        text = httpx.get(served.url("metrics", "/metrics"), timeout=30).text
        exported |= {line.split("{")[0] for line in text.splitlines() if not line.startswith("#")}
        if asked <= exported:
            return
        assert time.monotonic() < end, sorted(asked - exported)
        time.sleep(2)
