"""The Ray Serve application from Python, as ``serve run configs/cluster.yaml`` runs it from a file.

    python docs/examples/ray_serve.py

It joins the Ray cluster that ``RAY_ADDRESS`` names, or starts one on this machine.
"""

from __future__ import annotations

import argparse
import json
import urllib.request

from ray import serve

from cluster.app import build

QUESTIONS = ("What is the capital of Japan?", "Name three colours.", "What is 2 + 2?")


def ask(url: str, question: str) -> str:
    """Ask over HTTP, in OpenAI's format."""
    body = {
        "model": "example",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text


def main() -> None:
    """Deploy, ask, shut down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="or a folder, or a hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    application = build(  # every field is checked here, before anything starts
        {
            "model": args.model,
            "served_model_name": "example",
            "engine": {
                "dtype": args.dtype,
                "max_model_len": 2048,
                "block_size": 32,
                "enforce_eager": True,
            },
            "replica": {"cpus": 1, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
            "memshare": {"mode": "share", "policy": {"name": "twins"}},
        }
    )
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    try:
        serve.run(application, name="memshare", route_prefix="/")  # returns when it answers
        for question in QUESTIONS:
            print(f"{question} {ask(f'http://127.0.0.1:{args.port}', question)!r}")
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main()
