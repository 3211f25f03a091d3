"""Forced decoding: requests write recorded tokens, whatever the model would have said.

What it would have said is kept on the first run, and compared with on later ones. A vLLM logits
processor (vllm/v1/sample/logits_processor/interface.py); requests that do not ask for it are left
alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from memshare.replay.damage import COLUMNS, measure

EXTRA_ARG = "replay"


def forced(
    tokens: list[int], measure_from: int, count: int, exact: str, measured: str | None
) -> SamplingParams:
    """Sampling parameters of a request that writes ``tokens``.

    Args:
        tokens: what it writes.
        measure_from: output position of the first measured token.
        count: measured tokens.
        exact: file with ``[count, vocabulary]`` float16 log-probabilities.
        measured: file for ``[count, len(COLUMNS)]`` float32 measurements against ``exact``; None
            writes ``exact`` instead.
    """
    return SamplingParams(
        max_tokens=len(tokens),
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            EXTRA_ARG: {
                "tokens": tokens, "measure_from": measure_from, "count": count, "exact": exact,
                "measured": measured,
            }
        },
    )  # fmt: skip


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
                stream.measure(position, logits[row], token)
                logits[row] = -torch.inf
                logits[row, token] = 0.0
        return logits

    def _stream(
        self, params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> _Stream | None:
        asked = (params.extra_args or {}).get(EXTRA_ARG)
        return None if asked is None else _Stream(output, self._vocabulary, **asked)


class _Stream:
    """One request's recorded tokens, and its measurements."""

    def __init__(
        self,
        output: list[int],
        vocabulary: int,
        *,
        tokens: list[int],
        measure_from: int,
        count: int,
        exact: str,
        measured: str | None,
    ) -> None:
        self.output = output  # vLLM's own list: it grows
        self.tokens = tokens
        self._from = measure_from
        self._count = count
        self._exact: Any = np.memmap(
            exact, np.float16, "w+" if measured is None else "r", shape=(count, vocabulary)
        )
        self._measured: Any = None
        if measured is not None:
            shape = (count, len(COLUMNS))
            self._measured = np.memmap(measured, np.float32, "w+", shape=shape)

    def measure(self, position: int, logits: torch.Tensor, token: int) -> None:
        """Keep the distribution, or compare it with the exact one."""
        i = position - self._from
        if not 0 <= i < self._count:
            return
        ours = logits.float().log_softmax(-1).cpu()
        if self._measured is None:
            self._exact[i] = ours.numpy().astype(np.float16)
            return
        exact = torch.from_numpy(self._exact[i].astype(np.float32))
        self._measured[i] = measure(exact[None], ours[None], torch.tensor([token]))[0].numpy()
