"""``memshare demo``: a dozen long stories at once, for a server with too small a KV cache for them.

Start one by ``make serve CONFIG=configs/demo.yaml``, and watch its live page meanwhile. Once the
cache is full, MemShare reclaims blocks, and where that is not enough vLLM preempts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memshare.cli.options import count, say_how_to_reach
from memshare.config import ENV_KEY
from memshare.lab.markdown import table

if TYPE_CHECKING:
    from memshare.client import AsyncClient, GetStatsResponse, Usage

_HEROES = (
    "a lighthouse keeper", "a clockmaker", "a ship's cook", "a mapmaker", "a violin builder",
    "a beekeeper", "a night watchman", "a bridge engineer", "a glassblower", "a postman",
    "a gardener", "an astronomer",
)  # fmt: skip
_REPORT_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--address", default="127.0.0.1:9000", help="host and port of gRPC")
    parser.add_argument("--key", help=f"opens the server; or set {ENV_KEY}")
    parser.add_argument("--stories", type=count, default=len(_HEROES), help="all of them at once")
    parser.add_argument("--tokens", type=count, default=900, help="of each story")


def run(args: argparse.Namespace) -> int:
    """Ask for the stories, and say every few seconds how the server fares.

    Raises:
        UserError: nobody answers, or the server refuses a story.
    """
    key = args.key or os.environ.get(ENV_KEY)
    asyncio.run(_press(args.address, key, args.stories, args.tokens))
    return 0


@dataclass
class _Story:
    """One request, as far as it has come."""

    hero: str
    pieces: int = 0
    usage: Usage | None = None


async def _press(address: str, key: str | None, stories: int, tokens: int) -> None:
    from memshare.client import AsyncClient
    from memshare.core.token_map import TokenMap

    asked = [_Story(_HEROES[i % len(_HEROES)]) for i in range(stories)]
    async with AsyncClient(address, key=key, retries=0) as client:
        with say_how_to_reach("make serve CONFIG=configs/demo.yaml"):
            info = await client.model_info()
        entries = TokenMap(info.block_size).entries(tokens)
        print(
            f"{stories} stories of {tokens} tokens want about "
            f"{stories * (entries + 1)} KV blocks; {info.model} has "
            f"{info.kv_blocks - 1} (mode {info.memshare_mode}, policy {info.memshare_policy})",
            flush=True,
        )
        before = await _stats(client)
        began = time.monotonic()
        done = asyncio.gather(*(_tell(client, story, tokens) for story in asked))
        try:
            while not done.done():
                await asyncio.wait([done], timeout=_REPORT_S)
                _report(time.monotonic() - began, asked, before, await _stats(client))
            await done
        finally:
            done.cancel()
    print(f"\n{_table(asked)}")


async def _tell(client: AsyncClient, story: _Story, tokens: int) -> None:
    from memshare.client import Sampling

    prompt = f"Write a long story, in many chapters, about {story.hero}."
    # To the last token, so that all stories press for all of the time. No seed: beside a CPU build,
    # vLLM fails when it computes a part of a prompt for a request that has one.
    sampling = Sampling(max_tokens=tokens, temperature=0.8, ignore_eos=True)
    async with client.chat_stream([("user", prompt)], sampling) as stream:
        async for chunk in stream:
            story.pieces += 1
            if chunk.HasField("usage"):
                story.usage = chunk.usage


async def _stats(client: AsyncClient) -> GetStatsResponse | None:
    """None if the key is not for operators: the stories go on without."""
    from memshare.client import NotAllowedError

    try:
        return await client.stats()
    except NotAllowedError:
        return None


def _report(
    seconds: float,
    stories: list[_Story],
    before: GetStatsResponse | None,
    now: GetStatsResponse | None,
) -> None:
    pieces = sum(story.pieces for story in stories)
    line = f"{seconds:4.0f} s: {pieces} tokens ({pieces / seconds:.0f} per second)"
    if before is not None and now is not None:
        counted = {
            # Of MemShare's own count: vLLM tells of a preemption when the request runs again.
            name: now.memshare.get(name, 0.0) - before.memshare.get(name, 0.0)
            for name in ("blocks_reclaimed", "preemptions")
        }
        line += (
            f", KV cache {now.kv_cache_usage:.0%} full, {now.requests_running} running, "
            f"{now.requests_waiting} waiting, {counted['blocks_reclaimed']:.0f} blocks reclaimed, "
            f"{counted['preemptions']:.0f} preemptions"
        )
    print(line, flush=True)


def _table(stories: list[_Story]) -> str:
    rows = []
    for story in stories:
        usage = story.usage
        if usage is not None:
            own = usage.memshare
            numbers = (
                usage.completion_tokens, own.peak_kv_blocks, own.blocks_shared, own.preemptions,
            )  # fmt: skip
            rows.append([story.hero, *map(str, numbers)])
    return table(["story of", "tokens", "peak KV blocks", "blocks given up", "preemptions"], rows)
