"""MemShare in vLLM's own OpenAI server, without Ray: start it, ask it, stop it.

python docs/examples/plain_server.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from memshare.plug_in import plug_in
from memshare.small_model.names import resolve_model

START_S = 600  # a large model loads for minutes


@contextmanager
def server(model: str, port: int, dtype: str) -> Iterator[str]:
    """Run the server; gives its address once it answers."""
    options = plug_in({"mode": "share"})
    command = [
        *[sys.executable, "-m", "vllm.entrypoints.openai.api_server"],
        *["--model", resolve_model(model), "--served-model-name", "example", "--dtype", dtype],
        *["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"],
        *["--block-size", "32", "--enforce-eager"],
        *["--kv-transfer-config", json.dumps(options["kv_transfer_config"])],
        *["--worker-cls", options["worker_cls"]],
    ]
    for_cpus = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env={**for_cpus, **os.environ})
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server answers."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}, see above")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"no answer after {START_S} s")


def ask(url: str, question: str) -> dict[str, object]:
    """Ask in OpenAI's format, and for what the answer cost."""
    body = {
        "model": "example",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 40,
        "temperature": 0,
        "vllm_xargs": {"memshare_usage": "on"},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        reply: dict[str, object] = json.load(answer)
    return reply


def main() -> None:
    """Start, ask, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="or a folder, or a hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with server(args.model, args.port, args.dtype) as url:
        reply = ask(url, "What is the capital of Japan?")
    print(json.dumps(reply["choices"], indent=2))
    print(f"usage: {reply['usage']}")
    print(f"KV memory: {reply['kv_transfer_params']}")


if __name__ == "__main__":
    main()
