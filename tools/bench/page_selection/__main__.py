"""Measure page selection.

    python -m tools.bench.page_selection quality --traces DIR
    python -m tools.bench.page_selection time
    python -m tools.bench.page_selection kernel

``quality``: a passkey in a long text, and the divergence of the next tokens from full attention,
for the best pages and for the newest ones, as many of them. ``time``: steps of a model with random
weights, what choosing takes of them, and what keeping bounds does. ``kernel``: the same for one
layer, without an engine.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tools.bench.page_selection.kernel import measure_kernel
from tools.bench.page_selection.quality import measure_quality
from tools.bench.page_selection.timing import measure_time


def main() -> None:
    parser = argparse.ArgumentParser(prog="page_selection", description="Measure page selection.")
    parts = parser.add_subparsers(dest="part", required=True)
    quality = parts.add_parser("quality")
    quality.add_argument("--model", default="smollm2-135m")
    quality.add_argument("--dtype", default="float32")
    quality.add_argument("--traces", type=Path, help="a folder of recorded texts, for divergence")
    quality.add_argument("--texts", type=int, default=6)
    quality.add_argument("--tokens", type=int, default=48, help="compared in each text")
    quality.add_argument("--keys", type=int, default=10, help="passkeys, evenly spread over depths")
    quality.add_argument("--context", type=int, default=4000)
    quality.add_argument("--budgets", type=float, nargs="+", default=[0.25])
    quality.add_argument("--exempt", type=int, default=2)
    for name in ("time", "kernel"):
        timed = parts.add_parser(name)
        timed.add_argument("--context", type=int, default=8000)
        timed.add_argument("--batches", type=int, nargs="+", default=[1, 4])
        timed.add_argument("--budget", type=float, default=0.25)
        timed.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    if args.part == "quality":
        measure_quality(
            args.model, args.dtype, args.traces, args.texts, args.tokens, args.keys, args.context,
            args.budgets, args.exempt,
        )  # fmt: skip
    elif args.part == "kernel":
        measure_kernel(args.context, args.batches, args.budget, args.steps)
    else:
        measure_time(args.context, args.batches, args.budget, args.steps)


if __name__ == "__main__":
    main()
