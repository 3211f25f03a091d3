"""How long a comparison will take: an estimate before it begins, from this machine's current speed.

A process prepared like the engines' multiplies matrices of the model's shape for a moment. An
engine step takes that long for all of the model's weights, plus the time to read its KV at the same
speed, plus the time for scheduling. The start of each engine is added. Later load and the length of
answers are unknown; the progress bar measures them.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from memshare.errors import UserError
from memshare.lab.bench.engine_process import call_in_process

_START_S = 15.0  # of an engine, without its weights: mostly imports
_LOAD_BYTES_S = 3e8
_STEP_S = 8e-3  # scheduling, sampling, Python between the layers
_LAYER_S = 1.5e-4  # the same in every layer
_COMPARE_S = 1.5e-3  # to keep or compare the distribution of one token
_SWEEP_BYTES = 256 * 2**20  # more than caches hold, as weights are
_LIMIT_S = 600  # what takes longer is told how to be shorter


@dataclass(frozen=True, slots=True)
class Work:
    """What has to be done.

    Attributes:
        model: folder or hub id.
        dtype: of weights and cache.
        runs: engines, one after the other.
        steps: of each.
        batch: requests in a step, on average.
        context: tokens whose KV a request reads in a step, on average.
        compared: tokens of a run whose distributions are kept or compared.
    """

    model: str
    dtype: str
    runs: int
    steps: float
    batch: float
    context: float
    compared: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """What the machine needs for one model.

    Attributes:
        weights_s: seconds to compute one step's matrix products.
        layers: of the model.
        weight_bytes: of the model.
        kv_token_s: seconds to read the KV of one token.
    """

    weights_s: float
    layers: int
    weight_bytes: float
    kv_token_s: float

    def seconds(self, work: Work) -> float:
        """How long ``work`` takes."""
        step = _STEP_S + _LAYER_S * self.layers + self.weights_s
        step += work.batch * work.context * self.kv_token_s
        start = _START_S + self.weight_bytes / _LOAD_BYTES_S
        return work.runs * (start + work.steps * step + _COMPARE_S * work.compared)


def estimate(work: Work) -> float | None:
    """Seconds that ``work`` will take; None where the model has no shape that is known here."""
    try:
        found = call_in_process(
            f"{__name__}:measure", asdict(work), "a probe of this machine", work.model
        )
    except UserError:
        return None  # the engine will say what is wrong with the model, at length
    return Speed(**found).seconds(work)


def in_words(seconds: float | None, shorter: str) -> str:
    """One sentence for the first line.

    Args:
        seconds: as :func:`estimate` returns them.
        shorter: options that make it shorter, told where it takes more than ten minutes.
    """
    if seconds is None:
        return "How long it takes, the bar will tell once tokens are written."
    minutes = seconds / 60
    about = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{max(seconds, 10):.0f} seconds"
    if minutes >= 90:
        about = f"{minutes / 60:.1f} hours"
    hint = f" That is more than 10 minutes; {shorter}." if seconds > _LIMIT_S else ""
    return f"About {about}, by the speed of this machine just now; the bar will measure it.{hint}"


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Measure :class:`Speed` in this process (see :mod:`memshare.lab.bench.engine_process`)."""
    import torch
    from transformers import AutoConfig

    work = Work(**argument)
    config: Any = AutoConfig.from_pretrained(work.model).get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or hidden // heads
    # Of a mixture of experts, those that one token meets.
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    inner *= getattr(config, "num_experts_per_tok", None) or 1
    layer = hidden * (2 * heads + 2 * kv_heads) * head + 3 * hidden * inner
    weights = layers * layer + config.vocab_size * hidden

    dtype = getattr(torch, work.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = dtype.itemsize
    count = max(2, min(layers, int(_SWEEP_BYTES // (hidden * inner * size))))
    matrices = torch.ones(count, inner, hidden, dtype=dtype, device=device)

    def weight_s(batch: int) -> float:
        """Seconds for one weight, with so many requests."""
        x = torch.ones(batch, hidden, dtype=dtype, device=device)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            total = sum(torch.nn.functional.linear(x, matrix).sum() for matrix in matrices)
            float(total)  # a GPU has done it by then
            times.append(time.perf_counter() - began)
        return sorted(times)[1] / matrices.numel()

    with torch.inference_mode():
        weight_s(1)
        read = weight_s(1)
        computed = weight_s(max(1, round(work.batch)))
    return asdict(
        Speed(weights * computed, layers, weights * size, read * 2 * layers * kv_heads * head)
    )
