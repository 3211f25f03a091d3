"""A server that is told to end (tools/serve_local.py, cluster/run.py): a stand-in, real Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from tools.bench.local_cluster import ROOT, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

IN_A_ROW = 12  # refusals after which no replica is taken to serve newcomers


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """What ``make serve`` starts, when it answers, and its URL."""
    port = free_port()
    document = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "memshare",
                "import_path": "tests.cluster.support.stand_in:gated",
                "args": {"model": "none", "replicas": 2},
            }
        ],
    }
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(document))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    process = subprocess.Popen(
        [sys.executable, "tools/serve_local.py", str(file)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C stops" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


def test_sigterm_lets_streams_finish_and_tells_others_to_come_again(
    server: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, url = server
    streams = 4
    begun = threading.Barrier(streams + 1)
    enough, at_once = tmp_path / "enough", Path("/")

    def stream() -> str:
        path = f"{url}/v1/completions?until={enough}"
        with httpx.stream("POST", path, timeout=120) as answer:
            lines = answer.iter_lines()
            words = [next(lines)]
            begun.wait(timeout=60)
            return "\n".join([*words, *lines])

    with ThreadPoolExecutor(streams) as pool:
        running = [pool.submit(stream) for _ in range(streams)]
        begun.wait(timeout=60)
        process.terminate()
        # How soon it closes is the machine's affair, and a replica that was just starting serves
        # until it is told as well. That nobody is served after that, and streams go on, is ours.
        closed = time.monotonic() + 90
        refused: list[httpx.Response] = []
        while len(refused) < IN_A_ROW:
            assert time.monotonic() < closed, "newcomers are still served"
            answers = [
                httpx.post(f"{url}/v1/completions?until={at_once}", timeout=30),
                httpx.get(f"{url}/health", timeout=30),
            ]
            if any(answer.status_code == 200 for answer in answers):
                refused.clear()
            else:
                refused += answers
        assert not any(answer.done() for answer in running), "refused while streams run"
        enough.touch()
        texts = [answer.result(timeout=60) for answer in running]

    assert all(text.endswith("end") for text in texts), "a stream was cut"
    for answer in refused:
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert "try again in" in answer.json()["error"]["message"]
    assert process.wait(timeout=120) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
