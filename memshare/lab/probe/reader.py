"""A transformers model that reads texts, says what it attends to, and reads on over fewer tokens.

Everything that a probe learns from and is judged by comes from here. The model runs by itself, not
in an engine, and in float32 unless it is asked otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - as torch calls it
from torch import Tensor

from memshare.errors import UserError
from memshare.kv.rotary import Rotation, RotationUnknown
from memshare.lab.cache_reading import CacheReading, cached, empty_cache, filled_cache
from memshare.lab.probe.texts import Text
from memshare.lab.replay.divergence import measure
from memshare.mechanisms.compaction.probe.turn import upright
from memshare.small_model.names import tokenizer_of

_ATTENTION = "memshare_watched"
_INTRO = "\n\nLet me repeat all of the above.\n\n"
_CHUNK = 256  # tokens that the model repeats at a time


class Watcher(Protocol):
    """Sees each attention layer's operands."""

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """queries: ``[heads, N, channels]`` of the last N tokens; keys, values: ``[KV heads, M,
        channels]``. None of them may be modified."""


class CacheReader:
    """A causal language model with rotary embeddings, as a probe's teacher and judge.

    Attributes:
        tokenizer: the model's.
        device: where it runs, as torch names it.
        rotation: that its cached keys went through.
        layers: attention layers.
        heads: KV heads of each.
        query_heads: that share these.
        channels: of one head.
    """

    def __init__(
        self, model: str, device: str = "cpu", dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        """Load a model.

        Args:
            model: folder or hub id.
            device: where it runs, as torch names it.
            dtype: of weights and cache.

        Raises:
            UserError: there is no such model, or its keys' rotation cannot be undone.
        """
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        self.tokenizer = tokenizer_of(model)
        self.device = device
        self._device = torch.device(device)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self._model.to(self._device).set_attn_implementation(_ATTENTION)
        self._name = model
        self.rotation = self._learn_rotation()
        keys, _ = self._read_cache([0, 0])
        self.layers, self.heads, _, self.channels = keys.shape
        self.query_heads: int = self._model.config.num_attention_heads
        self._check_rotation(keys)

    @torch.inference_mode()
    def read(self, text: Text, prefix: int, continuation: int = 0) -> CacheReading:
        """Read ``prefix`` tokens of a text, and ``continuation`` more for the distributions."""
        tokens = torch.tensor(text.tokens[: prefix + continuation], device=self._device)
        cache = empty_cache()
        out = self._model(tokens[None], past_key_values=cache, logits_to_keep=max(continuation, 1))
        log_probs = out.logits[0, : len(tokens) - prefix].float().log_softmax(-1)
        keys, values = cached(cache, prefix)
        return CacheReading(tokens, text.prompt, prefix, keys, values, log_probs)

    @torch.inference_mode()
    def read_watched(self, text: Text, prefix: int, watcher: Watcher) -> CacheReading:
        """Read ``prefix`` tokens of a text, ``_CHUNK`` at a time, while ``watcher`` looks on."""
        tokens = torch.tensor(text.tokens[:prefix], device=self._device)
        cache, read = empty_cache(), 0
        for chunk in tokens.split(_CHUNK):
            self._read_on(chunk, read, cache, 1, watcher)
            read += len(chunk)
        keys, values = cached(cache, prefix)
        nothing = torch.empty(0, device=self._device)
        return CacheReading(tokens, text.prompt, prefix, keys, values, nothing)

    @torch.inference_mode()
    def read_routers(self, text: Text, prefix: int) -> tuple[Tensor, int]:
        """What the routers of a mixture of experts say about a text.

        Returns:
            Logits ``[layers with experts, prefix, experts]`` in float32, and how many experts
            a token is sent to.

        Raises:
            UserError: the model has no experts, or keeps what its routers say to itself.
        """
        chosen = getattr(self._model.config, "num_experts_per_tok", None)
        if chosen is None:
            raise UserError(f"{self._name} is no mixture of experts")
        tokens = torch.tensor([text.tokens[:prefix]], device=self._device)
        out = self._model.model(tokens, output_router_logits=True)
        logits = getattr(out, "router_logits", None)
        if not logits:
            raise UserError(f"{self._name} does not tell what its routers say")
        return torch.stack([layer.float().view(prefix, -1) for layer in logits]), int(chosen)

    @torch.inference_mode()
    def repeat(self, reading: CacheReading, watcher: Watcher) -> None:
        """Let the model repeat what stands behind the prompt, while ``watcher`` looks on.

        It repeats ``_CHUNK`` tokens at a time; each chunk sees the prefix and itself, as in KVzip
        (arXiv 2505.23416).
        """
        intro = self.tokenizer(_INTRO, add_special_tokens=False)["input_ids"]
        again = torch.cat(
            (
                torch.tensor(intro, device=self._device, dtype=torch.long),
                reading.tokens[reading.prompt : reading.prefix],
            )
        )
        cache = filled_cache(reading.keys, reading.values)
        for chunk in again.split(_CHUNK):
            self._read_on(chunk, reading.prefix, cache, 1, watcher)
            cache.crop(-len(chunk))

    @torch.inference_mode()
    def read_on(
        self, tokens: Tensor, position: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read tokens over a cache of earlier ones, each layer and head with tokens of its own.

        Args:
            tokens: ``[N]``.
            position: of the first of them.
            keys: ``[layers, heads, M, channels]``; not modified.
            values: the same of V.

        Returns:
            Their keys and values, ``[layers, heads, N, channels]``.
        """
        cache = filled_cache(keys, values)
        self._read_on(tokens, position, cache, 1)
        behind = keys.shape[2]
        both = cached(cache, behind + len(tokens))
        return both[0][:, :, behind:], both[1][:, :, behind:]

    @torch.inference_mode()
    def judge(
        self, reading: CacheReading, keys: Tensor, values: Tensor, hidden: Tensor | None = None
    ) -> npt.NDArray[np.float32]:
        """Read the continuation over what is left of the prefix.

        Args:
            reading: with a continuation.
            keys: ``[layers, heads, kept, channels]`` as cached.
            values: the same of V.
            hidden: ``[layers, heads, kept]`` bool, which of them nobody sees; None for none.

        Returns:
            ``[C - 1, len(COLUMNS)]`` (:mod:`memshare.lab.replay.divergence`).
        """
        rest = reading.tokens[reading.prefix :]
        cache = filled_cache(keys, values)
        logits = self._read_on(rest[:-1], reading.prefix, cache, len(rest) - 1, hidden=hidden)
        shared = logits.float().log_softmax(-1)
        measured: npt.NDArray[np.float32] = (
            measure(reading.log_probs[:-1], shared, rest[1:]).cpu().numpy()
        )
        return measured

    @torch.inference_mode()
    def write(self, prompt: Sequence[int], least: int, most: int, seed: int) -> list[int]:
        """Let the model write behind a prompt: sampled, ``least`` to ``most`` tokens."""
        torch.manual_seed(seed)
        ids = torch.tensor([list(prompt)], device=self._device)
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=least, max_new_tokens=most,
            do_sample=True, temperature=1.0, top_p=0.95, pad_token_id=0,
        )  # fmt: skip
        written: list[int] = out[0, len(prompt) :].tolist()
        return written

    def upright(self, keys: Tensor, first: int = 0) -> Tensor:
        """Undo the rotation of consecutive keys: ``[layers, heads, tokens, channels]``."""
        positions = torch.arange(first, first + keys.shape[2], device=keys.device)
        return upright(keys.float(), positions, self.rotation)

    def _read_on(
        self,
        tokens: Tensor,
        position: int,
        cache: Any,
        logits: int,
        watcher: Watcher | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        positions = torch.arange(position, position + len(tokens), device=self._device)
        out = self._model(
            tokens[None], past_key_values=cache, position_ids=positions[None],
            logits_to_keep=logits, watcher=watcher, hidden=hidden,
        )  # fmt: skip
        found: Tensor = out.logits[0]
        return found

    @torch.inference_mode()
    def _read_cache(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        cache = empty_cache()
        self._model(torch.tensor([tokens], device=self._device), past_key_values=cache)
        return cached(cache, len(tokens))

    def _learn_rotation(self) -> Rotation:
        rotary = getattr(getattr(self._model, "model", None), "rotary_emb", None)
        if rotary is None:
            raise UserError(
                f"{self._name}: its keys carry no rotary embedding that a probe could undo; use "
                "the scorer 'recency' for this model"
            )
        longest = self._model.config.max_position_embeddings
        positions = torch.arange(longest, device=self._device)
        cos, sin = rotary(torch.zeros(1, device=self._device), positions[None])
        half = cos.shape[-1] // 2
        neox = torch.equal(cos[0, :, :half], cos[0, :, half:])
        pick = slice(0, half) if neox else slice(0, None, 2)
        try:
            return Rotation.from_cache(torch.cat((cos[0, :, pick], sin[0, :, pick]), 1), neox)
        except RotationUnknown as reason:
            raise UserError(
                f"{self._name}: the rotation of its keys cannot be undone ({reason}); use the "
                "scorer 'recency' for this model"
            ) from None

    def _check_rotation(self, keys: Tensor) -> None:
        # The first layer's key of a token depends on nothing but the token and its position.
        first, second = self.upright(keys)[0].float().unbind(1)
        if (first - second).abs().max() > 0.02 * first.abs().max():
            raise UserError(
                f"{self._name}: equal tokens have different keys after their rotation has been "
                "undone; use the scorer 'recency' for this model"
            )


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    watcher: Watcher | None = None,
    hidden: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention, watched, or kept from seeing some of the first tokens."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer: Any = module
    if watcher is not None:
        watcher(layer.layer_idx, query[0], key[0], value[0])
    if hidden is not None:
        rows, columns = query.shape[2], key.shape[2]
        earlier = torch.ones(rows, columns, dtype=torch.bool, device=key.device)
        earlier = earlier.tril_(columns - rows)
        seen = ~F.pad(hidden[layer.layer_idx], (0, columns - hidden.shape[-1]))
        seen = seen.repeat_interleave(query.shape[1] // key.shape[1], 0)
        attention_mask = (earlier & seen[:, None])[None]
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return output


class LargestAttention:
    """A :class:`Watcher` that keeps the most attention each token of the prefix gets.

    Attributes:
        logs: per layer, ``[KV heads, P]``: logarithm of the largest attention; ``-inf`` of tokens
            that got none.
    """

    def __init__(self, prefix: int, distance: int = 0) -> None:
        """Watch ``prefix`` tokens; only queries at least ``distance`` tokens behind one count."""
        self.logs: dict[int, Tensor] = {}
        self._prefix = prefix
        self._distance = distance

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """See :class:`Watcher`."""
        rows = queries.shape[1]
        # Only the tokens that are being read can lie behind a query.
        later = torch.ones(rows, rows, dtype=torch.bool, device=keys.device).triu_(1)
        first = max(keys.shape[1] - rows - self._distance, 0)  # of the tokens that can be near
        columns = keys.shape[1] - first
        near = torch.ones(rows, columns, dtype=torch.bool, device=keys.device)
        near = near.triu_(columns - rows - self._distance + 1)
        seen = keys.float().transpose(-1, -2)  # [KV heads, channels, M]
        largest = []
        for head, query in enumerate(queries.float() * queries.shape[-1] ** -0.5):
            # A head at a time: its scores stay in a CPU's cache, which makes this twice as fast.
            scores = query @ seen[head * len(keys) // len(queries)]
            scores[:, -rows:].masked_fill_(later, -torch.inf)
            totals = scores.logsumexp(-1, keepdim=True)
            if self._distance:
                scores[:, first:].masked_fill_(near, -torch.inf)
            largest.append(scores[:, : self._prefix].sub_(totals).amax(0))
        logs = torch.stack(largest).view(len(keys), -1, largest[0].shape[-1]).amax(1)
        logs = F.pad(logs, (0, self._prefix - logs.shape[-1]), value=-torch.inf)  # not read yet
        known = self.logs.get(layer)
        self.logs[layer] = logs if known is None else torch.maximum(known, logs)

    def stacked(self) -> Tensor:
        """``[layers, KV heads, P]``."""
        return torch.stack([self.logs[layer] for layer in sorted(self.logs)])
