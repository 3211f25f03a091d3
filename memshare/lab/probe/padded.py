"""A probe for a copy of its model with padded heads, without training anew.

A padded head has zero keys and values, and nothing that is read of it counts. Networks that read a
head alone stay as they are; those of padded heads are zero.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F  # noqa: N812 - as torch calls it

from memshare.errors import UserError
from memshare.mechanisms.compaction.probe.file import Probe
from memshare.mechanisms.compaction.probe.weights import alike, fingerprint
from memshare.small_model.head_padding import read_shape


def pad_probe(probe: Probe, name: str, model: Path) -> Probe:
    """Make the probe of a padded model out of that of the original.

    Args:
        probe: of the original; with networks that read a head alone.
        name: what its card calls the padded model.
        model: folder of the padded model (``memshare model --pad-heads-to``).

    Raises:
        UserError: the probe has no such networks, or the model is no padded copy of its model.
    """
    card, heads = probe.card, read_shape(model).heads
    if 1 not in probe.tensors:
        raise UserError(
            f"the probe of {card.model} has no networks that read a head alone; train it with "
            "--heads-together 1"
        )
    weights = fingerprint(str(model))
    is_copy = weights is not None and card.weights is not None and alike(weights, card.weights) > 0
    if not is_copy or heads.dim != card.channels or heads.key_value <= card.heads:
        raise UserError(f"{model} is no copy of {card.model} with padded heads")
    more = heads.key_value - card.heads
    tensors = {
        key: F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, more))
        for key, tensor in probe.tensors[1].items()
    }
    facts = {
        "model": name,
        "weights": weights,
        "heads": heads.key_value,
        "together": (1,),
        "rank_correlation": {k: v for k, v in card.rank_correlation.items() if k == 1},
        "judged": tuple(row for row in card.judged if row.together == 1),
        "made_by": f"{card.made_by}; padded to {heads.key_value} heads from {card.model}'s",
    }
    return Probe(card.model_copy(update=facts), {1: tensors})
