"""What counting experts costs a step of a real CPU engine.

A mixture of experts with random weights decodes 16 requests. Steps alternate between arms, in
blocks: experts not listened to, listened to and counted in every 16th step, and in every step. Wall
time of a step tells little of a hundredth on a machine that others use; so the time inside
everything that counting adds (the routers' callback, the counts, the metrics) is also summed by
itself, with a clock around each call.

    python -m tools.bench.moe.counting
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

REQUESTS, BLOCK_STEPS = 16, 32
SHAPE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 512,
    "intermediate_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 16,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32,
    "num_experts_per_tok": 4, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "torch_dtype": "bfloat16",
}  # fmt: skip
ARMS = {"off": 0, "every 16th step": 16, "every step": 1}


def main() -> None:
    """Print a table of the arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="blocks of 32 steps of each arm")
    rounds = parser.parse_args().rounds
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
    walls, inside = measure(rounds)
    print("| arm | median step, ms (quartiles) | inside counting, ms a step | of the step |")
    print("| --- | --- | --- | --- |")
    for arm, steps in walls.items():
        low, median, high = (1e3 * q for q in statistics.quantiles(steps, n=4))
        mine = 1e3 * inside[arm] / len(steps)
        print(
            f"| {arm} | {median:.2f} ({low:.2f} to {high:.2f}) | {mine:.3f} | {mine / median:.2%} |"
        )


def measure(rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every step, and seconds inside counting, by arm."""
    from vllm import LLM, SamplingParams

    from memshare.plug_in import plug_in
    from tests.memshare.engine.harness import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_model(Path(folder))
        tokens = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(tokens | SHAPE))
        memshare = {"mode": "off", "experts": {"count_every": 1}}
        llm: Any = LLM(
            folder, load_format="dummy", enforce_eager=True, max_model_len=2048,
            max_num_seqs=REQUESTS, disable_log_stats=False, **plug_in(memshare),
        )  # fmt: skip
        engine = llm.llm_engine
        params = SamplingParams(max_tokens=1900, temperature=0, ignore_eos=True)
        for i in range(REQUESTS):
            engine.add_request(str(i), f"request number {i} of several", params)
        rig = _Rig(engine)
        for _ in range(BLOCK_STEPS):  # prompts, warm-up
            engine.step()
        walls: dict[str, list[float]] = {arm: [] for arm in ARMS}
        inside = dict.fromkeys(ARMS, 0.0)
        for _ in range(rounds):
            for arm, every in ARMS.items():
                rig.switch(every)
                before = rig.inside
                for _ in range(BLOCK_STEPS):
                    start = perf_counter()
                    engine.step()
                    walls[arm].append(perf_counter() - start)
                inside[arm] += rig.inside - before
        engine.engine_core.shutdown()
    return walls, inside


class _Rig:
    """A clock around everything that counting adds, and a switch."""

    def __init__(self, engine: Any) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        core = engine.engine_core.engine_core
        self.inside = 0.0
        self._worker = core.model_executor.driver_worker.worker
        self._connector: Any = get_kv_transfer_group()
        self._watch = self._worker._experts
        stats = core.scheduler.connector.expert_stats
        for owner, names in (
            (self._watch, ("before_step", "after_step")), (stats, ("take", "take_stats")),
        ):  # fmt: skip
            for name in names:
                setattr(owner, name, self._timed(getattr(owner, name)))
        model = self._worker.model_runner.get_model()
        runners = [module for module in model.modules() if isinstance(module, MoERunner)]
        self._routers = [(one.router, self._timed(one.router.capture_fn)) for one in runners]

    def switch(self, every: int) -> None:
        watch = self._watch if every else None
        self._worker._experts = self._connector.expert_watch = watch
        self._watch._every = every or 1
        for router, capture in self._routers:
            router.set_capture_fn(capture if every else None)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = perf_counter()
            result = call(*args)
            self.inside += perf_counter() - start
            return result

        return timed


if __name__ == "__main__":
    main()
