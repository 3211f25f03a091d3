"""Parts of the cluster are killed while requests run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import httpx
import openai
import pytest
import ray

from cluster.evaluator_pool import actor_name
from memshare.client import (
    CallError,
    Client,
    UnavailableError,
)
from tests.cluster.serve.support import (
    AGAIN_S,
    ENDLESS,
    PROMPT,
    QUESTION,
    assert_that_blocks_are_reclaimed,
)
from tests.cluster.support.faults import Old, Record, Stream, recover
from tools.bench.local_cluster import (
    START_S,
    Server,
    kill,
    processes,
    victims,
)

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


@pytest.mark.complete
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
    assert max(gaps) < 30, "no request stalls"
    answered = server.metric("vllm:memshare_evaluator_lag_seconds_count")
    end = time.monotonic() + 120
    while server.metric("vllm:memshare_evaluator_lag_seconds_count") <= answered:
        assert time.monotonic() < end, "stage one does not resume"
        read()
    assert failures == []


@pytest.mark.complete
def test_a_killed_proxy_comes_back_and_engines_do_not_notice(
    server: Server, record_property: Record
) -> None:
    engine = victims("engine")
    stream = Stream(server)
    killed = kill("proxy")
    assert stream.is_told_of_its_end()
    recover(server, killed, record_property)
    assert victims("engine") == engine
    server.wait_until_idle(timeout_s=120)  # nobody reads that answer: it ends


@pytest.mark.complete
def test_nobody_notices_that_the_controller_was_killed(
    server: Server, record_property: Record
) -> None:
    others = victims("engine") + victims("replica") + victims("proxy")
    stream = Stream(server, tokens=300)
    killed = kill("controller")
    assert not stream.is_told_of_its_end(), "the answer is whole"
    recover(server, killed, record_property)
    assert victims("engine") + victims("replica") + victims("proxy") == others


@pytest.mark.complete
def test_a_killed_replica_is_replaced_and_sharing_resumes(
    server: Server, record_property: Record
) -> None:
    old = Old.of("engine", "worker", "replica")
    stream = Stream(server)
    killed = kill("replica")
    assert stream.is_told_of_its_end()
    recover(server, killed, record_property)
    old.assert_gone()
    assert_that_blocks_are_reclaimed(server)


@pytest.mark.complete
def test_a_dead_engine_is_replaced(server: Server, record_property: Any) -> None:
    """Meanwhile everybody is told at once to come again, and when."""
    (engine,) = processes("VLLM::EngineCore")
    replica = engine.parent()
    old = Old.of("engine", "worker")
    whole: list[httpx.Response] = []
    errors: list[CallError] = []

    def ask() -> None:
        body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 3900, "ignore_eos": True}
        whole.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300))

    def read() -> None:
        with server.grpc_client() as client, pytest.raises(CallError) as caught:
            list(client.generate_stream(PROMPT, ENDLESS))
        errors.append(caught.value)

    asking = [threading.Thread(target=work) for work in (ask, read)]
    for thread in asking:
        thread.start()
    stream = Stream(server)
    workers = engine.children(recursive=True)
    began = time.monotonic()
    engine.kill()
    for thread in asking:
        thread.join()
    # Requests of a dead engine fail at once, and may be tried again.
    assert [answer.status_code for answer in whole] == [503]
    assert whole[0].headers["retry-after"] == str(AGAIN_S)
    assert [type(error) for error in errors] == [UnavailableError]
    assert errors[0].retry_after_s == AGAIN_S
    assert stream.is_told_of_its_end()
    (said,) = [json.loads(event[6:])["error"] for event in stream.events if '"error"' in event]
    assert said["code"] == 503
    for error in (whole[0].json()["error"], said):
        assert error["message"].endswith(f"is being replaced; try again in {AGAIN_S} s")
    assert replica is not None
    replica.wait(timeout=30)
    noticed_s = time.monotonic() - began
    refused_s = refusals_until_it_serves(server, began)
    recovered_s = time.monotonic() - began
    print(f"\nnoticed in {noticed_s:.1f} s, served again after {recovered_s:.1f} s")
    print(f"{len(refused_s)} refusals meanwhile, the slowest in {max(refused_s):.1f} s")
    record_property("noticed_s", noticed_s)
    record_property("recovered_s", recovered_s)
    assert noticed_s < 30
    assert max(refused_s) < 20, "nobody waits for a new engine"
    assert not any(worker.is_running() for worker in workers)
    old.assert_gone()
    (again,) = processes("VLLM::EngineCore")
    assert again.pid != engine.pid


def refusals_until_it_serves(server: Server, began: float) -> list[float]:
    """How long each refusal took, in seconds, of ``/health``, a request and a gRPC call."""
    body = {"model": "smollm2", "prompt": "Hello", "max_tokens": 1}

    def by_http(method: str, path: str, **request: Any) -> bool:
        answer = httpx.request(method, f"{server.url}{path}", timeout=60, **request)
        if answer.status_code == 200:
            return True
        assert answer.status_code == 503
        told.add(float(answer.headers["retry-after"]))
        return False

    def by_grpc(client: Client) -> bool:
        try:
            client.model_info()
        except UnavailableError as error:
            told.add(error.retry_after_s)
            return False
        return True

    took: list[float] = []
    told: set[float | None] = set()
    with server.grpc_client(retries=0) as client:
        asks: list[Callable[[], bool]] = [
            partial(by_http, "GET", "/health"),
            partial(by_http, "POST", "/v1/completions", json=body),
            partial(by_grpc, client),
        ]
        for ask in cycle(asks):
            at = time.monotonic()
            assert at - began < START_S
            if ask():
                break
            took.append(time.monotonic() - at)
            time.sleep(0.2)
    assert told == {AGAIN_S}
    return took
