"""Messages of ``memshare.v1`` into vLLM's own requests, and its outputs into messages.

A request becomes the body that the same request would have over HTTP, so that vLLM's checks and
defaults are the same for both. Nothing here needs vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cluster.grpc.status import invalid
from memshare.proto import memshare_pb2 as pb
from memshare.request_options import USAGE

_REQUEST_ID_LENGTH = 256

_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    "repetition": pb.FINISH_REASON_REPETITION,
}


class LogprobLike(Protocol):
    """vLLM's ``Logprob``."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request has used."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    memshare: Mapping[str, int] | None = None
    """As :class:`memshare.engine.usage.RequestUsage`; None if the engine has not said."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Output of a request since its last piece; the whole of it if it is not streamed."""

    text: str
    token_ids: Sequence[int]
    reasoning: str = ""
    logprobs: Sequence[Mapping[int, LogprobLike] | None] | None = None
    finish_reason: str | None = None
    """vLLM's; None unless this is the last piece."""
    stop_reason: int | str | None = None
    cost: Cost | None = None
    """With the last piece."""


# ---- requests ----


def completion_body(request: pb.GenerateRequest, stream: bool) -> dict[str, Any]:
    """The body of the same request to ``/v1/completions``.

    Raises:
        StatusError: INVALID_ARGUMENT; names the field.
    """
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise invalid("prompt", "is missing; set text or token_ids")
    if kind == "token_ids" and not request.token_ids.ids:
        raise invalid("token_ids", "is empty; give at least one token")
    body = _shared(request, stream)
    body["prompt"] = request.text if kind == "text" else list(request.token_ids.ids)
    body |= _set_fields(request, ("add_special_tokens", "truncate_prompt_tokens"))
    if request.HasField("truncate_prompt_tokens"):
        body["truncation_side"] = "left"
    if request.sampling.HasField("logprobs"):
        body["logprobs"] = _logprobs(request.sampling)
    return body


def chat_body(request: pb.ChatRequest, stream: bool) -> dict[str, Any]:
    """The body of the same request to ``/v1/chat/completions``.

    Raises:
        StatusError: INVALID_ARGUMENT; names the field.
    """
    if not request.messages:
        raise invalid("messages", "is empty; give at least one message")
    body = _shared(request, stream)
    body["messages"] = [_message(i, message) for i, message in enumerate(request.messages)]
    body |= _set_fields(request, ("reasoning_effort",))
    if request.HasField("chat_template_kwargs"):
        body["chat_template_kwargs"] = _template_kwargs(request)
    if request.continue_final_message:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.sampling.HasField("logprobs"):
        body |= {"logprobs": True, "top_logprobs": _logprobs(request.sampling)}
    return body


def request_id(request: pb.GenerateRequest | pb.ChatRequest) -> str | None:
    """The id that the caller has chosen; None if there is none.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    if len(request.request_id) > _REQUEST_ID_LENGTH:
        raise invalid("request_id", f"is longer than {_REQUEST_ID_LENGTH} characters")
    return request.request_id or None


def _shared(request: pb.GenerateRequest | pb.ChatRequest, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"stream": stream, "vllm_xargs": _xargs(request.memshare)}
    if request.model:
        body["model"] = request.model
    return body | _sampling(request.sampling)


# Fields of Sampling that have the same name and meaning in vLLM's requests.
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "max_tokens", "skip_special_tokens",
    "spaces_between_special_tokens",
)  # fmt: skip
_SAME_ALWAYS = ("min_tokens", "include_stop_str_in_output", "ignore_eos")
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")


def _sampling(sampling: pb.Sampling) -> dict[str, Any]:
    fields = _set_fields(sampling, _SAME)
    fields |= {name: getattr(sampling, name) for name in _SAME_ALWAYS}
    fields |= {name: list(values) for name in _LISTS if (values := getattr(sampling, name))}
    if sampling.logit_bias:
        fields["logit_bias"] = {
            str(token): _finite(f"sampling.logit_bias.{token}", bias)
            for token, bias in sampling.logit_bias.items()
        }
    for name, value in fields.items():
        if isinstance(value, float):
            _finite(f"sampling.{name}", value)
    return fields


def _logprobs(sampling: pb.Sampling) -> int:
    if sampling.logprobs < 0:
        raise invalid("sampling.logprobs", f"is {sampling.logprobs}; give 0 or more")
    return sampling.logprobs


def _xargs(options: pb.MemShareOptions) -> dict[str, str | float]:
    """MemShare's options, and the wish for its usage."""
    xargs: dict[str, str | float] = {USAGE: "on"}
    if options.HasField("enabled"):
        xargs["memshare"] = "on" if options.enabled else "off"
    for name in ("step_threshold", "block_threshold", "max_shared_fraction"):
        if options.HasField(name):
            value = getattr(options, name)
            if not 0.0 <= value <= 1.0:
                raise invalid(f"memshare.{name}", f"is {value}; give a number from 0 to 1")
            xargs[f"memshare_{name}"] = value
    if options.HasField("max_kept_tokens"):
        if options.max_kept_tokens < 1:
            raise invalid("memshare.max_kept_tokens", "is 0; give 1 or more")
        xargs["memshare_max_kept_tokens"] = options.max_kept_tokens
    return xargs


def _message(index: int, message: pb.ChatMessage) -> dict[str, Any]:
    if not message.role:
        raise invalid(f"messages.{index}.role", "is empty; set system, user or assistant")
    fields = {"role": message.role, "content": message.content}
    if message.reasoning:
        fields["reasoning"] = message.reasoning
    return fields


def _template_kwargs(request: pb.ChatRequest) -> dict[str, Any]:
    try:
        kwargs: dict[str, Any] = MessageToDict(request.chat_template_kwargs)
    except ValueError as error:  # a Value that holds nothing, or a number that JSON has not
        raise invalid("chat_template_kwargs", str(error)) from None
    return kwargs


def _set_fields(message: Message, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _finite(field: str, value: float) -> float:
    if not math.isfinite(value):
        raise invalid(field, f"is {value}; give a finite number")
    return value


# ---- replies ----


def generate_response(request_id: str, model: str, piece: Piece) -> pb.GenerateResponse:
    """The whole reply to Generate."""
    return pb.GenerateResponse(
        request_id=request_id,
        model=model,
        text=piece.text,
        token_ids=piece.token_ids,
        logprobs=_positions(piece),
        finish=_finish(piece),
        usage=_usage(piece),
    )


def generate_chunk(request_id: str, piece: Piece) -> pb.GenerateChunk:
    """One message of GenerateStream."""
    return pb.GenerateChunk(
        request_id=request_id,
        text=piece.text,
        token_ids=piece.token_ids,
        logprobs=_positions(piece),
        finish=_finish(piece),
        usage=_usage(piece),
    )


def chat_response(request_id: str, model: str, role: str, piece: Piece) -> pb.ChatResponse:
    """The whole reply to Chat."""
    return pb.ChatResponse(
        request_id=request_id,
        model=model,
        message=_said(role, piece),
        token_ids=piece.token_ids,
        logprobs=_positions(piece),
        finish=_finish(piece),
        usage=_usage(piece),
    )


def chat_chunk(request_id: str, role: str, piece: Piece) -> pb.ChatChunk:
    """One message of ChatStream; ``role`` is empty in all but the first."""
    return pb.ChatChunk(
        request_id=request_id,
        delta=_said(role, piece),
        token_ids=piece.token_ids,
        logprobs=_positions(piece),
        finish=_finish(piece),
        usage=_usage(piece),
    )


def _said(role: str, piece: Piece) -> pb.ChatMessage:
    return pb.ChatMessage(role=role, content=piece.text, reasoning=piece.reasoning)


def _finish(piece: Piece) -> pb.Finish | None:
    if piece.finish_reason is None:
        return None
    finish = pb.Finish(reason=_REASONS.get(piece.finish_reason, pb.FINISH_REASON_UNSPECIFIED))
    if isinstance(piece.stop_reason, str):
        finish.stop_string = piece.stop_reason
    elif piece.stop_reason is not None:
        finish.stop_token_id = piece.stop_reason
    return finish


def _usage(piece: Piece) -> pb.Usage | None:
    cost = piece.cost
    if cost is None:
        return None
    return pb.Usage(
        prompt_tokens=cost.prompt_tokens,
        cached_prompt_tokens=cost.cached_prompt_tokens,
        completion_tokens=cost.completion_tokens,
        reasoning_tokens=cost.reasoning_tokens,
        memshare=None if cost.memshare is None else pb.MemShareUsage(**cost.memshare),
    )


def _positions(piece: Piece) -> list[pb.PositionLogprobs]:
    """Alternatives at every position, the most likely first; the chosen token apart."""
    positions = []
    for token_id, by_token in zip(piece.token_ids, piece.logprobs or (), strict=False):
        if by_token is None:
            positions.append(pb.PositionLogprobs())
            continue
        entries = {token: _logprob(token, entry) for token, entry in by_token.items()}
        top = sorted(entries.values(), key=lambda entry: entry.rank)
        positions.append(pb.PositionLogprobs(chosen=entries.get(token_id), top=top))
    return positions


def _logprob(token_id: int, entry: LogprobLike) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token_id,
        token=entry.decoded_token or "",
        logprob=entry.logprob,
        rank=entry.rank or 0,
    )
