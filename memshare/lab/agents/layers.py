"""Layers below the first that adapters change: read once, not in every step of a training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from memshare.lab.agents.passes import Pass


@contextmanager
def layers_from(base: Any, first: int) -> Iterator[None]:
    """A model of transformers whose lower layers are out of the way, as long as this lasts: it
    takes as ``inputs_embeds`` what they make.

    Args:
        base: with or without an adapter; the layers' parameters are named anew meanwhile.
        first: the lowest layer that stays.
    """
    decoder = base.model
    every = decoder.layers
    decoder.layers = every[first:]
    try:
        yield
    finally:
        decoder.layers = every


@torch.no_grad()
def states_below(
    base: Any, passes: Mapping[int, Pass], first: int, file: Path, title: str
) -> dict[int, Tensor]:
    """What a layer reads of each pass, ``[tokens, hidden]``, with a progress bar.

    Args:
        base: without an adapter.
        passes: to read, by number.
        first: the layer.
        file: where it is kept, and taken from if it is there.
        title: of the bar.
    """
    from safetensors.torch import load_file, save_file

    if not file.exists():
        decoder = base.model
        every, norm = decoder.layers, decoder.norm
        decoder.layers, decoder.norm = every[:first], nn.Identity()
        base.eval()
        try:
            found = {
                str(number): decoder(
                    input_ids=torch.tensor([one.tokens], device=base.device), use_cache=False
                ).last_hidden_state[0]
                for number, one in tqdm(passes.items(), desc=title, unit="pass", disable=None)
            }
        finally:
            decoder.layers, decoder.norm = every, norm
        partial = file.with_suffix(f".{os.getpid()}")
        save_file(found, partial)
        partial.replace(file)
    held = load_file(file, device=str(base.device))
    return {number: held[str(number)] for number in passes}
