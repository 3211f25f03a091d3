"""Probes on disk: a safetensors file whose metadata is the card, and the card as text beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from memshare.mechanisms.compaction.probe.card import FORMAT, ProbeCard
from memshare.mechanisms.compaction.probe.header import read_header

if TYPE_CHECKING:
    from torch import Tensor

    from memshare.mechanisms.compaction.probe.network import ProbeNetwork

ENDING = ".safetensors"
_KEY = "memshare_probe"
_RETRAIN = "train one with `memshare probe train --model MODEL`"


class ProbeUnusable(ValueError):  # noqa: N818 - a finding about a file, not a fault of ours
    """A file is no probe, or not one for this model. The text names the field and the fix."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe as its file holds it."""

    card: ProbeCard
    tensors: dict[str, Tensor]

    def network(self) -> ProbeNetwork:
        """What computes."""
        from memshare.mechanisms.compaction.probe.network import ProbeNetwork

        return ProbeNetwork(self.tensors, self.card.neighbours)


def read_card(path: Path) -> ProbeCard:
    """Read what a file says of itself, without its tensors.

    Raises:
        ProbeUnusable: it is no probe, or one of another format.
    """
    try:
        _, metadata = read_header(path)
    except (OSError, ValueError) as error:
        raise ProbeUnusable(f"probe {path}: {error}; {_RETRAIN}") from None
    written = metadata.get(_KEY)
    if written is None:
        raise ProbeUnusable(f"probe {path}: its metadata has no {_KEY!r}; {_RETRAIN}")
    try:
        card = ProbeCard.model_validate_json(written)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or _KEY
        raise ProbeUnusable(f"probe {path}: {field}: {first['msg']}; {_RETRAIN}") from None
    if card.format != FORMAT:
        raise ProbeUnusable(
            f"probe {path}: format: {card.format}, and this version reads {FORMAT}; {_RETRAIN}"
        )
    return card


def read_probe(path: Path) -> Probe:
    """Read a file.

    Raises:
        ProbeUnusable: it is no probe, or its tensors are not what its card says.
    """
    from safetensors.torch import load_file

    from memshare.mechanisms.compaction.probe.network import ProbeNetwork

    card = read_card(path)
    tensors = load_file(path)
    wanted = ProbeNetwork.names_and_shapes(
        card.layers, card.heads, card.together, card.channels, card.hidden
    )
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise ProbeUnusable(
                f"probe {path}: {name}: shape {found}, and its card says {shape}; {_RETRAIN}"
            )
    return Probe(card, {name: tensors[name] for name in wanted})


def write_probe(probe: Probe, path: Path) -> None:
    """Write a probe, and its card beside it with the ending ``.md``; both are whole or absent."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in probe.tensors.items()}
    save_file(tensors, partial, metadata={_KEY: probe.card.model_dump_json()})
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    partial.replace(path)
    path.with_suffix(".md").write_text(probe.card.markdown(), encoding="utf-8")
