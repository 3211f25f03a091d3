"""A server with keys: a real engine, short of KV memory, whose tenants must not share blocks.

One server for all tests. Tenants' keys are made here; the server gets their hashes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.check.ports import look_at_ports
from cluster.tenancy.keys import hash_key, new_key
from memshare.client import NotAllowedError, OverloadedError, Sampling
from tests.cluster.support.loose import LOOSE
from tests.cluster.support.monitoring import serving_of, wait_for
from tests.machine import DTYPE
from tools.bench.local_cluster import (
    START_S,
    Server,
    cluster_file,
    memshare_in,
    start,
    stop,
)
from tools.serving.setup import greeting, read_setup

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

TENANTS: dict[str, dict[str, Any]] = {
    "acme": {},
    "bravo": {},
    "narrow": {"concurrent_requests": 1, "sequences_per_request": 2},
    "metered": {"tokens_per_minute": 60},
    "strict": {"models": ["another"]},
    "exact": {"permissions": {"always_exact": True, "may_opt_out": False}},
    "platform": {"operator": True},
}
STORY = (
    "The keeper of the lighthouse wrote every evening into the book of the house what the sea had "
    "done that day, which ships had passed, and how much oil the lamp had burned. One evening "
    "there was a sentence in the book that the keeper had not written. It said: "
)


@dataclass
class Keyed:
    """The server, its tenants' keys, its key table and its event log."""

    server: Server
    keys: dict[str, str]
    table: Path
    events: Path

    def ask(self, tenant: str | None, **body: Any) -> httpx.Response:
        """A completion of a few tokens, but for what ``body`` says."""
        body = {"model": "smollm2", "prompt": STORY, "max_tokens": 4, "temperature": 0} | body
        return self.post(tenant, "/v1/completions", body)

    def post(self, tenant: str | None, path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"X-Request-Id": f"{tenant}-{threading.get_ident()}"}
        if tenant is not None:
            headers["Authorization"] = f"Bearer {self.keys[tenant]}"
        headers["Content-Type"] = "application/json"
        content = json.dumps(body)  # httpx would refuse to encode what we want to be refused
        return httpx.post(f"{self.server.url}{path}", content=content, headers=headers, timeout=300)

    def metrics(self) -> str:
        headers = {"Authorization": f"Bearer {self.keys['platform']}"}
        return httpx.get(f"{self.server.url}/metrics", headers=headers, timeout=60).text

    def count(self, name: str, **labels: str) -> float:
        """A counter of a tenant."""
        for line in self.metrics().splitlines():
            wanted = [f'{label}="{value}"' for label, value in labels.items()]
            if line.startswith(name + "{") and all(text in line for text in wanted):
                return float(line.rpartition(" ")[2])
        return 0.0


def table_of(keys: dict[str, str], *tenants: str) -> str:
    entries = {n: TENANTS[n] | {"keys": {"test": hash_key(keys[n])}} for n in tenants or TENANTS}
    return yaml.safe_dump({"tenants": entries})


@pytest.fixture(scope="module")
def keyed(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("tenants")
    keys = {name: new_key() for name in TENANTS}
    table, events = folder / "keys.yaml", folder / "events.jsonl"
    table.write_text(table_of(keys))
    document = cluster_file()
    # Proxies listen on all addresses: with keys that is allowed.
    document["http_options"]["host"] = "0.0.0.0"
    arguments = document["applications"][0]["args"]
    arguments["auth"] = {"file": str(table)}
    arguments["engine"] |= {
        "max_model_len": 1024,
        "num_gpu_blocks_override": 40,
        "dtype": DTYPE,
        "max_num_seqs": 16,
    }
    # Whatever is re-pointed strays further than that: what follows an alarm is tested here.
    arguments["guard"] = {"share": 1.0, "bound": 1e-6, "patience_s": 1.0}
    memshare_in(document).update(LOOSE)
    memshare_in(document).update(scope="tenant", event_log=str(events))
    server = start(folder, document)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                if httpx.get(f"{server.url}/health", timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.process.poll() is None, server.log.read_text()[-4000:]
            assert time.monotonic() < end, server.log.read_text()[-4000:]
            time.sleep(0.2)
        yield Keyed(server, keys, table, events)
    finally:
        stop(server)


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["message"]


def test_a_key_is_needed(keyed: Keyed) -> None:
    assert keyed.ask(None).status_code == 401
    keyed.keys["stranger"] = new_key()
    assert keyed.ask("stranger").status_code == 401
    assert keyed.ask("acme").status_code == 200
    assert httpx.get(f"{keyed.server.url}/metrics", timeout=60).status_code == 401
    assert "memshare_tenant_requests_total" in keyed.metrics()


# By curl, from Python, and over gRPC.
PRINTED = r"^(?:curl .*?\}\'|\.venv/bin/python .*?^END|MEMSHARE_KEY=[^\n]*chat[^\n]*)$"


def test_the_calls_that_make_serve_prints_work_with_a_key(keyed: Keyed) -> None:
    setup = read_setup(keyed.server.log.with_name("cluster.yaml"))
    calls = re.findall(PRINTED, greeting(setup, 1.0, Path("log")), re.DOTALL | re.MULTILINE)
    assert [call[:8] for call in calls] == ["curl htt", ".venv/bi", "MEMSHARE"]
    for call in calls:
        done = subprocess.run(
            ["bash", "-c", call.replace(".venv/bin/", f"{Path(sys.executable).parent}/")],
            env=os.environ | {"OPENAI_API_KEY": keyed.keys["acme"]},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Tokyo" in done.stdout, done.stdout


def test_keys_hold_for_grpc(keyed: Keyed) -> None:
    sampling = Sampling(max_tokens=2)
    for key in (None, new_key(), keyed.keys["strict"]):
        with keyed.server.grpc_client(key=key) as client, pytest.raises(NotAllowedError):
            client.generate(STORY, sampling)
    with keyed.server.grpc_client(key=keyed.keys["acme"]) as client:
        assert client.generate(STORY, sampling).usage.completion_tokens > 0
        with pytest.raises(NotAllowedError):
            client.stats()  # of all tenants: for operators


def test_a_check_of_the_machine_recognises_the_server_without_a_key(keyed: Keyed) -> None:
    found, runs = look_at_ports(serving_of(keyed.server))
    assert [finding.level for finding in found] == ["ok", "ok"], found
    assert all(finding.text.endswith("a MemShare server answers there") for finding in found)
    assert runs


@pytest.mark.parametrize("stream", [False, True])
def test_clients_cannot_set_a_salt(keyed: Keyed, stream: bool) -> None:
    status, message = error(keyed.ask("acme", cache_salt="mine", stream=stream))
    assert status == 400
    assert "leave cache_salt out" in message


def test_permissions_are_kept(keyed: Keyed) -> None:
    status, message = error(keyed.ask("exact", vllm_xargs={"memshare": "off"}))
    assert status == 403
    assert "does not allow vllm_xargs.memshare" in message
    status, message = error(keyed.ask("strict"))
    assert status == 403
    assert "use one of: another" in message
    status, message = error(keyed.ask("narrow", n=3, temperature=1))
    assert status == 400
    assert "more than the 2" in message
    assert keyed.ask("acme", vllm_xargs={"memshare": "off"}).status_code == 200


def test_beam_search_is_as_many_sequences_as_its_width(keyed: Keyed) -> None:
    beams = {"use_beam_search": True, "max_tokens": 6}
    assert keyed.ask("narrow", n=2, **beams).status_code == 200
    status, message = error(keyed.ask("narrow", n=3, **beams))
    assert status == 400
    assert "more than the 2" in message


def test_one_request_at_a_time(keyed: Keyed) -> None:
    body = {"model": "smollm2", "prompt": STORY, "max_tokens": 900, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {keyed.keys['narrow']}"}
    url = f"{keyed.server.url}/v1/completions"
    with httpx.stream(
        "POST", url, json=body | {"stream": True}, headers=headers, timeout=300
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = keyed.ask("narrow")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        with (
            keyed.server.grpc_client(key=keyed.keys["narrow"]) as client,
            pytest.raises(OverloadedError) as limited,
        ):
            client.generate(STORY)
        assert limited.value.retry_after_s == 1.0
        assert keyed.ask("acme").status_code == 200
    end = time.monotonic() + 20
    while keyed.ask("narrow").status_code != 200:
        assert time.monotonic() < end, "the client left, but its slot is still taken"
        time.sleep(0.2)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_counted_as_they_are(keyed: Keyed, stream: bool) -> None:
    def used() -> tuple[float, float]:
        name = "memshare_tenant_tokens_total"
        return (
            keyed.count(name, tenant="bravo", kind="prompt"),
            keyed.count(name, tenant="bravo", kind="output"),
        )

    before = used()
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = keyed.ask(
        "bravo", max_tokens=7, n=2, temperature=1, ignore_eos=True, stream=stream, **options
    )
    assert answer.status_code == 200
    if stream:
        last = [line for line in answer.text.splitlines() if line.startswith("data: {")][-1]
        usage = json.loads(last.removeprefix("data: "))["usage"]
    else:
        usage = answer.json()["usage"]
    assert usage["completion_tokens"] == 14
    after = used()
    assert after[0] - before[0] == usage["prompt_tokens"]
    assert after[1] - before[1] == usage["completion_tokens"]


def test_used_up_tokens_come_back_with_time(keyed: Keyed) -> None:
    assert keyed.ask("metered", max_tokens=20, ignore_eos=True).status_code == 200
    refused = keyed.ask("metered")
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "tokens"
    seconds = int(refused.headers["retry-after"])
    assert 1 <= seconds < 60
    assert keyed.ask("acme").status_code == 200


def test_prefix_cache_hits_never_cross_tenants(keyed: Keyed) -> None:
    prompt = "A text of this test alone. " + STORY * 2

    def hits(tenant: str) -> float:
        """Tokens found in the prefix cache, by one request with the same prompt."""
        before = keyed.count("vllm:prefix_cache_hits_total")
        assert keyed.ask(tenant, prompt=prompt).status_code == 200
        return keyed.count("vllm:prefix_cache_hits_total") - before

    assert hits("acme") == 0
    assert hits("acme") > 32, "negative control: one's own prompt is found again"
    assert hits("bravo") == 0
    assert hits("bravo") > 32


def test_pairs_never_cross_tenants(keyed: Keyed) -> None:
    """Two tenants with the same prompts and, greedily decoded, much the same output.

    Seven requests want 7 blocks each, and there are 39.
    """

    def ask(tenant: str) -> int:
        return keyed.ask(tenant, max_tokens=160, ignore_eos=True).status_code

    tenants = ["acme", "bravo"] * 3 + ["exact"]
    with ThreadPoolExecutor(len(tenants)) as pool:
        assert set(pool.map(ask, tenants)) == {200}
    events = [json.loads(line) for line in keyed.events.read_text().splitlines()]
    pairs = {
        (event["request"], event["donor_request"])
        for event in events
        if event["event"] in ("candidate", "verified", "applied") and "donor_request" in event
    }
    applied = [event for event in events if event["event"] == "applied"]

    def tenant_of(request: str) -> str:
        (tenant,) = (name for name in TENANTS if name in request)
        return tenant

    crossing = [pair for pair in pairs if tenant_of(pair[0]) != tenant_of(pair[1])]
    assert crossing == []
    between = {tenant_of(a) for a, b in pairs if a != b}
    assert between == {"acme", "bravo"}, "negative control: requests of one tenant do pair"
    assert {tenant_of(event["request"]) for event in applied} == {"acme", "bravo"}
    print(f"\n{len(pairs)} pairs of requests, {len(applied)} remaps")


@pytest.mark.complete
def test_a_guard_stops_what_strays_until_an_operator_lets_it_go_on(keyed: Keyed) -> None:
    def shared() -> int:
        """Blocks that a request gave up, which reads on in a story."""
        xargs = {"memshare_usage": "on"}
        answer = keyed.ask(
            "bravo", max_tokens=160, temperature=1, ignore_eos=True, vllm_xargs=xargs
        )
        blocks: int = answer.json()["kv_transfer_params"]["memshare"]["blocks_shared"]
        return blocks

    def guard() -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {keyed.keys['platform']}"}
        state = httpx.get(f"{keyed.server.url}/memshare/api/state", headers=headers, timeout=60)
        (replica,) = state.json()["replicas"]
        return {"id": replica["id"], **replica["guard"]}

    def is_stopped() -> bool:
        return keyed.count("memshare_guard_stopped") == 1

    for _ in range(6):
        if is_stopped():
            break
        shared()
    wait_for("the stop", is_stopped)
    assert keyed.count("memshare_guard_alarms_total") == 1
    assert keyed.count("memshare_guard_shadows_total", outcome="scored") > 0
    assert keyed.count("memshare_guard_tokens_total") > 100
    assert keyed.count("memshare_guard_disagreement", estimate="mean") > 1e-6
    assert keyed.count("vllm:memshare_blocks_reclaimed_total") > 0, "there was something to stop"
    assert shared() == 0
    assert keyed.count("memshare_guard_exact_requests_total") >= 1
    shown = wait_for("the page", lambda: guard()["stopped"] and guard())
    assert (shown["alarms"], shown["shadows"] > 0) == (1, True)

    path = f"/memshare/api/guard?replica={shown['id']}"
    assert keyed.post("bravo", path, {}).status_code == 403, "for operators"
    assert keyed.post("platform", path + "x", {}).status_code == 404
    assert keyed.post("platform", path, {}).status_code == 202
    wait_for("the end of the stop", lambda: not is_stopped())
    assert keyed.count("memshare_guard_resumes_total", by="operator") == 1
    assert shared() > 0


def test_a_changed_table_is_taken_over(keyed: Keyed) -> None:
    keyed.table.write_text("tenants: [")
    end = time.monotonic() + 20
    while not keyed.count("memshare_key_table_reloads_total", result="refused"):
        assert time.monotonic() < end
        time.sleep(0.3)
    assert keyed.ask("acme").status_code == 200, "a broken table changes nothing"
    keyed.table.write_text(table_of(keyed.keys, "bravo", "platform"))
    end = time.monotonic() + 20
    while keyed.ask("acme").status_code != 401:
        assert time.monotonic() < end
        time.sleep(0.3)
    assert keyed.ask("bravo").status_code == 200
