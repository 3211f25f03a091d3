"""Train the LoRA adapter that makes SmolLM2-135M-Instruct a small reasoning model.

    python tools/runtime_env.py python tools/train_reasoner.py --out .run/reasoner

Problems come from a seed (``memshare.lab.problems``); each is seen once. A run that was
stopped goes on from its last checkpoint, and ends with the same adapter up to rounding. Needs the
extra ``train``. About 35 minutes on two cores with AMX.

``exact`` in the log is the share of the last problems in which every token of a number was the
model's first choice: what greedy decoding would get right.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from memshare.lab.problems import FAMILIES, Problem, generate
from memshare.small_model.names import resolve_model

FIRST_SEED = 1_000_000
"""Training uses seeds from here on; the problems of every measurement have smaller ones."""
POOL = 64
"""Problems sorted by length together, so that the rows of a batch are about equally long."""
LENGTH_STEP = 128
"""Batches are padded to a multiple of this many tokens: few shapes, compiled once each."""
IGNORED = -100


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """What determines the adapter."""

    seed: int
    steps: int
    batch: int
    learning_rate: float
    rank: int
    warmup: int = 40


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One tokenized problem."""

    tokens: list[int]
    prompt_length: int


def tokenize(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> TrainingRow:
    """Return the conversation of ``problem`` as the chat template writes it."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.prompt}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    solution_ids = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
    return TrainingRow([*prompt_ids, *solution_ids, tokenizer.eos_token_id], len(prompt_ids))


def batches(
    tokenizer: PreTrainedTokenizerBase, recipe: TrainingRecipe, first: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (token ids, labels), both ``[batch, length]``, from step ``first`` on."""
    per_pool = POOL // recipe.batch
    for pool in range(first // per_pool, -(-recipe.steps // per_pool)):
        seed = recipe.seed + FIRST_SEED + pool * POOL
        rows = [
            tokenize(tokenizer, generate(FAMILIES[i % len(FAMILIES)], seed + i))
            for i in range(POOL)
        ]
        rows.sort(key=lambda row: len(row.tokens))
        # Not from short to long: neighbouring steps should not differ in kind.
        order = torch.randperm(per_pool, generator=torch.Generator().manual_seed(seed)).tolist()
        for i, slot in enumerate(order):
            if first <= pool * per_pool + i < recipe.steps:
                yield pad(rows[slot * recipe.batch : (slot + 1) * recipe.batch])


def pad(rows: list[TrainingRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels; padding is on the right, where causal attention ignores it."""
    length = -(-max(len(row.tokens) for row in rows) // LENGTH_STEP) * LENGTH_STEP
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.tokens)
        tokens[i, : len(ids)] = ids
        # The label of a position is the token after it; the prompt is given, not learned.
        labels[i, row.prompt_length - 1 : len(ids) - 1] = ids[row.prompt_length :]
    return tokens, labels


def learning_rate(recipe: TrainingRecipe, step: int) -> float:
    """Return the rate of ``step``: linear warm-up, then half a cosine down to a twentieth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def forward(
    model: PeftModel, tokens: torch.Tensor, labels: torch.Tensor, digits: torch.Tensor
) -> tuple[torch.Tensor, list[bool]]:
    """Return the loss, and for each row whether every digit was the first choice."""
    # Logits of every position: picking the learned ones would give a new shape every step, and
    # oneDNN compiles for each shape.
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
    with torch.no_grad():
        wrong = torch.isin(labels, digits) & (logits.argmax(-1) != labels)
    return loss, (~wrong.any(dim=1)).tolist()


class MasterWeights:
    """Adam on float32 copies of a model's bfloat16 weights.

    Matrix units of CPUs work in bfloat16, whose eight bits of mantissa would lose small updates.
    """

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        """Take ``weights``, which every ``step`` writes."""
        self.weights = weights
        self.masters = [weight.detach().float() for weight in weights]
        self.optimizer = torch.optim.AdamW(self.masters, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, learning_rate: float) -> float:
        """Apply the gradients, clipped to norm 1, and clear them; return their norm."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self._publish()
        return norm.item()

    def save(self, folder: Path, step: int) -> None:
        """Write what a later run needs to go on, whole or not at all."""
        partial = folder / "checkpoint.partial"
        state = self.optimizer.state_dict()
        torch.save({"step": step, "masters": self.masters, "optimizer": state}, partial)
        partial.replace(folder / "checkpoint.pt")

    def load(self, folder: Path) -> int:
        """Read the checkpoint in ``folder``, if any; return the steps it had done."""
        file = folder / "checkpoint.pt"
        if not file.exists():
            return 0
        saved = torch.load(file)
        for master, value in zip(self.masters, saved["masters"], strict=True):
            master.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self._publish()
        return int(saved["step"])

    @torch.no_grad()
    def _publish(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)


def train(recipe: TrainingRecipe, name: str, folder: Path, checkpoint_every: int) -> None:
    """Train, from the last checkpoint in ``folder`` if there is one; write the adapter there."""
    torch.manual_seed(recipe.seed)
    base = resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(
        causal,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=False,
    )
    model.peft_config["default"].base_model_name_or_path = name  # not a folder of this machine
    weights = MasterWeights([p for p in model.parameters() if p.requires_grad])
    first = weights.load(folder)
    model.train()
    recent: deque[bool] = deque(maxlen=100)
    seen, started = 0, time.monotonic()
    progress = tqdm(total=recipe.steps, initial=first, unit="step", desc="training")
    with (folder / "log.jsonl").open("a") as log:
        for step, (tokens, labels) in enumerate(batches(tokenizer, recipe, first), start=first):
            loss, exact = forward(model, tokens, labels, digits)
            loss.backward()
            norm = weights.step(learning_rate(recipe, step))
            recent.extend(exact)
            seen += tokens.numel()
            line = {
                "step": step + 1,
                "loss": round(loss.item(), 5),
                "exact": round(sum(recent) / len(recent), 3),
                "gradient": round(norm, 3),
                "tokens_per_second": round(seen / (time.monotonic() - started)),
            }
            print(json.dumps(line), file=log, flush=True)
            progress.set_postfix(line, refresh=False)
            progress.update()
            if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
                weights.save(folder, step + 1)
                model.save_pretrained(folder)


def main() -> None:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and adapter")
    parser.add_argument("--base", default="smollm2-135m", help="model to adapt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    sizes = [size for size in range(1, POOL + 1) if POOL % size == 0]
    parser.add_argument("--batch", type=int, default=4, choices=sizes, help="problems a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--checkpoint-every", type=int, default=25, help="steps")
    args = parser.parse_args()
    recipe = TrainingRecipe(args.seed, args.steps, args.batch, args.learning_rate, args.rank)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = args.out / "recipe.json"
    if settings.exists() and json.loads(settings.read_text()) != asdict(recipe):
        parser.error(
            f"{args.out} holds a run with other settings ({settings}): choose another --out"
        )
    settings.write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    train(recipe, args.base, args.out, args.checkpoint_every)


if __name__ == "__main__":
    main()
