"""Probes on disk: a safetensors file whose metadata is the card, and the card as text beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

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
    """A probe as its file holds it.

    Attributes:
        card: what it says of itself.
        tensors: of each kind of networks (see :meth:`ProbeNetwork.names_and_shapes`), by the heads
            that these read together.
    """

    card: ProbeCard
    tensors: dict[int, dict[str, Tensor]]

    def network(self, together: int) -> ProbeNetwork:
        """What computes: the networks that read so many heads together."""
        from memshare.mechanisms.compaction.probe.network import ProbeNetwork

        return ProbeNetwork(self.tensors[together], self.card.neighbours, self.card.smoothing)


class _Stamp(BaseModel):
    """What is read of a card first: one of another format may lack everything else."""

    format: int = FORMAT


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
        stamp = _Stamp.model_validate_json(written).format
        if stamp != FORMAT:
            raise ProbeUnusable(
                f"probe {path}: format: {stamp}, and this version reads {FORMAT}; {_RETRAIN}"
            )
        return ProbeCard.model_validate_json(written)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or _KEY
        raise ProbeUnusable(f"probe {path}: {field}: {first['msg']}; {_RETRAIN}") from None


def read_probe(path: Path) -> Probe:
    """Read a file.

    Raises:
        ProbeUnusable: it is no probe, or its tensors are not what its card says.
    """
    from safetensors.torch import load_file

    from memshare.mechanisms.compaction.probe.network import ProbeNetwork

    card = read_card(path)
    stored = load_file(path)
    tensors: dict[int, dict[str, Tensor]] = {}
    for together in card.together:
        wanted = ProbeNetwork.names_and_shapes(
            card.layers, card.heads, together, card.channels, card.hidden
        )
        for name, shape in wanted.items():
            tensor = stored.get(_stored(together, name))
            found = None if tensor is None else tuple(tensor.shape)
            if tensor is None or found != shape:
                raise ProbeUnusable(
                    f"probe {path}: {_stored(together, name)}: shape {found}, and its card says "
                    f"{shape}; {_RETRAIN}"
                )
            tensors.setdefault(together, {})[name] = tensor
    return Probe(card, tensors)


def write_probe(probe: Probe, path: Path) -> None:
    """Write a probe, and its card beside it with the ending ``.md``; both are whole or absent."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {
        _stored(together, name): tensor.contiguous().cpu()
        for together, named in probe.tensors.items()
        for name, tensor in named.items()
    }
    save_file(tensors, partial, metadata={_KEY: probe.card.model_dump_json()})
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    partial.replace(path)
    path.with_suffix(".md").write_text(probe.card.markdown(), encoding="utf-8")


def _stored(together: int, name: str) -> str:
    """What a tensor is called in the file."""
    return f"{together}.{name}"
