"""What both clients share: the channel's options, metadata, and requests from plain arguments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.struct_pb2 import Struct

from memshare.proto import memshare_pb2 as pb

Message = pb.ChatMessage | tuple[str, str] | Mapping[str, str]
"""A message of a conversation: ``(role, content)``, a mapping of the fields, or the message."""

JsonValue = str | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]

MOST_RETRIES = 4
"""gRPC itself allows five attempts."""

_SERVICE = "memshare.v1.MemShare"
_UNARY = ("Generate", "Chat", "Abort", "GetModelInfo", "GetStats")
_LARGEST_REPLY = 64 * 1024 * 1024  # bytes; gRPC's own 4 MiB are too few for many logprobs


def channel_options(retries: int) -> list[tuple[str, str | int]]:
    """Options of a channel.

    Calls with one reply are sent again, after 0.5, 1.5, 4.5 and 10 seconds (each give or take a
    fifth), while the server is unavailable. Streams are not: what has been read can't be unread.

    Args:
        retries: at most :data:`MOST_RETRIES`.

    Raises:
        ValueError: more, or fewer than none.
    """
    if not 0 <= retries <= MOST_RETRIES:
        raise ValueError(f"retries = {retries}: give a number from 0 to {MOST_RETRIES}")
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", _LARGEST_REPLY),
        ("grpc.keepalive_time_ms", 60_000),
    ]
    if retries == 0:
        return [*options, ("grpc.enable_retries", 0)]
    policy = {
        "maxAttempts": retries + 1,
        "initialBackoff": "0.5s",
        "maxBackoff": "10s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": _SERVICE, "method": method} for method in _UNARY]
    config = {"methodConfig": [{"name": names, "retryPolicy": policy}]}
    return [*options, ("grpc.service_config", json.dumps(config))]


def metadata(key: str | None, session: str | None, app: str | None) -> list[tuple[str, str]]:
    """Metadata of every call.

    Args:
        key: opens the server.
        session: calls of one session go to one replica, if the cluster routes by it.
        app: Ray Serve's application; needed only if several offer this service.
    """
    pairs = []
    if key:
        pairs.append(("authorization", f"Bearer {key}"))
    if session:
        pairs.append(("session_id", session))
    if app:
        pairs.append(("application", app))
    return pairs


def generate_request(
    prompt: str | Sequence[int],
    sampling: pb.Sampling | None,
    memshare: pb.MemShareOptions | None,
    model: str,
    request_id: str,
) -> pb.GenerateRequest:
    """The request for text or token ids."""
    request = pb.GenerateRequest(
        model=model, sampling=sampling, memshare=memshare, request_id=request_id
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    return request


def chat_request(
    messages: Iterable[Message],
    sampling: pb.Sampling | None,
    memshare: pb.MemShareOptions | None,
    model: str,
    request_id: str,
    reasoning_effort: str | None,
    template_kwargs: Mapping[str, JsonValue] | None,
) -> pb.ChatRequest:
    """The request for a conversation."""
    request = pb.ChatRequest(
        model=model,
        messages=[_message(message) for message in messages],
        sampling=sampling,
        memshare=memshare,
        request_id=request_id,
        reasoning_effort=reasoning_effort,
    )
    if template_kwargs is not None:
        kwargs = Struct()
        kwargs.update(dict(template_kwargs))
        request.chat_template_kwargs.CopyFrom(kwargs)
    return request


def _message(message: Message) -> pb.ChatMessage:
    if isinstance(message, pb.ChatMessage):
        return message
    if isinstance(message, tuple):
        return pb.ChatMessage(role=message[0], content=message[1])
    return pb.ChatMessage(**message)
