"""What a probe learns from: each text's upright keys, values, and the attention it gets repeated.

A file per text, so that an interrupted run goes on where it stopped, and training needs no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from memshare.errors import UserError
from memshare.lab.probe.reader import CacheReader, LargestAttention
from memshare.lab.probe.texts import Text
from memshare.mechanisms.compaction.probe.network import average, held_together

_SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True)
class Sample:
    """A text that was read, on disk.

    Attributes:
        text: that was read.
        length: tokens of it that were.
        path: of the file: ``keys`` (upright) and ``values``, each ``[layers, heads, length,
            channels]``, and ``target`` ``[layers, heads, length]``.
    """

    text: Text
    length: int
    path: Path

    def layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and target of one layer, ``[heads, length, channels]`` and ``[heads,
        length]``, in float32."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            keys, values, target = (
                file.get_slice(name)[layer].float() for name in ("keys", "values", "target")
            )
        return keys, values, target


class Samples:
    """Samples of one model, in a folder."""

    def __init__(self, folder: Path, weights: Sequence[float] | None, prefix: int) -> None:
        """Open the folder, or make it.

        Args:
            folder: for files of this module alone.
            weights: fingerprint of the model.
            prefix: tokens of each text that are read.

        Raises:
            UserError: it holds what was read by another model or with another prefix.
        """
        self.folder = folder
        self._prefix = prefix
        settings = json.dumps({"weights": weights, "prefix": prefix})
        file = folder / _SETTINGS
        if file.exists() and file.read_text() != settings:
            raise UserError(
                f"--work {folder} holds what another model has read, or with another --prefix; "
                "name another folder, or delete this one"
            )
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(settings)

    def of(self, text: Text) -> Sample:
        """Where a text's sample is, or will be."""
        length = min(len(text.tokens), self._prefix)
        return Sample(text, length, self.folder / f"{text.digest}.safetensors")

    def collect(self, texts: Sequence[Text], reader: CacheReader) -> list[Sample]:
        """Read every text that has not been read, with a progress bar."""
        samples = [self.of(text) for text in texts]
        missing = [sample for sample in samples if not sample.path.exists()]
        tokens = sum(sample.length for sample in missing)
        with tqdm(total=tokens, desc="reading texts", unit="token", disable=None) as bar:
            for sample in missing:
                _write(sample, reader)
                bar.update(sample.length)
        return samples


def _write(sample: Sample, reader: CacheReader) -> None:
    from safetensors.torch import save_file

    reading = reader.read(sample.text, sample.length)
    watcher = LargestAttention(sample.length)
    reader.repeat(reading, watcher)
    partial = sample.path.with_name(f".{sample.path.name}.{os.getpid()}")
    tensors = {
        "keys": reader.upright(reading.keys).half(),
        "values": reading.values.half(),
        "target": watcher.stacked().half(),
    }
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial)
    partial.replace(sample.path)


def training_set(
    samples: Sequence[Sample], layer: int, neighbours: int, together: int | None
) -> tuple[Tensor, Tensor]:
    """Features and target of a layer, of every token behind the prompts.

    Args:
        samples: texts.
        layer: which.
        neighbours: tokens on each side that features average over.
        together: KV heads of a group; None for all.

    Returns:
        ``[tokens, groups, features]`` and ``[tokens, groups, together]``, float32.
    """
    features, targets = [], []
    for sample in samples:
        keys, values, target = sample.layer(layer)
        group = together or len(keys)
        (held,) = held_together(keys[None], values[None], group)
        behind = slice(sample.text.prompt, None)
        everything = torch.cat((held, average(held, neighbours)), -1)
        features.append(everything[:, behind].transpose(0, 1))
        targets.append(target[:, behind].T.unflatten(1, (-1, group)))
    return torch.cat(features), torch.cat(targets)
