"""A head that is killed and started anew, as ``k8s/components/ha-rocksdb`` and ``mtls`` have it.

The control store is a RocksDB in a folder that stays; nodes speak mutual TLS and ask for Ray's
token. What runs elsewhere runs on meanwhile, and the new head knows it. Two nodes on one machine,
which share its address: no pods, and no Ray Serve.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.util import get_node_ip_address

from tools.bench.local_cluster import free_port
from tools.kubernetes.build import Manifests, build
from tools.kubernetes.layout import K8S

pytestmark = [pytest.mark.cluster, pytest.mark.complete, pytest.mark.timeout(400)]

HOST = get_node_ip_address()  # Ray doesn't stay with the loopback address
START_S = 120.0
# On the worker: an actor, and one that calls it all the time and keeps when it was answered.
ACTORS = """
import json, os, sys, threading, time
import ray

ray.init(address=sys.argv[1], namespace="test", log_to_driver=False)

@ray.remote(num_cpus=0, resources={"engine": 0.1})
class Engine:
    def step(self):
        return os.getpid()

@ray.remote(num_cpus=0, resources={"engine": 0.1})
class Client:
    def __init__(self, engine):
        self.engine, self.answered = engine, []
        self.pid = ray.get(engine.step.remote())
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            self.pid = ray.get(self.engine.step.remote())
            self.answered.append(time.time())
            time.sleep(0.02)

    def told(self):
        return {"answered": self.answered, "engine": self.pid}
"""
START = """
engine = Engine.options(name="engine", lifetime="detached").remote()
client = Client.options(name="client", lifetime="detached").remote(engine)
print(json.dumps(ray.get(client.told.remote())))
"""
ASK = """
print(json.dumps(ray.get(ray.get_actor("client").told.remote(), timeout=60)))
"""


def settings(overlay: str) -> dict[str, str]:
    """Variables that an overlay gives its head, without those of other software."""
    container = Manifests(build(K8S / "overlays" / overlay)).pod("head").spec["containers"][0]
    return {
        variable["name"]: variable["value"]
        for variable in container["env"]
        if variable["name"].startswith("RAY_")
    }


class Cluster:
    """A head and a worker, as two nodes of one cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"{HOST}:{free_port()}"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        certificate, key = folder / "tls.crt", folder / "tls.key"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
                *("-subj", "/CN=ray", "-addext", f"subjectAltName=IP:{HOST},IP:127.0.0.1"),
                *("-keyout", str(key), "-out", str(certificate)),
            ],
            check=True,
            capture_output=True,
        )
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environ |= settings("ha-rocksdb")
        # KubeRay sets these, for `authOptions` and `tlsOptions`.
        self.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environ |= {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(certificate),
            "RAY_TLS_SERVER_KEY": str(key),
            "RAY_TLS_CA_CERT": str(certificate),
        }

    def start(self, name: str, *options: str, **environ: str) -> None:
        """Start a node and wait until it has joined."""
        log = self.folder / f"{name}.log"
        self.nodes[name] = subprocess.Popen(
            ["ray", "start", "--node-ip-address", HOST, "--block", *options],
            env=self.environ | environ,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + START_S
        joined = log.read_text().count("Ray runtime started")
        while log.read_text().count("Ray runtime started") == joined:
            assert self.nodes[name].poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def start_head(self) -> None:
        """Start a head over the store that is there. All else is new to it, as to a new pod."""
        self.start(
            "head",
            *("--head", "--port", self.address.rpartition(":")[2], "--num-cpus", "0"),
            *("--include-dashboard", "false", "--temp-dir", tempfile.mkdtemp(dir=self.folder)),
            RAY_gcs_storage="rocksdb",
            RAY_gcs_storage_path=str(self.folder / "gcs"),
        )

    def kill(self, name: str) -> None:
        """Kill all processes of a node at once."""
        process = self.nodes.pop(name)
        first = psutil.Process(process.pid)
        everyone = [first, *first.children(recursive=True)]
        for victim in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(everyone, timeout=60)
        assert not alive

    def run(self, script: str) -> dict[str, Any]:
        """Run a driver; what it prints last."""
        done = subprocess.run(
            [sys.executable, "-c", ACTORS + script, self.address],
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_S,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as folder:  # short: Unix sockets
        cluster = Cluster(Path(folder))
        try:
            yield cluster
        finally:
            for name in list(cluster.nodes):
                cluster.kill(name)


def test_what_runs_goes_on_while_the_head_restarts(cluster: Cluster) -> None:
    cluster.start_head()
    cluster.start("worker", "--address", cluster.address, "--resources", '{"engine": 1}')
    before = cluster.run(START)
    cluster.kill("head")
    killed = time.time()
    time.sleep(5.0)
    again = time.time()
    cluster.start_head()
    after = cluster.run(ASK)
    assert after["engine"] == before["engine"], "the same process"
    assert sum(killed < when < again for when in after["answered"]) > 20, "with no head at all"
