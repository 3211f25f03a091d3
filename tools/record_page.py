"""Record what the live page says of a real replica that is short of KV memory.

    python tools/record_page.py tests/cluster/dashboard/page/recorded.json

Starts a server with a small KV cache on this machine, has it write a dozen long stories, and keeps
what the page's API says of it, with the trace of the request that has given up most blocks. The
tests of the page and its pictures show that. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from tools.bench.local_cluster import Server, cluster_file, local_ray, memshare_in, running_server

BLOCKS = 140  # of 32 tokens: a dozen stories want twice as many
STORIES = 12
TOKENS = 700
KEPT = ("blocks", "kinds", "requests", "samples")
SUBJECTS = (
    "a lighthouse", "a lost river", "two clocks", "the last train", "a garden in winter",
    "a map without names", "the blue door", "an honest thief", "a violin", "the deep well",
    "a paper boat", "the watchmaker",
)  # fmt: skip


def document() -> dict[str, Any]:
    """The CPU file, short of memory, with texts in its traces."""
    made = cluster_file()
    arguments = made["applications"][0]["args"]
    arguments["engine"]["num_gpu_blocks_override"] = BLOCKS
    arguments["page"] = {"show_text": True}
    memshare_in(made)["budget"] = {"max_shared_fraction": 0.25}
    return made


def write(client: openai.OpenAI, subject: str) -> None:
    """One story to its end."""
    client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": f"Tell me a very long story about {subject}."}],
        max_tokens=TOKENS,
        temperature=0.0,
        extra_body={"ignore_eos": True},
    )


def ask(server: Server, path: str, **query: str) -> dict[str, Any]:
    """The page's API."""
    answer = httpx.get(f"{server.url}/memshare/api/{path}", params=query, timeout=60)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def record(server: Server) -> dict[str, Any]:
    """Have stories written until memory is short, and keep the richest moment."""
    writers = [
        threading.Thread(target=write, args=(server.client, subject), daemon=True)
        for subject in SUBJECTS[:STORIES]
    ]
    for writer in writers:
        writer.start()
        time.sleep(1)
    best: dict[str, Any] = {}
    given_up = 0
    while any(writer.is_alive() for writer in writers):
        time.sleep(3)
        state = ask(server, "state")
        if not state["replicas"]:
            continue
        (replica,) = state["replicas"]
        row = max(replica["requests"], key=lambda row: row["shared"], default=None)
        if row is None:
            continue
        print(f"{len(replica['requests'])} requests, {row['shared']} blocks of one given up")
        if row["shared"] >= max(given_up, 1) and len(replica["requests"]) > STORIES // 3:
            trace = ask(server, "trace", replica=replica["id"], request=row["request"])
            if trace.get("reused"):
                kept = {name: replica[name] for name in KEPT}
                best = {"fields": state["fields"], "replica": kept, "trace": trace}
                given_up = row["shared"]
    return best


def main() -> None:
    """Record, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    with (
        local_ray(),
        tempfile.TemporaryDirectory(prefix="memshare-") as folder,
        running_server(Path(folder), document()) as server,
    ):
        recorded = record(server)
    args.output.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
