"""The gRPC interface, beside HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.grpc_ingress import SERVICE
from memshare.cli.main import main
from memshare.client import (
    FinishReason,
    InvalidRequestError,
    MemShareOptions,
    NotFoundError,
    OverloadedError,
    Sampling,
    TimedOutError,
)
from tests.cluster.serve.support import ENDLESS, GREEDY, PROMPT, QUESTION
from tests.fuzzing import TIMES
from tests.protobuf import damaged, requests
from tools.bench.local_cluster import (
    ROOT,
    Server,
)

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


def test_grpc_streamed_whole_and_http_give_the_same_tokens(server: Server) -> None:
    sampled = Sampling(temperature=0.7, top_p=0.9, seed=11, max_tokens=12, logprobs=2)
    with server.grpc_client() as client:
        for sampling in (GREEDY, sampled):
            whole = client.generate(PROMPT, sampling)
            pieces = list(client.generate_stream(PROMPT, sampling))
            assert [i for piece in pieces for i in piece.token_ids] == list(whole.token_ids)
            assert "".join(piece.text for piece in pieces) == whole.text
            assert len(pieces) >= 8, "tokens come one by one"
            body = {
                "model": "smollm2", "prompt": PROMPT, "max_tokens": 12, "return_token_ids": True,
                "temperature": sampling.temperature,
            }  # fmt: skip
            if sampling is sampled:
                body |= {"top_p": 0.9, "seed": 11, "logprobs": 2}
            (choice,) = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()[
                "choices"
            ]
            assert list(whole.token_ids) == choice["token_ids"]
            assert whole.text == choice["text"]
        chosen = [position.chosen.logprob for position in whole.logprobs]
        assert chosen == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
        ids = httpx.post(
            f"{server.url}/tokenize", json={"model": "smollm2", "prompt": PROMPT}, timeout=60
        ).json()["tokens"]
        assert client.generate(ids, GREEDY).text == client.generate(PROMPT, GREEDY).text


def test_grpc_chat_is_the_chat_over_http(server: Server) -> None:
    over_http = server.client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=12, temperature=0
    )
    conversation = [("user", "Tell me a long story about a lighthouse.")]
    with server.grpc_client() as client:
        whole = client.chat(conversation, GREEDY)
        pieces = list(client.chat_stream(conversation, GREEDY))
    assert whole.message.content == over_http.choices[0].message.content
    assert "".join(piece.delta.content for piece in pieces) == whole.message.content
    assert whole.message.role == pieces[0].delta.role == "assistant"
    assert over_http.usage is not None
    for usage in (whole.usage, pieces[-1].usage):
        assert usage.prompt_tokens == over_http.usage.prompt_tokens
        assert usage.completion_tokens == 12
        assert usage.memshare.peak_kv_blocks == -(-(usage.prompt_tokens + 11) // 32)
    assert whole.finish.reason == FinishReason.FINISH_REASON_LENGTH


def test_usage_over_grpc(server: Server) -> None:
    with server.grpc_client() as client:
        exact = client.generate(PROMPT, GREEDY, memshare=MemShareOptions(enabled=False))
        assert exact.usage.memshare.blocks_shared == 0
        assert exact.usage.memshare.peak_kv_blocks > 0
        stopped = client.generate(PROMPT, Sampling(stop=[" "], max_tokens=50))
        assert stopped.finish.stop_string == " "
        assert not stopped.usage.HasField("memshare"), "documented: ended outside the engine"


def test_grpc_tells_of_model_and_replica(server: Server) -> None:
    with server.grpc_client() as client:
        info, stats = client.model_info(), client.stats()
        assert (info.model, info.max_model_len, info.block_size) == ("smollm2", 4096, 32)
        assert info.kv_blocks > 100
        assert info.memshare_mode == "share"
        assert stats.generation_tokens > 0
        assert "Engine" in stats.replica_id or stats.replica_id
    assert main(["chat", "--address", server.grpc_address, "--max-tokens", "4", "Hello"]) == 0


def test_the_demo_tells_how_the_server_fares(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--address", server.grpc_address, "--stories", "3", "--tokens", "128"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "3 stories of 128 tokens want about 15 KV blocks; smollm2 has" in printed
    (*_, last) = (line for line in printed.splitlines() if "blocks reclaimed" in line)
    told = re.search(r"(\d+) tokens .* (\d+) blocks reclaimed, 0 preemptions", last)
    assert told is not None, last
    assert int(told[2]) > 0, "the options are loose"
    assert printed.count("| 128 | ") == 3


def test_a_grpc_call_that_ends_early_frees_the_engine(server: Server) -> None:
    with server.grpc_client() as client:
        with pytest.raises(TimedOutError):
            client.generate(PROMPT, ENDLESS, timeout=2)
        server.wait_until_idle(timeout_s=120)
        with client.chat_stream([("user", "Hello")], ENDLESS) as stream:
            for _ in zip(range(4), stream, strict=False):
                pass
        server.wait_until_idle(timeout_s=120)
        stream = client.chat_stream([("user", "Hello")], ENDLESS, request_id="mine")
        pieces = iter(stream)
        next(pieces)
        assert client.abort("mine")
        *_, last = pieces
        assert last.finish.reason == FinishReason.FINISH_REASON_ABORT
        server.wait_until_idle(timeout_s=120)


def test_one_connection_does_not_hold_the_server_alone(server: Server) -> None:
    with server.grpc_client(retries=0) as greedy, server.grpc_client() as other:
        streams = [greedy.generate_stream(PROMPT, ENDLESS) for _ in range(24)]
        pieces = [iter(stream) for stream in streams]  # who drops one leaves its stream
        for piece in pieces:
            next(piece)
        with pytest.raises(OverloadedError, match="24 requests at one time") as limited:
            greedy.generate(PROMPT, GREEDY)
        assert limited.value.retry_after_s == 1.0
        began = time.monotonic()
        assert other.generate(PROMPT, Sampling(max_tokens=4)).usage.completion_tokens == 4
        print(f"\n4 tokens beside them: {time.monotonic() - began:.1f} s")
        for stream in streams:
            stream.cancel()
    server.wait_until_idle(timeout_s=120)


def test_wrong_grpc_requests_are_told_what_is_wrong(server: Server) -> None:
    with server.grpc_client() as client:
        with pytest.raises(InvalidRequestError, match="top_p"):
            client.generate(PROMPT, Sampling(top_p=2))
        with pytest.raises(InvalidRequestError, match=r"memshare\.step_threshold: is 3"):
            client.generate(PROMPT, memshare=MemShareOptions(step_threshold=3))
        with pytest.raises(InvalidRequestError, match="4096"):
            list(client.generate_stream([1] * 5000))
        with pytest.raises(InvalidRequestError, match="out of"):
            client.generate([4_000_000_000], GREEDY)
        for kwargs in ({"tokenize": True}, {"conversation": []}, {"chat_template": "x"}):
            with contextlib.suppress(InvalidRequestError):  # it may also do no harm
                client.chat([("user", "Hello")], GREEDY, template_kwargs=kwargs)
        with pytest.raises(NotFoundError, match="there is no 'gpt'"):
            list(client.chat_stream([("user", "Hello")], model="gpt"))


FAIR = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.mark.complete
def test_any_grpc_message_is_answered_or_refused(server: Server) -> None:
    """No bad input is the server's fault, and it survives all of them."""
    methods = {method.name: method for method in SERVICE.methods}
    codes: Counter[grpc.StatusCode] = Counter()

    def call(
        channel: grpc.Channel, name: str, data: bytes, *fair: grpc.StatusCode, timeout: float = 20
    ) -> None:
        replies = channel.unary_stream(f"/{SERVICE.full_name}/{name}")(data, timeout=timeout)
        with contextlib.suppress(grpc.RpcError):
            list(replies)
        code = replies.code()
        assert code in (*FAIR, *fair), f"{name} {data!r}: {code} {replies.details()}"
        codes[code] += 1

    @settings(
        max_examples=80 * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(["Generate", "GenerateStream", "Chat", "ChatStream"]))
        message = data.draw(requests(methods[name].input_type)).SerializeToString()
        call(channel, name, message)
        # It may have lost its limit of tokens.
        late = grpc.StatusCode.DEADLINE_EXCEEDED
        call(channel, name, data.draw(damaged(message)), late, timeout=2)

    with grpc.insecure_channel(server.grpc_address) as channel:
        fuzz()
        for name in methods:
            for garbage in (b"\xff" * 9, b"\x0a\xff", os.urandom(64)):
                call(channel, name, garbage)
    print(f"\n{dict(codes)}")
    assert codes[grpc.StatusCode.OK] > 5, "some are right by chance"
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 10
    server.wait_until_idle(timeout_s=120)
    assert server.completes()


def test_health_and_reflection(server: Server) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE.full_name):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE.full_name, "grpc.health.v1.Health"} <= set(reflected.get_services())
        pool = DescriptorPool(reflected)
        methods = pool.FindServiceByName(SERVICE.full_name).methods_by_name
        assert methods["Chat"].input_type.full_name == "memshare.v1.ChatRequest"


FOREIGN = """
import sys, grpc, memshare_pb2, memshare_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = memshare_pb2_grpc.MemShareStub(channel)
    request = memshare_pb2.GenerateRequest(text=sys.argv[2])
    request.sampling.temperature = 0
    request.sampling.max_tokens = 12
    print("".join(chunk.text for chunk in stub.GenerateStream(request)), end="")
"""


def test_a_client_made_from_the_proto_alone_works(server: Server, tmp_path: Path) -> None:
    compiler = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'memshare' / 'proto'}"]
    outputs = [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", "memshare.proto"]
    subprocess.run([*compiler, *outputs], check=True)
    foreign = subprocess.run(
        [sys.executable, "-c", FOREIGN, server.grpc_address, PROMPT],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    with server.grpc_client() as client:
        assert foreign.stdout == client.generate(PROMPT, GREEDY).text
