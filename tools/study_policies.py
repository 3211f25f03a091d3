"""What giving up blocks does to a model's next-token distribution, policy by policy, on real texts.

A recorded chain of thought is read by a real model once. Then a policy, the very object that the
engine uses, gives up a fraction of the blocks of the prefix: their keys and values are replaced by
the donors', as a remap does. The model reads the rest again, and its next-token distributions are
compared with those over the exact cache. No engine runs, so an arm takes seconds; what the engine
adds (asynchronous stages, pressure over time) is not seen here.

    python tools/study_policies.py --traces FOLDER

Each file of FOLDER is one JSON object with ``problem`` and ``reasoning`` (text).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memshare.distance import TokenScale, token_similarity_sums
from memshare.policy import load_policy
from memshare.policy.base import DemandPolicy
from memshare.replay.damage import Damage, measure

BLOCK = 32
RECENT = 128  # tokens, as protect.recent_tokens
LAYERS = 4  # as distance.layers
ARMS: dict[str, dict[str, Any]] = {
    "random": {"name": "random"},
    "oldest": {"name": "oldest"},
    "twins": {"name": "twins"},
    "twins age 0": {"name": "twins", "age_weight": 0.0},
    "twins age 0.15": {"name": "twins", "age_weight": 0.15},
    "twins age 0.5": {"name": "twins", "age_weight": 0.5},
    "control": {"name": "twins", "order": "least_covered"},
    "control age 0": {"name": "twins", "order": "least_covered", "age_weight": 0.0},
}


@dataclass
class Reading:
    """One text as the model has read it.

    Attributes:
        tokens: ``[P + C]`` token ids: prefix and continuation.
        prompt: tokens of the prompt.
        prefix: P.
        keys: ``[layers, heads, P, channels]`` as cached (rotated).
        values: the same of V.
        log_probs: ``[C, vocabulary]`` over the exact cache.
        compared: per compared layer and tensor, ``[P, heads, channels]`` with the position of keys
            undone, and the distance of its random tokens.
    """

    tokens: torch.Tensor
    prompt: int
    prefix: int
    keys: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor
    compared: list[tuple[torch.Tensor, TokenScale]]


@dataclass
class View:
    """The prefix as an on-demand policy sees it (memshare.policy.base.VictimView)."""

    first: int
    end: int
    full: int
    budget: int
    known: Any  # TwinMap
    donor_of: dict[int, int] = field(default_factory=dict)
    block_threshold: float | None = None

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        coverage: npt.NDArray[np.float32] = self.known.coverage[: self.full]
        return coverage

    def is_own(self, index: int) -> bool:
        return index not in self.donor_of

    def sharers(self, index: int) -> int:
        return sum(donor == index for donor in self.donor_of.values())

    def is_target(self, index: int) -> bool:
        if not self.is_own(index) or self.sharers(index):
            return False
        return not self.known.last_copies[index]


class Study:
    """A model, and what is measured with it."""

    def __init__(self, model: str, prefix: int, continuation: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.prefix, self.continuation = prefix, continuation
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._rotation = self._rotation_of()

    def _rotation_of(self) -> Any:
        from memshare.rotary import Rotation

        positions = torch.arange(self.prefix)[None]
        cos, sin = self.model.model.rotary_emb(torch.zeros(1), positions)
        half = cos.shape[-1] // 2
        return Rotation.from_cache(torch.cat((cos[0, :, :half], sin[0, :, :half]), 1), neox=True)

    @torch.inference_mode()
    def read(self, path: Path) -> Reading | None:
        """Let the model read a text; None if it is too short."""
        from transformers import DynamicCache

        trace = json.loads(path.read_text())
        messages = [{"role": "user", "content": trace["problem"]}]
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        text = self.tokenizer(trace["reasoning"], add_special_tokens=False, verbose=False)
        tokens = torch.tensor([*prompt, *text["input_ids"]][: self.prefix + self.continuation])
        if len(tokens) < self.prefix + self.continuation:
            return None
        cache = DynamicCache()
        hidden = self.model.model(tokens[None], past_key_values=cache).last_hidden_state
        log_probs = self.model.lm_head(hidden[0, self.prefix :]).log_softmax(-1)
        keys = torch.stack([layer.keys[0, :, : self.prefix] for layer in cache.layers])
        values = torch.stack([layer.values[0, :, : self.prefix] for layer in cache.layers])
        compared = list(self._compared(keys, values))
        return Reading(tokens, len(prompt), self.prefix, keys, values, log_probs, compared)

    def _compared(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, TokenScale]]:
        for i in range(LAYERS):
            layer = round(i * (len(keys) - 1) / (LAYERS - 1))
            by_token = keys[layer].transpose(0, 1)[:, :, None]
            upright = self._rotation.turn(by_token, -torch.arange(self.prefix))[:, :, 0]
            for tensor in (upright, values[layer].transpose(0, 1)):
                scale = TokenScale()
                scale.update(tensor)
                yield tensor, scale

    @torch.inference_mode()
    def judge(self, reading: Reading, donor_of: dict[int, int]) -> npt.NDArray[np.float32]:
        """Read the continuation over a cache in which some blocks are their donors'."""
        from transformers import DynamicCache

        keys, values = reading.keys.clone(), reading.values.clone()
        for target, donor in donor_of.items():
            for tensor, exact in ((keys, reading.keys), (values, reading.values)):
                tensor[:, :, target * BLOCK : (target + 1) * BLOCK] = exact[
                    :, :, donor * BLOCK : (donor + 1) * BLOCK
                ]
        cache = DynamicCache()
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            cache.update(k[None], v[None], layer)
        rest = reading.tokens[reading.prefix :]
        hidden = self.model.model(rest[None], past_key_values=cache).last_hidden_state
        shared = self.model.lm_head(hidden[0, :-1]).log_softmax(-1)
        return measure(reading.log_probs[:-1], shared, rest[1:]).numpy()

    def give_up(self, reading: Reading, params: dict[str, Any], fraction: float) -> dict[int, int]:
        """Donor of every block that the policy gives up, one after another."""
        from pydantic import TypeAdapter

        from memshare.config import PolicyParams

        policy = load_policy(TypeAdapter(PolicyParams).validate_python(params))
        assert isinstance(policy, DemandPolicy)
        known = self._twins(reading)
        full = reading.prefix // BLOCK
        view = View(
            -(-reading.prompt // BLOCK), (reading.prefix - RECENT) // BLOCK, full,
            int(fraction * full), known,
        )  # fmt: skip
        while len(view.donor_of) < view.budget and (victim := policy.choose(view)) is not None:
            view.donor_of[victim.target] = victim.donor
            orphans, heirs = known.give_up(victim.target)
            own = [view.is_own(p // BLOCK) and view.is_own(q // BLOCK)
                   for p, q in zip(orphans, heirs, strict=True)]  # fmt: skip
            orphans, heirs = orphans[own], heirs[own]
            known.learn(orphans, heirs, _similarity(reading, orphans, heirs))
        return view.donor_of

    def _twins(self, reading: Reading) -> Any:
        """Both stages over the whole prefix."""
        from memshare.engine.survey import TwinMap
        from memshare.steps import StepSegmenter, compile_delimiters
        from memshare.twins import TwinIndex
        from memshare.vocabulary import token_bytes

        automaton = compile_delimiters(("\n\n",), token_bytes(self.tokenizer))
        output = reading.tokens[reading.prompt : reading.prefix].tolist()
        tokens, bounds = StepSegmenter(automaton, 8, 256).feed(output)
        known = TwinMap(BLOCK)
        known.grow(reading.prefix // BLOCK)
        index = TwinIndex()
        for first, last in pairwise(bounds):
            earlier, later = index.add(tokens[first:last], reading.prompt + first)
            apart = earlier // BLOCK != later // BLOCK
            earlier, later = earlier[apart], later[apart]
            known.learn(earlier, later, _similarity(reading, earlier, later))
        return known


def _similarity(
    reading: Reading, earlier: npt.NDArray[np.int32], later: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    a, b = torch.from_numpy(earlier).long(), torch.from_numpy(later).long()
    sums = token_similarity_sums((t[a], t[b], scale) for t, scale in reading.compared)
    return (sums.total / sums.count).numpy()


def main() -> None:
    """Print one table a freed fraction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder with JSON files")
    parser.add_argument("--model", default="smollm2-135m", help="name or folder")
    parser.add_argument("--arms", default=",".join(ARMS), help="separated by ','")
    parser.add_argument("--freed", default="0.25", help="fractions of the prefix's blocks, by ','")
    parser.add_argument("--limit", type=int, default=1000, help="texts")
    parser.add_argument("--prefix", type=int, default=2560, help="tokens")
    parser.add_argument("--continuation", type=int, default=512, help="tokens")
    options = parser.parse_args()
    from memshare.model import resolve_model

    study = Study(resolve_model(options.model), options.prefix, options.continuation)
    arms = [arm.strip() for arm in options.arms.split(",")]
    fractions = [float(fraction) for fraction in options.freed.split(",")]
    measured: dict[tuple[float, str], list[npt.NDArray[np.float32]]] = {}
    read = 0
    for path in sorted(options.traces.rglob("*.json")):
        if read == options.limit or (reading := study.read(path)) is None:
            continue
        read += 1
        for fraction in fractions:
            for arm in arms:
                donors = study.give_up(reading, ARMS[arm], fraction)
                measured.setdefault((fraction, arm), []).append(study.judge(reading, donors))
        print(f"{path.name}: read", file=sys.stderr, flush=True)
    for fraction in fractions:
        print(f"\n{read} texts, {fraction:.0%} of the blocks given up:\n")
        print("| policy | KL | late KL | change of NLL | same top token |")
        print("| --- | --- | --- | --- | --- |")
        for arm in arms:
            damage = Damage.of(measured[fraction, arm])
            cells = (damage.kl, damage.late_kl, damage.delta_nll, damage.same_top)
            shown = " | ".join(f"{mean:.4f} ± {error:.4f}" for mean, error in cells)
            print(f"| {arm} | {shown} |")


if __name__ == "__main__":
    main()
