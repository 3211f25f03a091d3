"""Compare MemShare with plain vLLM and with its own baselines: same work, same KV memory.

Every run is a fresh engine in a process of its own. The arms alternate within a repeat, so that a
machine that speeds up or slows down meets all of them; ratios are taken within a repeat.

    python tools/bench_arms.py --model smollm2-135m --arms dense,oldest,paper --blocks 110
    python tools/bench_arms.py --model dummy-1.1b --arms dense,oldest --blocks 110
    python tools/bench_arms.py --arms dense,off,observe --requests 16 --blocks 400 --repeats 5

``dummy-1.1b`` has random weights and the shape of a 1.1B Llama: on a CPU core its decode steps are
bound by reading weights, as a GPU's are, so that a larger batch costs little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAPER = {  # thresholds as published: 0.9 for steps, 0.8 for blocks (arXiv 2507.21433)
    "policy": {"name": "paper"},
    "steps": {"similarity_threshold": 0.9},
    "distance": {"norm": "paper", "layers": "all", "similarity_threshold": 0.8},
}
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "off": {"mode": "off"},
    "observe": {"mode": "observe", "policy": {"name": "paper"}},
    "oldest": {"policy": {"name": "oldest"}},
    "random": {"policy": {"name": "random"}},
    "paper": PAPER,
    "paper-eager": PAPER | {"trigger": {"kind": "eager"}, "protect": {"recent_tokens": 0}},
}
TASKS = (
    "Add the numbers {numbers} one after another. Write every step as its own paragraph, check it, "
    "and go on.",
    "Sort the numbers {numbers}. Explain every comparison, then verify the result.",
    "Which of {numbers} are prime? Try each divisor and check your reasoning.",
)


@dataclass(frozen=True)
class Run:
    """What one run measured.

    Attributes:
        arm: which arm.
        seconds: from the first request to the last token.
        tokens: generated tokens.
        steps: engine steps.
        preemptions: preempted requests.
        recomputed: tokens computed more than once.
        running: mean requests in a step.
        applied: remaps; reclaimed: blocks that they freed.
        cpu_seconds: CPU time of the engine's process, all threads.
    """

    arm: str
    seconds: float
    tokens: int
    steps: int
    preemptions: int
    recomputed: int
    running: float
    applied: int
    reclaimed: int
    cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Generated tokens an engine step."""
        return self.tokens / self.steps


def main() -> None:
    """Run all arms and print a table."""
    options = _parse()
    if options.run_arm:
        print("RESULT " + json.dumps(asdict(_run(options))))
        return
    runs: list[list[Run]] = []
    arms = options.arms.split(",")
    for repeat in range(options.repeats):
        order = arms if repeat % 2 == 0 else arms[::-1]
        runs.append([_in_own_process(arm) for arm in order])
        for run in runs[-1]:
            print(f"repeat {repeat + 1}: {run}", file=sys.stderr, flush=True)
    print(_table(arms, runs, options))
    if options.json:
        Path(options.json).write_text(json.dumps([[asdict(run) for run in r] for r in runs]))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name, path, or dummy-1.1b")
    parser.add_argument("--arms", default="dense,oldest,random,paper", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=400, help="generated tokens a request")
    parser.add_argument("--blocks", type=int, default=110, help="KV blocks of --block-size tokens")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.5, help="budget.max_shared_fraction")
    parser.add_argument("--recent", type=int, default=128, help="protect.recent_tokens")
    parser.add_argument("--json", help="write every run to this file")
    parser.add_argument("--run-arm", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_own_process(arm: str) -> Run:
    from tools.runtime_env import runtime_env

    environment = runtime_env(os.environ) | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, *sys.argv, "--run-arm", arm],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return Run(**json.loads(line.removeprefix("RESULT ")))
    raise SystemExit(f"arm {arm} failed:\n{done.stderr[-4000:]}")


def _run(options: argparse.Namespace) -> Run:
    from vllm import LLM, SamplingParams

    from memshare.plug_in import plug_in

    memshare = ARMS[options.run_arm]
    common = {
        "budget": {"max_shared_fraction": options.budget},
        "protect": {"recent_tokens": options.recent},
    }
    plugged = plug_in(None if memshare is None else common | memshare)
    llm = LLM(
        _model(options.model), **_model_options(options.model), dtype=options.dtype,
        max_model_len=2048, block_size=options.block_size, num_gpu_blocks_override=options.blocks,
        enforce_eager=True, seed=0, disable_log_stats=False, **plugged,
    )  # fmt: skip
    prompts = [
        TASKS[i % len(TASKS)].format(
            numbers=", ".join(str((7 * i + 13 * k + k * k) % 97) for k in range(8))
        )
        for i in range(options.requests)
    ]
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    steps: list[tuple[int, int]] = []  # requests and tokens of every engine step
    schedule = scheduler.schedule

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        steps.append((len(output.num_scheduled_tokens), output.total_num_scheduled_tokens))
        return output

    llm.generate(prompts[:1], SamplingParams(max_tokens=4), use_tqdm=False)  # warm up
    llm.reset_prefix_cache()
    before = _preemptions(llm)
    scheduler.schedule = watched
    params = SamplingParams(max_tokens=options.tokens, temperature=0, ignore_eos=True)
    cpu, start = time.process_time(), time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    # Every prompt token and every generated token but each last one is computed once.
    once = generated - len(outputs) + sum(len(output.prompt_token_ids or ()) for output in outputs)
    side = getattr(scheduler.connector, "scheduler_side", None)
    totals = side.journal.tally.totals if side is not None else {}
    return Run(
        arm=options.run_arm,
        seconds=seconds,
        tokens=generated,
        steps=len(steps),
        preemptions=_preemptions(llm) - before,
        recomputed=max(0, sum(tokens for _, tokens in steps) - once),
        running=sum(requests for requests, _ in steps) / len(steps),
        applied=totals.get("applied", 0),
        reclaimed=totals.get("blocks_reclaimed", 0),
        cpu_seconds=cpu,
    )


def _preemptions(llm: Any) -> int:
    return int(sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"))


def _model(name: str) -> str:
    from memshare.model import resolve_model

    if name != "dummy-1.1b":
        return resolve_model(name)
    real = Path(resolve_model("smollm2-135m"))
    folder = Path(tempfile.gettempdir()) / "memshare-dummy-1.1b"
    folder.mkdir(exist_ok=True)
    for file in real.iterdir():  # the tokenizer; the weights are random
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((real / "config.json").read_text())
    config |= {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "head_dim": 64,
        "num_key_value_heads": 4, "intermediate_size": 5632,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _model_options(name: str) -> dict[str, Any]:
    return {"load_format": "dummy"} if name == "dummy-1.1b" else {}


def _table(arms: list[str], runs: list[list[Run]], options: argparse.Namespace) -> str:
    first = arms[0]
    lines = [
        f"{options.requests} requests x {options.tokens} tokens, {options.model} "
        f"({options.dtype}), {options.blocks} blocks of {options.block_size}, "
        f"budget {options.budget}, recent window {options.recent}, {options.repeats} repeats, "
        f"{_machine()}.",
        f"Medians (min-max); ratios to {first} within a repeat.",
        "",
        "| arm | tok/s | ratio | tok/step | steps | preemptions | recomputed tokens | "
        "mean running | blocks reclaimed | CPU s | ratio |",
        "| --- " * 11 + "|",
    ]
    for arm in arms:
        mine = [run for repeat in runs for run in repeat if run.arm == arm]
        base = [run for repeat in runs for run in repeat if run.arm == first]
        speed = [a.tokens_per_second / b.tokens_per_second for a, b in zip(mine, base, strict=True)]
        cost = [a.cpu_seconds / b.cpu_seconds for a, b in zip(mine, base, strict=True)]
        cells = (
            _spread([run.tokens_per_second for run in mine], 1),
            _spread(speed, 3),
            _spread([run.tokens_per_step for run in mine], 2),
            _spread([run.steps for run in mine], 0),
            _spread([run.preemptions for run in mine], 0),
            _spread([run.recomputed for run in mine], 0),
            _spread([run.running for run in mine], 1),
            _spread([run.reclaimed for run in mine], 0),
            _spread([run.cpu_seconds for run in mine], 1),
            _spread(cost, 3),
        )
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float] | list[int], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return middle if low == high else f"{middle} ({low}-{high})"


def _machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} x {model}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
