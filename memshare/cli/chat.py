"""``memshare chat``: talk to a cluster over gRPC.

With a question as argument, or in a pipe, it is answered and the command ends. Otherwise questions
are read from the terminal: ``/new`` forgets the conversation, ``/quit`` or Ctrl-D ends. Answers go
to standard output as they come, what they cost to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from memshare.cli.options import say_how_to_reach
from memshare.config import ENV_KEY
from memshare.errors import UserError

if TYPE_CHECKING:
    from memshare.client import ChatMessage, Client, MemShareOptions, Sampling, Usage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("question", nargs="?", help="answered, and the command ends")
    parser.add_argument("--address", default="127.0.0.1:9000", help="host and port of gRPC")
    parser.add_argument("--key", help=f"opens the server; or set {ENV_KEY}")
    parser.add_argument("--tls", action="store_true", help="the address speaks TLS (a gateway)")
    parser.add_argument("--model", default="", help="name of the model; the served one by default")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max-tokens", type=int, help="of an answer; as many as fit by default")
    parser.add_argument("--temperature", type=float, help="0 is greedy; the model's by default")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--memshare", choices=["on", "off"], help="off keeps the answer exact; on by default"
    )
    parser.add_argument("--timeout", type=float, help="seconds for an answer; none by default")


def run(args: argparse.Namespace) -> int:
    """Answer one question, or talk; return the exit status."""
    import grpc

    from memshare.client import Client

    credentials = grpc.ssl_channel_credentials() if args.tls else None
    key = args.key or os.environ.get(ENV_KEY)
    with Client(args.address, key=key, session=uuid.uuid4().hex, credentials=credentials) as client:
        talk = _Talk(client, args)
        if args.question is not None or not sys.stdin.isatty():
            with say_how_to_reach("make serve"):
                talk.answer(sys.stdin.read() if args.question is None else args.question)
        else:
            _converse(talk)
    return 0


def _converse(talk: _Talk) -> None:
    """Answer question after question. One that fails, or is interrupted, leaves no trace."""
    import readline  # noqa: F401 - gives input() its history

    for question in _questions():
        if question == "/new":
            talk.forget_conversation()
            continue
        try:
            talk.answer(question)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n[interrupted]", file=sys.stderr)


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question == "/quit":
            return
        if question:
            yield question


class _Talk:
    """A conversation."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self._client = client
        self._args = args
        self._sampling = _sampling(args)
        self._memshare = _memshare(args)
        self._messages: list[ChatMessage | tuple[str, str]] = []
        self.forget_conversation()

    def forget_conversation(self) -> None:
        """Begin anew."""
        system = self._args.system
        self._messages = [("system", system)] if system is not None else []

    def answer(self, question: str) -> None:
        """Print the answer as it comes, then what it cost.

        Raises:
            UserError: the call fails.
        """
        from memshare.client import ChatMessage

        asked = [*self._messages, ("user", question)]
        began = time.monotonic()
        said = ChatMessage(role="assistant")
        usage = None
        with self._client.chat_stream(
            asked,
            self._sampling,
            memshare=self._memshare,
            model=self._args.model,
            timeout=self._args.timeout,
        ) as stream:
            for chunk in stream:
                _print_piece(said, chunk.delta)
                said.content += chunk.delta.content
                said.reasoning += chunk.delta.reasoning
                if chunk.HasField("usage"):
                    usage = chunk.usage
        print()
        if usage is not None:
            print(f"[{describe(usage, time.monotonic() - began)}]", file=sys.stderr)
        # Earlier reasoning is left out, as the models' own templates do.
        self._messages = [*asked, ("assistant", said.content)]


def _print_piece(said: ChatMessage, delta: ChatMessage) -> None:
    """Reasoning goes to standard error, so that standard output is the answer alone."""
    if delta.reasoning:
        print(delta.reasoning, end="", file=sys.stderr, flush=True)
    if delta.content:
        if said.reasoning and not said.content:
            print(file=sys.stderr)
        print(delta.content, end="", flush=True)


def describe(usage: Usage, seconds: float) -> str:
    """What an answer cost, in one line."""
    parts = [f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"]
    if usage.cached_prompt_tokens:
        parts[0] += f" ({usage.cached_prompt_tokens} of the prompt cached)"
    parts.append(f"{seconds:.1f} s")
    if usage.HasField("memshare"):
        memshare = usage.memshare
        parts.append(f"peak {memshare.peak_kv_blocks} KV blocks, {memshare.blocks_shared} shared")
        if memshare.preemptions:
            parts.append(f"preempted {memshare.preemptions} times")
    return ", ".join(parts)


def _sampling(args: argparse.Namespace) -> Sampling:
    from memshare.client import Sampling

    return Sampling(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)


def _memshare(args: argparse.Namespace) -> MemShareOptions | None:
    from memshare.client import MemShareOptions

    return None if args.memshare is None else MemShareOptions(enabled=args.memshare == "on")
