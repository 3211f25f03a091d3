"""Trains the adapter of one role, and goes on where an earlier run was ended."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - as torch calls it
from torch import Tensor
from tqdm import tqdm

from memshare.lab.agents.passes import Pass

if TYPE_CHECKING:
    from peft import PeftModel

Text = tuple[Pass, Tensor | None]
"""A pass, and what the lowest layer that is trained reads of it (see :func:`nll`)."""

_SAVED_EVERY = 4  # steps: what a run that is ended loses, at most
_WARMING = 0.05  # of the steps, in which the learning rate rises


@dataclass(frozen=True, slots=True)
class Fit:
    """How adapters are trained.

    Attributes:
        rank: rows of A.
        alpha: the low-rank part counts ``alpha / rank`` times.
        targets: modules that are changed, of ``q_proj`` and ``v_proj``.
        first_layer: the lowest layer in which they are. What is below it is the same for all roles.
        steps: of the optimiser, for each role.
        batch: passes of a step.
        rate: the highest learning rate.
        context: tokens that are read in front of a pass's last output, at most.
        seed: of the first matrices and the order of passes.
    """

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    first_layer: int = 0
    steps: int = 200
    batch: int = 2
    rate: float = 5e-4
    context: int = 1024
    seed: int = 0


def new_adapter(base: Any, how: Fit, seed: int, shared: Mapping[str, Tensor] | None) -> PeftModel:
    """A model with a new adapter, which changes nothing yet.

    Args:
        base: the base model; it is changed, until ``unload`` of what is returned.
        how: hyperparameters.
        seed: of the A matrices.
        shared: A matrices on ``v_proj`` that are taken and stay as they are, by the names of their
            parameters; None has it train its own.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(
        r=how.rank, lora_alpha=how.alpha, target_modules=list(how.targets), task_type="CAUSAL_LM",
        layers_to_transform=(
            list(range(how.first_layer, base.config.num_hidden_layers)) if how.first_layer else None
        ),
    )  # fmt: skip
    model: PeftModel = get_peft_model(base, settings)
    if shared is not None:
        for name, matrix in value_down(model).items():
            matrix.data.copy_(shared[name])
            matrix.requires_grad_(False)
    return model


def value_down(model: PeftModel) -> dict[str, Tensor]:
    """The A matrices on ``v_proj``, by the names of their parameters."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "v_proj" in name and "lora_A" in name
    }


def fit(
    model: PeftModel,
    texts: Sequence[Text],
    how: Fit,
    seed: int,
    state: Path,
    title: str,
) -> list[float]:
    """Train an adapter, with a progress bar.

    What was reached is kept in the file ``state``: with the same arguments, a later run goes on
    from there, and ends with the same adapter.

    Returns:
        Mean NLL of a token in each step.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=how.rate, weight_decay=0.0)
    losses = _load(state, trained, optimiser)
    model.train()
    done = len(losses)
    with tqdm(total=how.steps, initial=done, desc=title, unit="step", disable=None) as bar:
        for step in range(done, how.steps):
            for group in optimiser.param_groups:
                group["lr"] = how.rate * _pace(step, how.steps)
            batch = [texts[number] for number in _drawn(len(texts), how, seed, step)]
            losses.append(_step(model, batch, optimiser))
            bar.set_postfix(nll=f"{losses[-1]:.3f}")
            bar.update()
            if len(losses) % _SAVED_EVERY == 0:
                _save(state, trained, optimiser, losses)
    return losses


def drawn(texts: int, how: Fit, seed: int) -> set[int]:
    """The texts that a training reads at all."""
    steps = range(how.steps)
    return {number for step in steps for number in _drawn(texts, how, seed, step)}


def _drawn(texts: int, how: Fit, seed: int, step: int) -> Iterator[int]:
    """The texts of a step. Each comes once before any comes again."""
    for number in range(step * how.batch, (step + 1) * how.batch):
        times, place = divmod(number, texts)
        order = torch.randperm(texts, generator=torch.Generator().manual_seed(seed + 1000 * times))
        yield int(order[place])


def _pace(step: int, steps: int) -> float:
    """Of the highest learning rate: it rises, then falls to 0."""
    warm = max(1, math.ceil(_WARMING * steps))
    return min(1.0, (step + 1) / warm) * (1 - step / steps)


def _step(model: PeftModel, batch: Sequence[Text], optimiser: torch.optim.Optimizer) -> float:
    """One step of the optimiser; returns the mean NLL of a token."""
    optimiser.zero_grad()
    tokens = sum(len(one.targets) for one, _ in batch)
    total = 0.0
    for one, states in batch:
        loss = nll(model, one, states).sum() / tokens
        loss.backward()
        total += float(loss.detach())
    optimiser.step()
    return total


def nll(model: Any, one: Pass, states: Tensor | None = None) -> Tensor:
    """``[targets]``: how unlikely each target of a pass is, in nats.

    Args:
        model: of transformers or peft.
        one: the pass.
        states: what the model's lowest layer reads, ``[tokens, hidden]``, if it is no embedding.
    """
    device = model.device
    logits = model(
        input_ids=None if states is not None else torch.tensor([one.tokens], device=device),
        inputs_embeds=None if states is None else states[None],
        use_cache=False,
        logits_to_keep=torch.tensor(one.positions, device=device),
    ).logits[0]
    targets = torch.tensor(one.targets, device=device)
    return F.cross_entropy(logits.float(), targets, reduction="none")


@torch.no_grad()
def mean_nll(model: Any, passes: Sequence[Pass], title: str) -> float:
    """Mean NLL of a target token over all passes, with a progress bar."""
    model.eval()
    bar = tqdm(passes, desc=title, unit="pass", leave=False, disable=None)
    found = torch.cat([nll(model, one) for one in bar])
    return float(found.mean())


def _save(
    state: Path,
    trained: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    losses: Sequence[float],
) -> None:
    partial = state.with_suffix(f".{os.getpid()}")
    weights = {name: parameter.detach() for name, parameter in trained.items()}
    held = {"weights": weights, "optimiser": optimiser.state_dict(), "losses": list(losses)}
    torch.save(held, partial)
    partial.replace(state)


def _load(
    state: Path, trained: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
) -> list[float]:
    """Put back what was reached; returns the losses until then."""
    if not state.exists():
        return []
    held = torch.load(state, weights_only=True)
    for name, parameter in trained.items():
        parameter.data.copy_(held["weights"][name])
    optimiser.load_state_dict(held["optimiser"])
    losses: list[float] = held["losses"]
    return losses
