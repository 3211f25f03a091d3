"""A text as a model has read it, and what giving up blocks does to the rest: without an engine.

A transformers model reads a recorded chain of thought once. Then a policy, the very object that the
engine uses, gives up a fraction of the blocks of the prefix: their keys and values are replaced by
the donors', as a remap does. The model reads the rest again over that cache. This leaves out
what the engine adds (asynchronous stages, pressure over time); ``memshare replay`` includes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.config import DistanceConfig, MemShareConfig, PolicyParams, ProtectConfig, StepConfig
from memshare.core.capacity import end_target, first_target
from memshare.core.token_map import TokenMap
from memshare.kv.rotary import Rotation
from memshare.kv.similarity import TokenScale, spread_layers, token_similarity_sums
from memshare.lab.cache_reading import CacheReading, cached, empty_cache, filled_cache
from memshare.lab.replay.divergence import measure
from memshare.mechanisms.remap.mechanism import demand_policy
from memshare.mechanisms.twins.copies import TokenCopies
from memshare.search.evaluate import NewSteps, Positions, open_stage_one
from memshare.search.steps import StepSegmenter, compile_delimiters
from memshare.search.vocabulary import token_bytes
from memshare.small_model.names import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PrefilledTrace(CacheReading):
    """One text as the model has read it, with what stage two compares of it.

    Attributes:
        compared: per compared layer and tensor, ``[P, heads, channels]`` with the position of keys
            undone, and the distance of its random tokens.
        fp8: whether keys and values were and are to be rounded, see :meth:`Reader.in_fp8`.
    """

    compared: list[tuple[Tensor, TokenScale]]
    fp8: bool = False

    def similarity(self, earlier: Positions, later: Positions) -> npt.NDArray[np.float32]:
        """``[N]``: stage two of pairs of tokens of the prefix."""
        a, b = torch.from_numpy(earlier).long(), torch.from_numpy(later).long()
        sums = token_similarity_sums((t[a], t[b], scale) for t, scale in self.compared)
        return np.asarray((sums.total / max(sums.count, 1)).numpy(), np.float32)


@dataclass(slots=True)
class Prefix:
    """The prefix as an on-demand policy sees it: a :class:`.RequestView`.

    Attributes:
        twins: what both stages know of its tokens; None if the policy does not ask.
        donor_of: the block that each re-pointed one points to.
    """

    first: int
    end: int
    full: int
    budget: int
    twins: TokenCopies | None
    donor_of: dict[int, int] = field(default_factory=dict)
    block_threshold: float | None = None

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        """See :attr:`RequestView.coverage`."""
        if self.twins is None:
            return np.zeros(self.full, np.float32)
        return self.twins.coverage[: self.full]

    def is_own(self, index: int) -> bool:
        """See :meth:`RequestView.is_own`."""
        return index not in self.donor_of

    def sharers(self, index: int) -> int:
        """See :meth:`RequestView.sharers`."""
        return sum(donor == index for donor in self.donor_of.values())

    def is_target(self, index: int) -> bool:
        """See :meth:`RequestView.is_target`."""
        return self.is_own(index) and not (self.twins is not None and self.twins.last_copies[index])

    def repoint(self, target: int, donor: int) -> None:
        """Give up a block; those that it stands for go with it."""
        self.donor_of |= {i: donor for i, j in self.donor_of.items() if j == target}
        self.donor_of[target] = donor


class Reader:
    """A model that reads texts, and reads them again with blocks given up."""

    def __init__(
        self, model: str, block_size: int, recent: int, distance: DistanceConfig | None = None
    ) -> None:
        """Load a model in float32.

        Args:
            model: folder or hub id of a model with rotary embeddings like Llama's.
            block_size: tokens.
            recent: as ``protect.recent_tokens``.
            distance: layers and tensors of stage two (default: the configuration's); the norm is
                the relative one.

        Raises:
            UserError: there is no such model.
        """
        from transformers import AutoModelForCausalLM

        self.tokenizer: PreTrainedTokenizerBase = tokenizer_of(model)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._map = TokenMap(block_size)
        self._recent = recent
        self._distance = distance or DistanceConfig()
        steps = StepConfig()
        self._automaton = compile_delimiters(steps.delimiters, token_bytes(self.tokenizer))
        self._steps = (steps.min_tokens, steps.max_tokens)

    @torch.inference_mode()
    def read(self, prompt: Sequence[int], text: Sequence[int], prefix: int) -> PrefilledTrace:
        """Read ``text`` behind ``prompt``; the first ``prefix`` tokens of both are the prefix."""
        tokens = torch.tensor([*prompt, *text])
        cache = empty_cache()
        hidden = self._model.model(tokens[None], past_key_values=cache).last_hidden_state
        log_probs = self._model.lm_head(hidden[0, prefix:]).log_softmax(-1)
        keys, values = cached(cache, prefix)
        compared = list(self._compared(keys, values))
        return PrefilledTrace(tokens, len(prompt), prefix, keys, values, log_probs, compared)

    @torch.inference_mode()
    def in_fp8(self, prefilled: PrefilledTrace) -> PrefilledTrace:
        """Read the prefix again over an fp8 cache; the exact distributions stay.

        What is judged of it is the damage of fp8, and of what is given up beside.
        """
        cache = empty_cache(fp8=True)
        self._model.model(prefilled.tokens[None, : prefilled.prefix], past_key_values=cache)
        keys, values = cached(cache, prefilled.prefix)
        compared = list(self._compared(keys, values))
        return replace(prefilled, keys=keys, values=values, compared=compared, fp8=True)

    def _compared(self, keys: Tensor, values: Tensor) -> Iterator[tuple[Tensor, TokenScale]]:
        positions = torch.arange(keys.shape[2])
        cos, sin = self._model.model.rotary_emb(torch.zeros(1), positions[None])
        half = cos.shape[-1] // 2
        table = torch.cat((cos[0, :, :half], sin[0, :, :half]), 1)
        rotation = Rotation.from_cache(table, neox=True)
        for layer in spread_layers(range(len(keys)), self._distance.layers):
            by_token = keys[layer].transpose(0, 1)[:, :, None]
            upright = rotation.turn(by_token, -positions)[:, :, 0]
            tensors = {"k": upright, "v": values[layer].transpose(0, 1)}
            for name in self._distance.tensors:
                scale = TokenScale()
                scale.update(tensors[name])
                yield tensors[name], scale

    @torch.inference_mode()
    def judge(self, prefilled: PrefilledTrace, donor_of: dict[int, int]) -> npt.NDArray[np.float32]:
        """Read the continuation over a cache in which some blocks are their donors'.

        Returns:
            ``[C - 1, len(COLUMNS)]`` (:mod:`memshare.lab.replay.divergence`).
        """
        keys, values = prefilled.keys.clone(), prefilled.values.clone()
        for target, donor in donor_of.items():
            for tensor, exact in ((keys, prefilled.keys), (values, prefilled.values)):
                there = self._map.positions(donor)
                tensor[:, :, self._map.positions(target)] = exact[:, :, there]
        cache = filled_cache(keys, values, prefilled.fp8)
        rest = prefilled.tokens[prefilled.prefix :]
        hidden = self._model.model(rest[None], past_key_values=cache).last_hidden_state
        shared = self._model.lm_head(hidden[0, :-1]).log_softmax(-1)
        measured: npt.NDArray[np.float32] = measure(
            prefilled.log_probs[:-1], shared, rest[1:]
        ).numpy()
        return measured

    def give_up(self, prefilled: PrefilledTrace, params: PolicyParams, fraction: float) -> Prefix:
        """Let a policy give up ``fraction`` of the prefix's blocks, one after another.

        Raises:
            ValueError: the policy is not one that chooses victims on demand.
        """
        policy = demand_policy(params)
        config = MemShareConfig(policy=params)
        twins = self._twins(prefilled, config) if config.uses_stages else None
        full = self._map.full(prefilled.prefix)
        prefix = Prefix(
            first=first_target(prefilled.prompt, self._map, ProtectConfig()),
            end=end_target(full, self._map, self._recent),
            full=full,
            budget=int(fraction * full),
            twins=twins,
        )
        while len(prefix.donor_of) < prefix.budget and (victim := policy.choose(prefix)):
            prefix.repoint(victim.target, victim.donor)
            if twins is not None:
                self._hand_on(prefilled, twins, victim.target)
        return prefix

    def _hand_on(self, prefilled: PrefilledTrace, twins: TokenCopies, index: int) -> None:
        """Block ``index`` is gone: its tokens' neighbours are neighbours now."""
        earlier, later = twins.give_up(index)
        twins.learn(earlier, later, prefilled.similarity(earlier, later))

    def steps(self, prefilled: PrefilledTrace) -> list[int]:
        """Bounds of the prefix's finished steps, as positions."""
        output = prefilled.tokens[prefilled.prompt : prefilled.prefix].tolist()
        _, bounds = StepSegmenter(self._automaton, *self._steps).feed(output)
        return [prefilled.prompt + bound for bound in bounds]

    def _twins(self, prefilled: PrefilledTrace, config: MemShareConfig) -> TokenCopies:
        """Both stages over the whole prefix."""
        known = TokenCopies(self._map)
        known.grow(self._map.entries(prefilled.prefix))
        stage_one = open_stage_one(config)
        for first, last in pairwise([0, *self.steps(prefilled)]):
            tokens = prefilled.tokens[first:last].tolist()
            step = NewSteps("", 0, "", first, tokens, (0, last - first), 0.0, 0.0)
            for links in stage_one.evaluate([step]).links:
                apart = self._map.entry(links.earlier) != self._map.entry(links.later)
                earlier, later = links.earlier[apart], links.later[apart]
                known.learn(earlier, later, prefilled.similarity(earlier, later))
        return known
