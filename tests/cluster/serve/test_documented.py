"""The examples of the documentation, run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from memshare.client import (
    Sampling,
)
from tests.cluster.serve.support import short
from tests.cluster.support.lm_eval import run_lm_eval
from tests.documents import Block, blocks, chat_bodies
from tools.bench.local_cluster import (
    ROOT,
    Server,
)

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


SERVED = [block for block in blocks("python") if "lient" in block.text]


def test_the_example_of_a_grpc_client(server: Server) -> None:
    example = ROOT / "docs" / "examples" / "grpc_client.py"
    command = [sys.executable, example, "--address", server.grpc_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with server.grpc_client() as client:
        reply = client.generate("The capital of France is", Sampling(max_tokens=24, temperature=0))
    assert f"whole: {reply.text!r}, {reply.usage.completion_tokens} tokens" in done.stdout
    assert len(done.stdout.partition("stream:")[2].partition("exact:")[0].split()) >= 4
    assert re.search(r"^0 blocks shared, at most \d+ held$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("block", SERVED, ids=lambda block: block.place)
def test_the_python_of_the_documentation_runs(server: Server, block: Block) -> None:
    text = short(block.text).replace("127.0.0.1:9000", server.grpc_address)
    exec(compile(text, block.place, "exec"), {"client": server.client})


@pytest.mark.proves("interfaces")
@pytest.mark.parametrize(
    "body", chat_bodies(), ids=[f"body{i}" for i, _ in enumerate(chat_bodies())]
)
def test_the_requests_of_the_documentation_are_answered(
    server: Server, body: dict[str, Any]
) -> None:
    """By the model that is served here; some are for a plain vLLM server's name of it."""
    body = {**body, "model": "smollm2", "max_tokens": 6}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0


@pytest.mark.complete
def test_lm_eval_asks_as_the_documentation_says(server: Server, tmp_path: Path) -> None:
    """Three problems, exactly, of which 24 tokens are written: the model is no reasoner."""
    samples = run_lm_eval(server.url, tmp_path, 3, {"memshare": "off"}, max_tokens=24)
    assert len(samples) == 3
    for sample in samples:
        asked: Any = sample.messages
        answer = server.client.chat.completions.create(
            model="smollm2", messages=asked, max_tokens=24, temperature=0,
            extra_body={"vllm_xargs": {"memshare": "off"}},
        )  # fmt: skip
        assert sample.text == answer.choices[0].message.content
        assert sample.problem in asked[0]["content"]
