"""Trains a mixture of experts of Qwen3's shape on texts of several domains, and goes on where it
was interrupted.

Experts are balanced over the whole batch, which mixes all domains, and not within a sequence: so
they may specialise ("Demons in the Detail", arXiv 2501.11873, on losses over global batches).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from memshare.errors import UserError
from memshare.lab.moe.texts import DOMAINS, DomainTexts, domain_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

END = "<|end|>"
_CHECKPOINT = "checkpoint.pt"
_PLAN = "plan.json"
_SAVE_EVERY_S = 60.0
_SAMPLE = 200  # texts of each domain that the vocabulary is made from
_MOST = 2_500_000  # characters of each domain that are read


@dataclass(frozen=True, slots=True)
class MoePlan:
    """What to train.

    Attributes:
        steps: of training.
        batch: sequences of a step, as many of each domain as of the others.
        length: tokens of one.
        vocabulary: tokens.
        hidden: width of the residual stream, a multiple of 32.
        layers: all of them with experts.
        experts: of each layer.
        chosen: experts of a token.
        width: of one expert.
        rate: learning rate at its highest.
        balance: weight of the loss that balances experts.
        seed: of weights and batches.
    """

    steps: int = 600
    batch: int = 15
    length: int = 192
    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 3
    experts: int = 16
    chosen: int = 2
    width: int = 32
    rate: float = 3e-3
    balance: float = 0.01
    seed: int = 0


def train(plan: MoePlan, work: Path, folder: Path) -> None:
    """Train, or go on, and write the model to ``folder`` as Transformers and vLLM read it.

    Args:
        plan: what to train.
        work: for tokens and the latest state.
        folder: for the model, in 16 bits.

    Raises:
        UserError: ``work`` was begun with another plan.
    """
    work.mkdir(parents=True, exist_ok=True)
    _check_plan(plan, work)
    torch.manual_seed(plan.seed)
    tokenizer, streams = _tokens(plan, work)
    model = Qwen3MoeForCausalLM(model_config(plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.95))
    first = 0
    if (work / _CHECKPOINT).exists():
        state = torch.load(work / _CHECKPOINT)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    saved = time.monotonic()
    bar = tqdm(range(first, plan.steps), initial=first, total=plan.steps, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _warm(step, plan.steps)
        # Of its own for each step: whoever goes on draws what the uninterrupted run would have.
        draws = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        loss, balance = _loss(plan, model, _batch(plan, streams, draws))
        optimizer.zero_grad()
        (loss + plan.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            logger.info("step %d: loss %.3f, balance %.3f", step, loss, balance)
        if time.monotonic() - saved > _SAVE_EVERY_S:
            _save(work, model, optimizer, step + 1)
            saved = time.monotonic()
    _save(work, model, optimizer, plan.steps)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_config(plan: MoePlan) -> Qwen3MoeConfig:
    """The model's shape: heads of 32, half as many KV heads, tied embeddings."""
    heads = plan.hidden // 32
    return Qwen3MoeConfig(
        vocab_size=plan.vocabulary,
        hidden_size=plan.hidden,
        intermediate_size=4 * plan.hidden,
        moe_intermediate_size=plan.width,
        num_hidden_layers=plan.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        num_experts=plan.experts,
        num_experts_per_tok=plan.chosen,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def balance_loss(logits: Sequence[Tensor], chosen: int) -> Tensor:
    """How unevenly experts are used: 1 if all alike, mean over layers (Switch Transformer,
    arXiv 2101.03961, equations 4 to 6).

    Args:
        logits: of the router in each layer, ``[tokens, experts]``.
        chosen: experts of a token.
    """
    losses = []
    for layer in logits:
        experts = layer.shape[-1]
        probabilities = layer.float().softmax(-1)
        ids = probabilities.topk(chosen, -1).indices.flatten()
        used = torch.bincount(ids, minlength=experts) / len(ids)
        losses.append(experts * (used * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def _loss(plan: MoePlan, model: Qwen3MoeForCausalLM, batch: Tensor) -> tuple[Tensor, Tensor]:
    output = model(batch[:, :-1], output_router_logits=True)
    loss = nn.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
    return loss, balance_loss(output.router_logits, plan.chosen)


def _batch(plan: MoePlan, streams: Sequence[Tensor], draws: torch.Generator) -> Tensor:
    """``[batch, length + 1]`` tokens, of one domain after another."""
    rows = []
    for row in range(plan.batch):
        stream = streams[row % len(streams)]
        start = int(torch.randint(len(stream) - plan.length - 1, (), generator=draws))
        rows.append(stream[start : start + plan.length + 1])
    return torch.stack(rows).long()


def _warm(step: int, steps: int) -> float:
    """The learning rate as a fraction of its highest: up in a fiftieth, then down as a cosine."""
    rise = max(1, steps // 50)
    if step < rise:
        return (step + 1) / rise
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _tokens(plan: MoePlan, work: Path) -> tuple[PreTrainedTokenizerBase, list[Tensor]]:
    """The tokenizer, and the tokens of each domain's texts, one behind another."""
    folder = work / "tokenizer"
    files = {domain: work / f"{domain}.pt" for domain in DOMAINS}
    if not all(file.exists() for file in files.values()):
        texts = [domain_texts(domain) for domain in DOMAINS]
        make_tokenizer(plan.vocabulary, texts).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        for one in texts:
            encoded = tokenizer(_first(one.seen), add_special_tokens=False)["input_ids"]
            end = tokenizer.convert_tokens_to_ids(END)
            stream = [token for ids in encoded for token in (*ids, end)]
            torch.save(torch.tensor(stream, dtype=torch.int16), files[one.domain])
            logger.info("%s: %d tokens", one.domain, len(stream))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, [torch.load(files[domain]) for domain in DOMAINS]


def _first(texts: Sequence[str]) -> list[str]:
    lengths = np.cumsum([len(text) for text in texts])
    return list(texts[: int(np.searchsorted(lengths, _MOST)) + 1])


def make_tokenizer(vocabulary: int, texts: Sequence[DomainTexts]) -> PreTrainedTokenizerFast:
    """Pairs of bytes, the most frequent in equal parts of all domains."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text[:4000] for one in texts for text in one.seen[:_SAMPLE]), trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def _check_plan(plan: MoePlan, work: Path) -> None:
    file = work / _PLAN
    if not file.exists():
        file.write_text(json.dumps(asdict(plan)))
    elif json.loads(file.read_text()) != asdict(plan):
        raise UserError(f"{work} was begun with other options; give another folder with --work")


def _save(
    work: Path, model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, step: int
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, work / "partial.pt")
    (work / "partial.pt").replace(work / _CHECKPOINT)
