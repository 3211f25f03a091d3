"""Two workers that share a model, through the whole stack; and what happens when one of them dies.

One server for all tests, in the order of its life. The model is SmolLM2 with heads added so that
two ranks divide them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import psutil
import pytest
import ray

from tests.cluster.support.faults import PROMPT, Old, Record, Stream, recover
from tests.cluster.support.loose import LOOSE
from tests.cluster.support.monitoring import wait_for
from tests.machine import DTYPE
from tools.bench.local_cluster import (
    Server,
    cluster_file,
    kill,
    memshare_in,
    processes,
    running_server,
    stop,
    victims,
)

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.engine,
    pytest.mark.complete,
]

BLOCKS = 200
STORY = {
    "model": "smollm2", "prompt": PROMPT, "temperature": 0,
    "ignore_eos": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    document = cluster_file()
    args = document["applications"][0]["args"]
    args["model"] = "smollm2-135m-tp2"
    args["engine"].update(tensor_parallel_size=2, num_gpu_blocks_override=BLOCKS, dtype=DTYPE)
    args["replica"]["env"]["VLLM_LOGGING_LEVEL"] = "INFO"  # a test reads what vLLM counted
    memshare = memshare_in(document)
    memshare.update(LOOSE)
    memshare["integrity"] = {"check_every": 8}
    with running_server(tmp_path_factory.mktemp("serve"), document) as server:
        yield server


def complete(server: Server, tokens: int) -> str:
    answer = httpx.post(
        f"{server.url}/v1/completions", json={**STORY, "max_tokens": tokens}, timeout=300
    )
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_both_ranks_serve(server: Server) -> None:
    assert len(victims("worker")) == 2
    assert len(complete(server, 12).split()) > 3


def test_blocks_are_as_check_says(server: Server) -> None:
    """What ``memshare check`` counts for one of two ranks is what vLLM has, without an override."""
    line = r"Overriding num_gpu_blocks=(\d+) with"
    # Ray brings an engine's lines to the log in its own time.
    (found,) = wait_for("its number", lambda: set(re.findall(line, server.log.read_text())))
    # 4 KV heads on 2 ranks: 30 layers x 2 heads x 64 channels x K and V x 4 bytes x 32 tokens.
    assert int(found) == (1 << 30) // (30 * 2 * 64 * 2 * 4 * 32)
    (config,) = re.findall(r"vllm:cache_config_info{(.*?)}", server.metrics())
    assert f'num_gpu_blocks="{BLOCKS}"' in config


def share_something(server: Server) -> None:
    """Write until blocks have been reclaimed; two ranks that spin on one core are slow."""
    before = server.metric("vllm:memshare_blocks_reclaimed_total")
    for _ in range(6):
        complete(server, 160)
        if server.metric("vllm:memshare_blocks_reclaimed_total") > before:
            return
    raise AssertionError("nothing is shared")


def test_blocks_are_shared_and_every_rank_agrees(server: Server) -> None:
    share_something(server)
    checks = server.metrics()
    assert re.search(r'memshare_integrity_checks_total{.*result="passed".*} [1-9]', checks)
    assert 'result="failed"' not in checks
    assert server.metric("vllm:memshare_remap_misses_total") == 0


def test_a_killed_worker_takes_its_engine_along_and_all_is_replaced(
    server: Server, record_property: Record
) -> None:
    old = Old.of("engine", "worker", "replica")
    stream = Stream(server)
    killed = kill("worker")
    assert stream.is_told_of_its_end()
    recover(server, killed, record_property)
    old.assert_gone()
    share_something(server)  # with a new pool of histories, on new ranks


def test_shutdown_leaves_nothing_behind(server: Server) -> None:
    began = psutil.Process(server.process.pid).create_time()  # evaluators of others are older
    everybody = processes("VLLM::", "ray::ServeReplica", "ray::Evaluator")
    ours = [process for process in everybody if process.create_time() >= began]
    assert len(ours) >= 4
    old = Old.of("engine", "worker", "replica")
    port = int(server.url.rpartition(":")[2])
    stop(server)
    _, alive = psutil.wait_procs(ours, timeout=90)
    assert alive == []
    old.assert_gone()
    assert port not in {c.laddr.port for c in psutil.net_connections() if c.status == "LISTEN"}
    named = ray.util.list_named_actors(all_namespaces=True)
    assert [actor for actor in named if actor["namespace"] == "memshare"] == []
