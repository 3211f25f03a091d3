"""A probe for a copy of its model with padded heads, without training anew.

A padded head has zero keys and values, and nothing counts that is read of it: what networks make of
it is zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F  # noqa: N812 - as torch calls it

from memshare.errors import UserError
from memshare.mechanisms.compaction.probe.file import Probe
from memshare.mechanisms.compaction.probe.weights import alike, fingerprint
from memshare.small_model.head_padding import read_shape

if TYPE_CHECKING:
    from torch import Tensor


def pad_probe(probe: Probe, name: str, model: Path) -> Probe:
    """Make the probe of a padded model out of that of the original.

    Networks that read all heads read the padded ones too; of others, there are more.

    Args:
        probe: of the original.
        name: what its card calls the padded model.
        model: folder of the padded model (``memshare model --pad-heads-to``).

    Raises:
        UserError: the model is no padded copy of the probe's, or its heads make no groups of those
            that the networks read together.
    """
    card, heads = probe.card, read_shape(model).heads
    weights = fingerprint(str(model))
    is_copy = weights is not None and card.weights is not None and alike(weights, card.weights) > 0
    if not is_copy or heads.dim != card.channels or heads.key_value <= card.heads:
        raise UserError(f"{model} is no copy of {card.model} with padded heads")
    now, more = heads.key_value, heads.key_value - card.heads
    tensors, formerly = {}, {}
    for together, named in probe.tensors.items():
        if together == card.heads:
            tensors[now], formerly[together] = _grown(named, together, more), now
        elif now % together == 0:
            tensors[together], formerly[together] = _with_more(named, more // together), together
    if not tensors:
        kinds = ", ".join(map(str, card.together))
        raise UserError(
            f"the probe of {card.model} reads {kinds} heads together, and {name} has {now}; train "
            "it with --heads-together 1 as well"
        )
    sizes = {1: 1, card.heads: now}  # all heads on a rank, or one
    facts = {
        "model": name,
        "weights": weights,
        "heads": now,
        "together": tuple(sorted(tensors, reverse=True)),
        "rank_correlation": {
            formerly[k]: value for k, value in card.rank_correlation.items() if k in formerly
        },
        "judged": tuple(
            row.model_copy(update={"tensor_parallel_size": sizes[row.tensor_parallel_size]})
            for row in card.judged
            if row.tensor_parallel_size in sizes
        ),
        "made_by": f"{card.made_by}; from {card.model}'s, padded to {now} heads",
    }
    return Probe(card.model_copy(update=facts), tensors)


def _with_more(named: dict[str, Tensor], groups: int) -> dict[str, Tensor]:
    """Networks of padded groups behind the others."""
    return {
        key: F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, groups))
        for key, tensor in named.items()
    }


def _grown(named: dict[str, Tensor], together: int, more: int) -> dict[str, Tensor]:
    """Networks whose only group has some heads more."""

    def features(tensor: Tensor) -> Tensor:
        # Own and average, by head: [layers, 1, 2 * heads * numbers, ...]
        by_head = tensor.unflatten(2, (2, together, -1))
        grown = F.pad(by_head, (0, 0) * (by_head.ndim - 4) + (0, more))
        return grown.flatten(2, 4)

    return {
        key: features(tensor)
        if key in ("shift", "scale", "hidden.weight")
        else F.pad(tensor, (0, more))
        if key.startswith("out.")
        else tensor
        for key, tensor in named.items()
    }
