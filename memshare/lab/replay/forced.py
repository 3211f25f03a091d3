"""Forced decoding: requests write recorded tokens, whatever the model would have said.

On request, the first run records the model's own distributions, and later runs are compared with
them. This is a vLLM logits processor (vllm/v1/sample/logits_processor/interface.py); it ignores
requests that do not ask for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from memshare.lab.replay.divergence import COLUMNS, measure

EXTRA_ARG = "replay"


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is kept of a request's distributions.

    Attributes:
        start: output position of the first measured token.
        count: measured tokens.
        exact: file with ``[count, vocabulary]`` float16 log-probabilities.
        measured: file for ``[count, len(COLUMNS)]`` float32 measurements against ``exact``; None
            writes ``exact`` instead.
    """

    start: int
    count: int
    exact: str
    measured: str | None


def forced(tokens: list[int], measurement: Measurement | None = None) -> SamplingParams:
    """Sampling parameters of a request that writes ``tokens``, and measures if asked to."""
    asked = {"tokens": tokens, "measurement": measurement and asdict(measurement)}
    return SamplingParams(
        max_tokens=len(tokens),
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={EXTRA_ARG: asked},
    )


class ForcedDecoding(LogitsProcessor):
    """See module docstring."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del device, is_pin_memory
        self._vocabulary = vllm_config.model_config.get_vocab_size()
        self._streams: dict[int, _Stream] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides which token is written."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they come, go and move in the batch."""
        process_dict_updates(self._streams, batch_update, self._stream)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Measure, then leave one token possible; ``logits`` is ``[requests, vocabulary]``."""
        for row, stream in self._streams.items():
            position = len(stream.output)
            if position < len(stream.tokens):
                token = stream.tokens[position]
                if stream.meter is not None:
                    stream.meter.measure(position, logits[row], token)
                logits[row] = -torch.inf
                logits[row, token] = 0.0
        return logits

    def _stream(
        self, params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> _Stream | None:
        asked = (params.extra_args or {}).get(EXTRA_ARG)
        if asked is None:
            return None
        wanted = asked["measurement"]
        meter = None if wanted is None else _Meter(Measurement(**wanted), self._vocabulary)
        return _Stream(output, asked["tokens"], meter)


@dataclass(frozen=True, slots=True)
class _Stream:
    """One request's recorded tokens."""

    output: list[int]  # vLLM's own list: it grows
    tokens: list[int]
    meter: _Meter | None


class _Meter:
    """One request's measurements."""

    def __init__(self, wanted: Measurement, vocabulary: int) -> None:
        self._wanted = wanted
        self._exact: Any = np.memmap(
            wanted.exact, np.float16, "w+" if wanted.measured is None else "r",
            shape=(wanted.count, vocabulary),
        )  # fmt: skip
        self._measured: Any = None
        if wanted.measured is not None:
            shape = (wanted.count, len(COLUMNS))
            self._measured = np.memmap(wanted.measured, np.float32, "w+", shape=shape)

    def measure(self, position: int, logits: torch.Tensor, token: int) -> None:
        """Keep the distribution, or compare it with the exact one."""
        i = position - self._wanted.start
        if not 0 <= i < self._wanted.count:
            return
        ours = logits.float().log_softmax(-1).cpu()
        if self._measured is None:
            self._exact[i] = ours.numpy().astype(np.float16)
            return
        exact = torch.from_numpy(self._exact[i].astype(np.float32))
        self._measured[i] = measure(exact[None], ours[None], torch.tensor([token]))[0].numpy()
