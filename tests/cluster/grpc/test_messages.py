"""gRPC messages become what the same request is over HTTP, or a refusal that names the field."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given, settings

from cluster.grpc.messages import (
    Cost,
    Piece,
    chat_body,
    chat_chunk,
    completion_body,
    generate_response,
    request_id,
)
from cluster.grpc.status import StatusError
from memshare.proto import memshare_pb2 as pb
from tests.protobuf import messages

SAMPLING = pb.Sampling(temperature=0.7, top_k=0, seed=0, stop=["END"], logit_bias={5: -1.5})


def struct(values: dict[str, Any]) -> Struct:
    made = Struct()
    made.update(values)
    return made


def test_a_prompt_with_nothing_set_leaves_all_defaults_to_vllm() -> None:
    assert completion_body(pb.GenerateRequest(text=""), stream=False) == {
        "stream": False,
        "prompt": "",
        "vllm_xargs": {"memshare_usage": "on"},
        "min_tokens": 0,
        "include_stop_str_in_output": False,
        "ignore_eos": False,
    }


def test_zero_and_unset_differ() -> None:
    body = completion_body(pb.GenerateRequest(text="x", sampling=SAMPLING), stream=True)
    assert body["temperature"] == 0.7, "exactly, as JSON would say it"
    assert body["top_k"] == 0
    assert body["seed"] == 0
    assert body["stop"] == ["END"]
    assert body["logit_bias"] == {"5": -1.5}
    assert not {"top_p", "min_p", "max_tokens", "logprobs", "model"} & set(body)


def test_token_ids_are_a_prompt() -> None:
    asked = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2]), model="m", truncate_prompt_tokens=1
    )
    body = completion_body(asked, stream=False)
    assert body["prompt"] == [1, 2]
    assert body["model"] == "m"
    assert (body["truncate_prompt_tokens"], body["truncation_side"]) == (1, "left")


def test_a_conversation_with_everything() -> None:
    asked = pb.ChatRequest(
        messages=[
            pb.ChatMessage(role="user", content="Hi"),
            pb.ChatMessage(role="assistant", content="Ho", reasoning="hm"),
        ],
        sampling=pb.Sampling(logprobs=3),
        memshare=pb.MemShareOptions(enabled=False, max_shared_fraction=0.5, max_kept_tokens=640),
        reasoning_effort="low",
        chat_template_kwargs=struct({"enable_thinking": False}),
        continue_final_message=True,
    )
    body = chat_body(asked, stream=False)
    assert body["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho", "reasoning": "hm"},
    ]
    assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
    assert body["vllm_xargs"] == {
        "memshare": "off", "memshare_max_shared_fraction": 0.5, "memshare_max_kept_tokens": 640,
        "memshare_usage": "on",
    }  # fmt: skip
    assert body["reasoning_effort"] == "low"
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def converted(asked: pb.GenerateRequest | pb.ChatRequest) -> dict[str, Any] | StatusError:
    try:
        request_id(asked)
        if isinstance(asked, pb.ChatRequest):
            return chat_body(asked, stream=False)
        return completion_body(asked, stream=False)
    except StatusError as refusal:
        return refusal


def generate(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "x", **fields})


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
        (generate(sampling=pb.Sampling(temperature=math.nan)), "sampling.temperature"),
        (generate(sampling=pb.Sampling(top_p=math.inf)), "sampling.top_p"),
        (generate(sampling=pb.Sampling(logit_bias={7: math.nan})), "sampling.logit_bias.7"),
        (generate(sampling=pb.Sampling(logprobs=-1)), "sampling.logprobs"),
        (generate(memshare=pb.MemShareOptions(step_threshold=2)), "memshare.step_threshold"),
        (
            generate(memshare=pb.MemShareOptions(block_threshold=math.nan)),
            "memshare.block_threshold",
        ),
        (pb.ChatRequest(), "messages"),
        (pb.ChatRequest(messages=[pb.ChatMessage(content="Hi")]), "messages.0.role"),
        (
            pb.ChatRequest(
                messages=[pb.ChatMessage(role="user")], chat_template_kwargs=struct({"x": math.inf})
            ),
            "chat_template_kwargs",
        ),
        (generate(request_id="x" * 257), "request_id"),
    ],
)
def test_a_wrong_field_is_named(asked: pb.GenerateRequest | pb.ChatRequest, field: str) -> None:
    refusal = converted(asked)
    assert isinstance(refusal, StatusError)
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.details.startswith(f"{field}: ")


@settings(max_examples=200, deadline=None)
@given(messages(pb.GenerateRequest.DESCRIPTOR) | messages(pb.ChatRequest.DESCRIPTOR))
def test_any_request_is_converted_or_refused(asked: pb.GenerateRequest | pb.ChatRequest) -> None:
    outcome = converted(asked)
    if isinstance(outcome, StatusError):
        assert outcome.code == grpc.StatusCode.INVALID_ARGUMENT
    else:
        assert "prompt" in outcome or outcome["messages"]


class Logprob:
    """As vLLM's."""

    def __init__(self, logprob: float, rank: int, decoded_token: str) -> None:
        self.logprob = logprob
        self.rank = rank
        self.decoded_token = decoded_token


def test_a_whole_reply() -> None:
    piece = Piece(
        text="ab",
        token_ids=[5, 6],
        logprobs=[{5: Logprob(-0.5, 2, "a"), 9: Logprob(-0.1, 1, "z")}, None],
        finish_reason="stop",
        stop_reason="END",
        cost=Cost(7, 4, 2, 0, {"blocks_shared": 1, "peak_kv_blocks": 3, "preemptions": 0}),
    )
    reply = generate_response("id", "m", piece)
    assert (reply.request_id, reply.model, reply.text) == ("id", "m", "ab")
    assert list(reply.token_ids) == [5, 6]
    assert reply.logprobs[0].chosen.token == "a"
    assert [top.token_id for top in reply.logprobs[0].top] == [9, 5]
    assert not reply.logprobs[1].HasField("chosen")
    assert reply.finish.reason == pb.FINISH_REASON_STOP
    assert reply.finish.stop_string == "END"
    assert reply.usage.memshare.peak_kv_blocks == 3


def test_a_piece_in_the_middle_has_neither_finish_nor_usage() -> None:
    chunk = chat_chunk("id", "", Piece(text="a", token_ids=[5]))
    assert not chunk.HasField("finish")
    assert not chunk.HasField("usage")


def test_usage_without_memshare_says_so() -> None:
    piece = Piece(text="", token_ids=[], finish_reason="length", cost=Cost(1, 0, 0))
    reply = generate_response("id", "m", piece)
    assert not reply.usage.HasField("memshare")
    assert reply.finish.reason == pb.FINISH_REASON_LENGTH


def test_every_stop_token_id_is_told() -> None:
    piece = Piece(text="", token_ids=[0], finish_reason="stop", stop_reason=0)
    assert generate_response("id", "m", piece).finish.WhichOneof("stopped_by") == "stop_token_id"
