"""``serve run configs/cluster.yaml``, a real model and real clients. One server for all tests.

The tests are in the order of the server's life: the last ones kill its engine and shut it down.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
import yaml
from openai.types.chat import ChatCompletionMessageParam
from vllm.utils.network_utils import get_open_port

from cluster.evaluators import actor_name

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

ROOT = Path(__file__).resolve().parents[2]
START_S = 600.0  # until the model answers; machines that run tests are busy
QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Tell me a long story about a lighthouse."}
]


@dataclass
class Server:
    """A running ``serve run``."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def metric(self, name: str) -> float:
        """Sum of a metric's series."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")]
        assert values, f"{name} is not on /metrics"
        return sum(values)

    def completes(self) -> bool:
        """Whether a request succeeds now."""
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
        end = time.monotonic() + timeout_s
        while self.metric("vllm:num_requests_running") > 0:
            assert time.monotonic() < end, "a request runs on for nobody"
            time.sleep(0.1)


def start(folder: Path, document: dict[str, Any]) -> Server:
    """Start ``serve run``; returns at once."""
    port = get_open_port()
    document["http_options"]["port"] = port
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(document))
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["serve", "run", str(file)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    return Server(process, f"http://127.0.0.1:{port}", log)


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


def cluster_file(name: str = "cluster.yaml") -> dict[str, Any]:
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


@pytest.fixture(scope="module")
def server(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    document = cluster_file()
    memshare_in(document).update(memshare_in(cluster_file("demo.yaml")))
    server = start(tmp_path_factory.mktemp("serve"), document)
    try:
        print(f"\nstarted in {server.wait_until_it_answers():.1f} s")
        yield server
    finally:
        stop(server)


@pytest.mark.usefixtures("ray_address")
def test_a_wrong_file_says_what_to_do_before_anything_is_loaded(tmp_path: Path) -> None:
    document = cluster_file()
    document["applications"][0]["args"]["engine"]["max_seqs"] = 8
    server = start(tmp_path, document)
    try:
        end = time.monotonic() + START_S
        while "did you mean 'max_num_seqs'?" not in server.log.read_text():
            assert time.monotonic() < end, server.log.read_text()[-4000:]
            assert processes("VLLM::") == []
            time.sleep(0.2)
    finally:
        stop(server)


def test_chat_whole_and_streamed(server: Server) -> None:
    whole = server.client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=12, temperature=0
    )
    chunks = server.client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=12, temperature=0, stream=True
    )
    streamed = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert "".join(streamed) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in streamed) >= 8, "tokens come one by one"


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_option_of_a_request_is_a_400(server: Server, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            stream=stream,
            extra_body={"vllm_xargs": {"memshare_step_threshold": 3}},
        )
    assert "vllm_xargs.memshare_step_threshold = 3" in str(caught.value)
    assert "0..1" in str(caught.value)


def test_a_right_option_of_a_request_is_taken(server: Server) -> None:
    answer = server.client.completions.create(
        model="smollm2",
        prompt="Hello",
        max_tokens=4,
        extra_body={"vllm_xargs": {"memshare": "off"}},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_metrics_are_on_the_http_port(server: Server) -> None:
    assert server.metric("vllm:generation_tokens_total") > 0
    assert server.metric("vllm:memshare_free_blocks") > 0


def test_a_chat_shows_blocks_found_verified_and_reclaimed(server: Server) -> None:
    client = server.client
    for _ in range(4):
        client.chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            max_tokens=400,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        if server.metric("vllm:memshare_blocks_reclaimed_total"):
            break
    for what in ("candidates", "verified", "applied", "blocks_reclaimed"):
        assert server.metric(f"vllm:memshare_{what}_total") > 0, what


def test_a_client_that_leaves_frees_the_engine(server: Server) -> None:
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 3900, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=3)
    server.wait_until_idle(timeout_s=20)
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as answer:
        for _ in zip(range(6), answer.iter_lines(), strict=False):
            assert answer.status_code == 200
    server.wait_until_idle(timeout_s=20)


def test_requests_go_on_while_evaluators_die_and_come_back(server: Server) -> None:
    gaps: list[float] = []
    failures: list[Exception] = []

    def read() -> None:
        try:
            last = time.monotonic()
            for _ in server.client.completions.create(
                model="smollm2",
                prompt="Step 1: count the apples.\n\nStep 2: count the apples.\n\nStep 3:",
                max_tokens=150,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
        except openai.OpenAIError as error:
            failures.append(error)

    evaluator = ray.get_actor(actor_name(0), "memshare")
    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    time.sleep(2)
    ray.kill(evaluator)  # for good: the pool has to make another
    for reader in readers:
        reader.join()
    assert failures == []
    assert max(gaps) < 10, "no request stalls"
    answered = server.metric("vllm:memshare_evaluator_lag_seconds_count")
    end = time.monotonic() + 120
    while server.metric("vllm:memshare_evaluator_lag_seconds_count") <= answered:
        assert time.monotonic() < end, "stage one does not resume"
        read()
    assert failures == []


def test_a_dead_engine_is_replaced(server: Server, record_property: Any) -> None:
    (engine,) = processes("VLLM::EngineCore")
    replica = engine.parent()
    failed: list[int] = []

    def ask() -> None:
        body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 3900, "ignore_eos": True}
        failed.append(
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300).status_code
        )

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(2)
    workers = engine.children(recursive=True)
    began = time.monotonic()
    engine.kill()
    asking.join()
    assert failed == [500], "requests of a dead engine fail at once"
    assert replica is not None
    replica.wait(timeout=30)
    noticed_s = time.monotonic() - began
    while not server.completes():
        assert time.monotonic() - began < START_S
        time.sleep(0.2)
    recovered_s = time.monotonic() - began
    print(f"\nnoticed in {noticed_s:.1f} s, served again after {recovered_s:.1f} s")
    record_property("noticed_s", noticed_s)
    record_property("recovered_s", recovered_s)
    assert noticed_s < 10
    assert not any(worker.is_running() for worker in workers)
    (again,) = processes("VLLM::EngineCore")
    assert again.pid != engine.pid


def test_shutdown_leaves_nothing_behind(server: Server) -> None:
    evaluator = ray.get_actor(actor_name(0), "memshare")
    pid = ray.get(evaluator.__ray_call__.remote(lambda _: os.getpid()))
    ours = [*processes("VLLM::", "ray::ServeReplica", "/bin/sh"), psutil.Process(pid)]
    titles = {process.cmdline()[0] for process in ours}
    assert {"VLLM::EngineCore", "ray::ServeReplica:memshare:Engine", "/bin/sh"} <= titles
    stop(server)
    assert server.process.returncode == 0
    gone, alive = psutil.wait_procs(ours, timeout=90)
    assert alive == []
    assert len(gone) == len(ours)
