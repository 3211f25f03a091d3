"""Which experts a model's tokens choose on texts of known domains, and how far that tells the
domains apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memshare.errors import UserError
from memshare.lab.moe.texts import Domain, domain_texts

Ids = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class ExpertTrace:
    """One text as a model has read it.

    Attributes:
        domain: index of its domain.
        text: itself.
        tokens: ``[tokens]``.
        experts: ``[tokens, layers, chosen]``.
    """

    domain: int
    text: str
    tokens: npt.NDArray[np.int64]
    experts: Ids


def read_traces(
    model: Path, domains: Sequence[Domain], count: int, length: int
) -> tuple[list[ExpertTrace], int, float]:
    """Let a model read texts that it was not trained on.

    Args:
        model: folder of a mixture of experts.
        domains: of texts.
        count: texts of each domain, at most.
        length: tokens of each; shorter ones are joined to such.

    Returns:
        Traces, number of experts, and the mean loss of a token in nats.

    Raises:
        UserError: the model has no experts.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chosen = getattr(network.config, "num_experts_per_tok", None)
    if chosen is None:
        raise UserError(f"{model} has no experts")
    traces = []
    losses = []
    for domain, name in enumerate(domains):
        for text in _of_length(domain_texts(name).unseen, tokenizer, count, length):
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:length]])
            with torch.inference_mode():
                output = network(ids, labels=ids, output_router_logits=True)
                experts = torch.stack(
                    [layer.topk(chosen).indices for layer in output.router_logits], 1
                )
                logits = output.logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
            traces.append(
                ExpertTrace(domain, text, ids[0].numpy(), experts.numpy().astype(np.int16))
            )
    return traces, int(network.config.num_experts), float(np.mean(losses))


def popularity(experts: Ids, number: int) -> npt.NDArray[np.float64]:
    """``[layers, experts]``: the probability that a token chooses each."""
    layers = experts.shape[1]
    flat = experts.transpose(1, 0, 2).reshape(layers, -1).astype(np.int64)
    counts = np.stack([np.bincount(row, minlength=number) for row in flat])
    return counts / len(experts)


def mutual_information(traces: Sequence[ExpertTrace], number: int) -> npt.NDArray[np.float64]:
    """``[layers]``: bits that one choice of an expert tells of the domain, out of the bits that the
    domain has."""
    domains = 1 + max(trace.domain for trace in traces)
    joint = np.zeros((domains, traces[0].experts.shape[1], number))
    for trace in traces:
        joint[trace.domain] += popularity(trace.experts, number) * len(trace.experts)
    joint /= joint.sum((0, 2), keepdims=True)
    by_domain, by_expert = joint.sum(2, keepdims=True), joint.sum(0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(joint > 0, joint * np.log2(joint / (by_domain * by_expert)), 0.0)
    return np.asarray(bits.sum((0, 2)))


def distinct_experts(
    traces: Sequence[ExpertTrace], batch: int, draws: np.random.Generator, rounds: int = 400
) -> npt.NDArray[np.float64]:
    """``[layers]``: mean distinct experts of a step with one token of each of ``batch`` texts."""
    steps = []
    for _ in range(rounds):
        rows = [
            trace.experts[draws.integers(len(trace.experts))]
            for trace in draws.choice(np.array(traces, dtype=object), batch)
        ]
        together = np.concatenate(rows, axis=1)  # [layers, batch * chosen]
        steps.append([len(np.unique(row)) for row in together])
    return np.asarray(np.mean(steps, axis=0))


def _of_length(texts: Sequence[str], tokenizer: object, count: int, length: int) -> list[str]:
    """The first texts, joined until each has the length."""
    found: list[str] = []
    joined = ""
    for text in texts:
        joined = f"{joined}\n\n{text}" if joined else text
        if len(joined) > 6 * length:  # no tokenizer here makes longer tokens, on average
            found.append(joined)
            joined = ""
            if len(found) == count:
                break
    return found
