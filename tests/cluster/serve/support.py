"""What the tests of the server share."""

from __future__ import annotations

import re

import psutil
from openai.types.chat import ChatCompletionMessageParam

from cluster.config import ReplicaConfig
from memshare.client import Sampling
from tools.bench.local_cluster import Server, victims

QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Tell me a long story about a lighthouse."}
]
GREEDY = Sampling(temperature=0, max_tokens=12)
ENDLESS = Sampling(max_tokens=3900, ignore_eos=True)
PROMPT = "The lighthouse keeper counted the waves: one, two,"
AGAIN_S = ReplicaConfig().unavailable_retry_after_s


def short(text: str) -> str:
    """An example of the documentation, with answers that do not take long."""
    return re.sub(r"max_tokens=\d+", "max_tokens=6", text)


def guards() -> list[psutil.Process]:
    """The shells that outlive our replicas by an instant; nobody's children."""
    groups = {str(replica.pid) for replica in victims("replica")}
    shells = [p for p in psutil.process_iter(["cmdline"]) if "memshare-guard" in p.info["cmdline"]]
    return [shell for shell in shells if shell.info["cmdline"][-1] in groups]


def assert_that_blocks_are_reclaimed(server: Server) -> None:
    client = server.client
    for _ in range(4):
        answer = client.chat.completions.create(
            model="smollm2",
            messages=QUESTION,
            max_tokens=256,
            temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": {"memshare_usage": "on"}},
        )
        usage = (answer.model_extra or {})["kv_transfer_params"]["memshare"]
        if usage["blocks_shared"]:
            break
    for what in ("candidates", "verified", "applied", "blocks_reclaimed"):
        assert server.metric(f"vllm:memshare_{what}_total") > 0, what
    assert 0 < usage["peak_kv_blocks"] <= -(-(256 + 40) // 32)
