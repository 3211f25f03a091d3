"""Python client of a MemShare cluster, over gRPC. Needs neither torch, nor vLLM, nor Ray.

::

    from memshare.client import Client, Sampling

    with Client("127.0.0.1:9000") as client:
        reply = client.generate("The capital of France is", Sampling(max_tokens=8, temperature=0))
        print(reply.text, reply.usage.memshare.peak_kv_blocks)
        for chunk in client.chat_stream([("user", "Prove that 97 is prime.")]):
            print(chunk.delta.content, end="", flush=True)

:class:`AsyncClient` has the same methods as coroutines and async iterators. Messages are those of
``memshare/proto/memshare.proto``.
"""

from memshare.client.aio import AsyncClient
from memshare.client.errors import (
    AbortedError,
    CallError,
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    OverloadedError,
    TimedOutError,
    UnavailableError,
)
from memshare.client.sync import Client
from memshare.proto.memshare_pb2 import (
    ChatChunk,
    ChatMessage,
    ChatResponse,
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateResponse,
    GetModelInfoResponse,
    GetStatsResponse,
    MemShareOptions,
    MemShareUsage,
    Sampling,
    Usage,
)

__all__ = [
    "AbortedError",
    "AsyncClient",
    "CallError",
    "ChatChunk",
    "ChatMessage",
    "ChatResponse",
    "Client",
    "Finish",
    "FinishReason",
    "GenerateChunk",
    "GenerateResponse",
    "GetModelInfoResponse",
    "GetStatsResponse",
    "InvalidRequestError",
    "MemShareOptions",
    "MemShareUsage",
    "NotAllowedError",
    "NotFoundError",
    "OverloadedError",
    "Sampling",
    "TimedOutError",
    "UnavailableError",
    "Usage",
]
