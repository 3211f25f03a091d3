"""Steps of a model with random weights, whose attention is worth the name.

CPU time of the process, which what else runs on the machine does not lengthen. With one thread that
is the time of a step on an idle machine, but for memory traffic.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memshare.engine.vllm_0_32.view.selecting import SelectingImpl
from memshare.lab.markdown import table_head, table_row
from memshare.mechanisms.selection.bounds import PageBounds
from memshare.mechanisms.selection.choice import PageChooser
from tools.bench.page_selection.engine import Arm, ForcingEngine, best, everything

_SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
    "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}  # fmt: skip
_EXEMPT = 2


class Watch:
    """Seconds of CPU time inside some functions, since it was last read."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def on(self, owner: Any, method: str, name: str) -> None:
        """Time a method of a class from now on."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Read it."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def measure_time(context: int, batches: list[int], budget: float, steps: int) -> None:
    """Print a table: both arms take turns in one engine, on the same requests."""
    watch = Watch()
    watch.on(SelectingImpl, "forward", "attention")
    watch.on(PageChooser, "choose", "choosing")
    watch.on(PageChooser, "begin", "planning")
    watch.on(PageBounds, "write", "bounds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(_SHAPE))
        most = max(batches)
        engine = ForcingEngine(
            name, _EXEMPT, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True,
            max_model_len=context + 1024, max_num_seqs=most, max_num_batched_tokens=2048,
            num_gpu_blocks_override=most * (context // 32 + 34) + 8, enable_prefix_caching=False,
        )  # fmt: skip
    heads = (
        "requests", "pages read", "step ms, all pages", "step ms", "ratio", "attention ms, all",
        "attention ms", "choosing", "planning", "bounds", "of attention, all",
    )  # fmt: skip
    print(table_head(heads))
    for batch in batches:
        print(table_row(_row(engine, watch, context, batch, budget, steps)), flush=True)


def _row(
    engine: ForcingEngine, watch: Watch, context: int, batch: int, budget: float, steps: int
) -> list[str]:
    from vllm import SamplingParams

    llm: Any = engine.llm.llm_engine
    scheduler = llm.engine_core.engine_core.scheduler
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, detokenize=False)
    rng = np.random.default_rng(0)
    names = [f"{batch}-{number}" for number in range(batch)]
    for name in names:
        prompt = rng.integers(10, 2000, context).tolist()
        llm.add_request(name, {"prompt_token_ids": prompt}, params)
    engine.use(everything(_EXEMPT))
    while any(request.num_computed_tokens < context for request in scheduler.requests.values()):
        llm.step()
    arms: dict[str, Arm] = {"all": everything(_EXEMPT), "best": best(budget, _EXEMPT)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    read = 0.0
    for _ in range(steps):  # in turns: what else runs here meets both
        for name, arm in arms.items():
            engine.use(arm)
            llm.step()  # buffers and caches of the arm
            for _ in range(2):
                watch.take()
                start = time.process_time()
                llm.step()
                times[name].append((time.process_time() - start) * 1e3)
                parts[name].append(watch.take())
            read = engine.read
    llm.abort_request(names)
    while llm.has_unfinished_requests():
        llm.step()

    def part(arm: str, name: str) -> float:
        return statistics.median(one.get(name, 0.0) * 1e3 for one in parts[arm])

    whole, chosen = (statistics.median(times[name]) for name in arms)
    cost = [part("best", name) for name in ("choosing", "planning", "bounds")]
    # Of the layers that choose: the others read everything in both arms.
    layers = _SHAPE["num_hidden_layers"]
    share = sum(cost) / (part("all", "attention") * (layers - _EXEMPT) / layers)
    form: Callable[[float], str] = "{:.2f}".format
    return [
        str(batch), f"{read:.1%}", form(whole), form(chosen), f"{whole / chosen:.2f}x",
        form(part("all", "attention")), form(part("best", "attention")), *map(form, cost),
        f"{share:.1%}",
    ]  # fmt: skip
