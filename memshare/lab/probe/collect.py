"""What a probe learns from: each text's upright keys, values, and the attention its tokens get.

A file per text, so that an interrupted run goes on where it stopped, and training needs no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from memshare.errors import UserError
from memshare.lab.probe.reader import CacheReader, LargestAttention
from memshare.lab.probe.texts import Text
from memshare.mechanisms.compaction.probe.network import average, held_together

_SETTINGS = "settings.json"
_FAR = 64  # tokens: attention from nearer ones says nothing about what is needed later
_FUTURE = 128  # tokens that must follow one, or what follows says too little about it
_LEAST = -20.0  # logarithm of an attention that is none

Target = Literal["repeat", "repeat+future"]
TARGETS: dict[Target, str] = {
    "repeat": "logarithm of the largest attention that a token gets when the model repeats the "
    "text",
    "repeat+future": "mean logarithm of the largest attention that a token gets when the model "
    f"repeats the text, and of that from tokens of the text {_FAR} or more behind it",
}
"""What a probe can learn to tell."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A text that was read, on disk.

    Attributes:
        text: that was read.
        length: tokens of it that were.
        path: of the file: ``keys`` (upright) and ``values``, each ``[layers, heads, length,
            channels]``, and ``target`` ``[layers, heads, length]``.
        target: what that is.
    """

    text: Text
    length: int
    path: Path
    target: Target

    @property
    def learned(self) -> slice:
        """The tokens that a probe learns from: behind the prompt, with a future if that counts."""
        prompt = self.text.prompt
        if self.target == "repeat":
            return slice(prompt, self.length)
        return slice(prompt, max(self.length - _FUTURE, (prompt + self.length) // 2))

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

    def __init__(
        self,
        folder: Path,
        weights: Sequence[float] | None,
        prefix: int,
        target: Target = "repeat",
    ) -> None:
        """Open the folder, or make it.

        Args:
            folder: for files of this module alone.
            weights: fingerprint of the model.
            prefix: tokens of each text that are read.
            target: what is kept of the attention.

        Raises:
            UserError: it holds what was read by another model, with another prefix or target.
        """
        self.folder = folder
        self._prefix = prefix
        self._target = target
        settings = json.dumps({"weights": weights, "prefix": prefix, "target": target})
        file = folder / _SETTINGS
        if file.exists() and file.read_text() != settings:
            raise UserError(
                f"--work {folder} holds what another model has read, or with another --prefix or "
                "--target; name another folder, or delete this one"
            )
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(settings)

    def of(self, text: Text) -> Sample:
        """Where a text's sample is, or will be."""
        length = min(len(text.tokens), self._prefix)
        path = self.folder / f"{text.digest}.safetensors"
        return Sample(text, length, path, self._target)

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

    future = LargestAttention(sample.length, _FAR)
    if sample.target == "repeat":
        reading = reader.read(sample.text, sample.length)
    else:
        reading = reader.read_watched(sample.text, sample.length, future)
    watcher = LargestAttention(sample.length)
    reader.repeat(reading, watcher)
    logs = watcher.stacked()
    if sample.target != "repeat":
        logs = (logs + future.stacked().clamp(min=_LEAST)) / 2
    partial = sample.path.with_name(f".{sample.path.name}.{os.getpid()}")
    tensors = {
        "keys": reader.upright(reading.keys).half(),
        "values": reading.values.half(),
        "target": logs.half(),
    }
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial)
    partial.replace(sample.path)


def training_set(
    samples: Sequence[Sample], layer: int, neighbours: int, together: int | None
) -> tuple[Tensor, Tensor]:
    """Features and target of a layer, of every token that is learned from.

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
        learned = sample.learned
        everything = torch.cat((held, average(held, neighbours)), -1)
        features.append(everything[:, learned].transpose(0, 1))
        targets.append(target[:, learned].T.unflatten(1, (-1, group)))
    return torch.cat(features), torch.cat(targets)
