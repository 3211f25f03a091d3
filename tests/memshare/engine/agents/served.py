"""Adapters of a tiny Llama with weights, an engine that serves them, and what it should say."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.memshare.agents.reference import Reference, Rows, cut
from tests.memshare.agents.tiny import write_adapter
from tests.memshare.engine.harness import BLOCK, Engine, write_tiny_model, write_tiny_weights

TOLERANCE = 1e-4
"""Of log-probabilities, in float32."""
WRONG = 0.01
"""Of log-probabilities: what a wrong matrix or a wrong column must exceed."""
# Prompts come in pieces, and a batch of conversations does not fit.
TIGHT: dict[str, Any] = {
    "max_num_batched_tokens": 64, "num_gpu_blocks_override": 25, "max_num_seqs": 8,
    "dtype": "float32", "max_model_len": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Roles:
    """A base model, adapters of it, and the reference.

    Attributes:
        base: its folder; four heads, two of keys and values.
        alike: ``plan``, ``act`` and ``reflect``, with the same A matrices on ``v_proj``.
        apart: the same names, with A matrices and ranks of their own.
    """

    base: Path
    alike: dict[str, Path]
    apart: dict[str, Path]

    def adapters(self, scheme: str) -> dict[str, Path]:
        """Those that go with a scheme."""
        return self.alike if scheme == "base_lr_shared" else self.apart

    def reference(self, scheme: str) -> Reference:
        return Reference(self.base, self.adapters(scheme))

    def options(self, scheme: str, *names: str) -> dict[str, Any]:
        """MemShare's, for some of the adapters (all if none is named)."""
        adapters = self.adapters(scheme)
        return {
            "mode": "off",
            "agents": {
                "scheme": scheme,
                "adapters": {n: str(adapters[n]) for n in names or adapters},
            },
        }


def write_roles(folder: Path) -> Roles:
    base = folder / "base"
    base.mkdir()
    write_tiny_model(base, num_attention_heads=4, num_key_value_heads=2)
    write_tiny_weights(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = {"plan": 6, "act": 4, "reflect": 8}
    alike = {
        name: write_adapter(folder / f"alike-{name}", model, seed=seed, rank=4, a_seed=99)
        for seed, name in enumerate(names)
    }
    apart = {
        name: write_adapter(folder / f"apart-{name}", model, seed=10 + seed, rank=rank)
        for seed, (name, rank) in enumerate(names.items())
    }
    return Roles(base, alike, apart)


@dataclass(frozen=True)
class Said:
    """What an engine answered.

    Attributes:
        tokens: it wrote.
        logprobs: of each.
        cached: tokens of the prompt that it found in the cache.
        usage: what it cost, as MemShare says.
    """

    tokens: list[int]
    logprobs: list[float]
    cached: int
    usage: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """A request: the adapter's name, or None for the base model; ``exact`` keeps its KV so."""

    prompt: Sequence[int]
    adapter: str | None = None
    tokens: int = 6
    salt: str | None = None
    exact: bool = False


class Served:
    """An engine, asked for adapters by name."""

    def __init__(self, engine: Engine, adapters: dict[str, Path]) -> None:
        self.engine = engine
        self._paths = adapters
        self._ids = {name: number + 1 for number, name in enumerate(adapters)}

    def lora(self, name: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        return None if name is None else LoRARequest(name, self._ids[name], str(self._paths[name]))

    def ask(self, *asks: Ask, loras: Mapping[str, Any] | None = None) -> list[Said]:
        """All at once; adapters by these LoRA requests, if they are named there."""
        from vllm import SamplingParams

        prompts: list[Any] = [
            {"prompt_token_ids": list(ask.prompt)} | ({"cache_salt": ask.salt} if ask.salt else {})
            for ask in asks
        ]
        params = [
            SamplingParams(
                max_tokens=ask.tokens,
                temperature=0,
                ignore_eos=True,
                logprobs=0,
                extra_args={"memshare_usage": "on"} | ({"memshare": "off"} if ask.exact else {}),
            )
            for ask in asks
        ]
        known = loras or {}
        asked = [known.get(ask.adapter or "") or self.lora(ask.adapter) for ask in asks]
        outputs = self.engine.llm.generate(prompts, params, use_tqdm=False, lora_request=asked)
        return [self._said(output) for output in outputs]

    @staticmethod
    def _said(output: Any) -> Said:
        (choice,) = output.outputs
        tokens = list(choice.token_ids)
        logprobs = [
            step[token].logprob for step, token in zip(choice.logprobs, tokens, strict=True)
        ]
        usage = (output.kv_transfer_params or {}).get("memshare", {})
        return Said(tokens, logprobs, output.num_cached_tokens, usage)


def words(seed: int, count: int) -> list[int]:
    """A text of bytes."""
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(count)]


def distance(
    reference: Reference, ask: Ask, said: Said, cache: list[Rows] | None = None
) -> tuple[float, list[Rows]]:
    """How far an answer's log-probabilities are from the reference's, and the cache behind it.

    Args:
        reference: of the scheme.
        ask: what was asked.
        said: what was answered.
        cache: of the blocks that it found, whoever wrote them; nothing was found if None.
    """
    found = cut(cache, said.cached) if cache else None
    assert (said.cached > 0) == (found is not None)
    new = [*ask.prompt, *said.tokens[:-1]][said.cached :]
    logs, grown = reference.run(new, ask.adapter, found)
    steps = logs[len(ask.prompt) - said.cached - 1 :]
    assert len(steps) == len(said.tokens)
    wanted = [float(step[token]) for step, token in zip(steps, said.tokens, strict=True)]
    gaps = [abs(a - b) for a, b in zip(wanted, said.logprobs, strict=True)]
    # A token that is not the reference's best, by more than rounding, is as wrong as its gap.
    gaps += [float(step.max() - step[t]) for step, t in zip(steps, said.tokens, strict=True)]
    return max(gaps), grown


def changed_copy(adapter: Path, folder: Path) -> Path:
    """The adapter with one matrix that is a little different."""
    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"] *= 1.01
    save_file(tensors, weights)
    return folder


def peft_distance(roles: Roles, adapters: dict[str, Path], ask: Ask, said: Said) -> float:
    """How far an answer is from what peft says of the same text."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(roles.base, dtype=torch.float32)
    if ask.adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapters[ask.adapter]))
    with torch.no_grad():
        logits = model(torch.tensor([[*ask.prompt, *said.tokens[:-1]]])).logits[0]
    steps = logits[len(ask.prompt) - 1 :].log_softmax(-1)
    gaps = [
        abs(float(step[token]) - logprob)
        for step, token, logprob in zip(steps, said.tokens, said.logprobs, strict=True)
    ]
    return max(gaps)


def whole_blocks(tokens: int) -> int:
    """Tokens of a cached text of this length that a longer prompt finds."""
    return tokens // BLOCK * BLOCK
