"""Trains the networks of a probe, a layer at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - as torch calls it
from torch import Tensor
from tqdm import tqdm

from memshare.lab.probe.collect import Sample, training_set
from memshare.mechanisms.compaction.probe.network import fast_dtype

_SMALLEST_SPREAD = 1e-3  # a feature that hardly changes must not be blown up


@dataclass(frozen=True, slots=True)
class Fit:
    """How a probe is trained.

    Attributes:
        hidden: units of each network.
        together: KV heads that a network reads; None for all of a layer.
        neighbours: tokens on each side that features average over.
        steps: of the optimiser, for each layer.
        batch: tokens of a step.
        rate: learning rate at the first step; falls to 0.
        dropout: fraction of hidden units.
        decay: of weights.
        seed: of the first weights and the batches.
    """

    hidden: int = 96
    together: int | None = None
    neighbours: int = 2
    steps: int = 600
    batch: int = 512
    rate: float = 2e-3
    dropout: float = 0.1
    decay: float = 0.05
    seed: int = 0


def fit(
    samples: Sequence[Sample], layers: int, how: Fit, folder: Path, device: str, title: str
) -> dict[str, Tensor]:
    """Train the networks of all layers, with a progress bar.

    Finished layers are kept in ``folder``, so that an interrupted run goes on where it stopped.

    Returns:
        The tensors of a :class:`~memshare.mechanisms.compaction.probe.network.ProbeNetwork`.
    """
    from safetensors.torch import load_file, save_file

    trained = []
    for layer in tqdm(range(layers), desc=title, unit="layer", disable=None):
        path = folder / f"{_name(samples, layer, how)}.layer"
        if not path.exists():
            features, target = training_set(samples, layer, how.neighbours, how.together)
            tensors = fit_layer(features.to(device), target.to(device), how, how.seed + layer)
            partial = path.with_suffix(f".{os.getpid()}")
            save_file({name: t.half().cpu().contiguous() for name, t in tensors.items()}, partial)
            partial.replace(path)
        trained.append(load_file(path))
    return {name: torch.stack([one[name] for one in trained]) for name in trained[0]}


def fit_layer(features: Tensor, target: Tensor, how: Fit, seed: int) -> dict[str, Tensor]:
    """Train the networks of one layer.

    Args:
        features: ``[tokens, groups, features]``.
        target: ``[tokens, groups, heads of a group]``.
        how: hyperparameters.
        seed: of first weights and batches.

    Returns:
        Tensors by name, each with a first dimension of groups.
    """
    generator = torch.Generator().manual_seed(seed)
    fast = fast_dtype(features.device)
    tokens, groups, width = features.shape
    together = target.shape[-1]
    shift, middle = features.mean(0), target.mean(0)
    spread = (features.square().mean(0) - shift.square()).clamp(min=0.0).sqrt()
    scale = 1.0 / (spread + _SMALLEST_SPREAD)

    def first(*shape: int, inputs: int) -> Tensor:
        drawn = torch.rand(shape, generator=generator) * 2.0 - 1.0
        small = drawn * (1.0 / math.sqrt(inputs))
        return small.to(features.device).requires_grad_()

    weight = first(groups, width, how.hidden, inputs=width)
    bias = first(groups, how.hidden, inputs=width)
    out = first(groups, how.hidden, together, inputs=how.hidden)
    offset = first(groups, together, inputs=how.hidden)
    optimiser = torch.optim.AdamW([weight, bias, out, offset], lr=how.rate, weight_decay=how.decay)
    for step in range(how.steps):
        for group in optimiser.param_groups:
            group["lr"] = how.rate * (1 - step / how.steps)
        picked = torch.randint(0, tokens, (how.batch,), generator=generator).to(features.device)
        held = ((features[picked] - shift) * scale).transpose(0, 1)  # [groups, batch, features]
        with torch.autocast(features.device.type, fast, enabled=fast != torch.float32):
            hidden = F.gelu(torch.bmm(held, weight) + bias[:, None])
            hidden = hidden * _mask(hidden, how.dropout, generator)
            told = torch.bmm(hidden, out) + offset[:, None]
        loss = F.smooth_l1_loss(told.float(), (target[picked] - middle).transpose(0, 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {
        "shift": shift, "scale": scale, "hidden.weight": weight.detach(),
        "hidden.bias": bias.detach(), "out.weight": out.detach(),
        "out.bias": offset.detach() + middle,
    }  # fmt: skip


def _mask(hidden: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(hidden.shape, generator=generator).to(hidden.device)
    return (drawn >= dropout) / (1.0 - dropout)


def _name(samples: Sequence[Sample], layer: int, how: Fit) -> str:
    """Of what a trained layer depends on."""
    facts = [sorted(sample.path.stem for sample in samples), layer, asdict(how)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
