"""A client of the cluster's gRPC interface: whole answers, streams, and an exact answer.

    make serve                             # in another terminal
    python docs/examples/grpc_client.py

It needs ``pip install memshare``: neither vLLM, nor torch, nor Ray.
"""

from __future__ import annotations

import argparse
import sys

from memshare.client import CallError, Client, MemShareOptions, Sampling


def main() -> int:
    """Ask in three ways; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:9000", help="host and port")
    parser.add_argument("--key", help="where the server has a key table")
    args = parser.parse_args()
    sampling = Sampling(max_tokens=24, temperature=0)

    with Client(args.address, key=args.key) as client:
        try:
            whole = client.generate("The capital of France is", sampling)
            print(f"whole: {whole.text!r}, {whole.usage.completion_tokens} tokens")

            print("stream:", end="")
            for chunk in client.chat_stream([("user", "Tell me about lighthouses.")], sampling):
                print(chunk.delta.content, end="", flush=True)
            print()

            exact = client.chat(
                [("user", "Is 91 a prime?")], sampling, memshare=MemShareOptions(enabled=False)
            )
            cost = exact.usage.memshare
            print(f"exact: {exact.message.content!r}")
            print(f"{cost.blocks_shared} blocks shared, at most {cost.peak_kv_blocks} held")
        except CallError as error:
            print(f"{args.address}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
