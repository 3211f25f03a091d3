"""Stage two on one rank: which layers are compared, and how they are read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memshare.config import DistanceConfig
from memshare.kv.layout import CachedLayer, KVLayout, LayoutUnknown
from memshare.kv.rotary import Rotation, RotationUnknown
from memshare.kv.similarity import (
    LayerBlocks,
    PairSums,
    TokenScale,
    similarity_sums,
    spread_layers,
    token_similarity_sums,
)

logger = logging.getLogger(__name__)


class ComparisonUnsupported(ValueError):  # noqa: N818 - a finding about a model, not a fault
    """Stage two cannot read this model's KV cache; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Layer:
    name: str
    cache: Tensor
    layout: KVLayout
    rotation: Rotation | None
    keys: bool
    values: bool
    key_scale: TokenScale = field(default_factory=TokenScale)
    value_scale: TokenScale = field(default_factory=TokenScale)


class KVComparer:
    """Compares blocks, or tokens, in a few layers. On a GPU it only enqueues work."""

    def __init__(
        self,
        config: DistanceConfig,
        layers: Mapping[str, CachedLayer],
        kv_caches: Mapping[str, Tensor],
    ) -> None:
        """Choose the layers and learn how to read them.

        Args:
            config: norm, tensors and layers.
            layers: the model's attention layers by name.
            kv_caches: per layer name, ``[blocks, heads, slots, 2 * channels]``.

        Raises:
            ComparisonUnsupported: a layer's cache cannot be read.
        """
        self._config = config
        corrects_keys = config.norm == "relative"
        rotations: dict[int, Rotation | None] = {}
        compared = []
        for name in spread_layers(list(kv_caches), config.layers):
            try:
                layout = KVLayout.learn(layers[name], kv_caches[name])
            except LayoutUnknown as reason:
                raise ComparisonUnsupported(
                    f"MemShare cannot compare blocks of attention layer {name}: {reason}. "
                    "Choose policy 'oldest' or 'random', which compare nothing, or mode 'off'."
                ) from None
            rotation = _rotation_of(layers[name], name, rotations) if corrects_keys else None
            keys = config.tensors != "v" and (rotation is not None or not corrects_keys)
            values = config.tensors != "k" or not keys
            compared.append(_Layer(name, kv_caches[name], layout, rotation, keys, values))
        self._layers = tuple(compared)
        logger.info("stage two compares %s", ", ".join(self.layer_names))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that are compared."""
        return tuple(layer.name for layer in self._layers)

    def compare_blocks(
        self,
        targets: npt.NDArray[np.int64],
        donors: npt.NDArray[np.int64],
        sample: npt.NDArray[np.int64],
    ) -> PairSums:
        """Compare each target with its donor.

        Args:
            targets: ``[2, P]`` block ids, and positions of their first slots.
            donors: ``[2, P]``, the same.
            sample: ``[2, S]``, random blocks that scale the distances.
        """
        sizes = (targets.shape[1], donors.shape[1], sample.shape[1])
        together = self._on_device(np.concatenate((targets, donors, sample), axis=1))
        target_at, donor_at, sample_at = together[1].split(sizes)
        return similarity_sums(
            self._gather_blocks(together[0], sizes),
            target_at, donor_at, sample_at, self._config.norm,
        )  # fmt: skip

    def compare_tokens(
        self,
        blocks: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
    ) -> PairSums:
        """Compare each of the first N tokens with the token N places further on.

        Args:
            blocks: ``[2 N]`` block ids.
            slots: ``[2 N]`` slots in these.
            positions: ``[2 N]`` token positions, which the keys' rotation is undone by.
        """
        tokens = self._on_device(np.stack((blocks, slots, positions)))
        return token_similarity_sums(self._gather_tokens(*tokens))

    def _on_device(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._layers[0].cache.device, non_blocking=True)

    def _gather_tokens(
        self, blocks: Tensor, slots: Tensor, positions: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, TokenScale]]:
        for layer in self._layers:
            keys, values = layer.layout.gather_tokens(layer.cache, blocks, slots)
            if layer.keys and layer.rotation is not None:
                # Moved to position 0, so that the scale sees what is compared.
                keys = layer.rotation.turn(keys[:, :, None], -positions)[:, :, 0]
            for wanted, tensor, scale in (
                (layer.keys, keys, layer.key_scale), (layer.values, values, layer.value_scale),
            ):  # fmt: skip
                if wanted:
                    scale.update(tensor)
                    a, b = tensor.chunk(2)
                    yield a, b, scale

    def _gather_blocks(
        self, blocks: Tensor, sizes: tuple[int, int, int]
    ) -> Iterator[tuple[LayerBlocks, LayerBlocks, LayerBlocks]]:
        for layer in self._layers:
            keys, values = layer.layout.gather(layer.cache, blocks)
            a, b, c = (
                LayerBlocks(k if layer.keys else None, v if layer.values else None, layer.rotation)
                for k, v in zip(keys.split(sizes), values.split(sizes), strict=True)
            )
            yield a, b, c


def _rotation_of(
    layer: CachedLayer, name: str, known: dict[int, Rotation | None]
) -> Rotation | None:
    """The rotation that the layer's keys went through; None if it can't be undone."""
    rotary = layer.rotary
    if rotary is None:
        logger.warning("no rotary table beside %s: stage two compares V only in this layer", name)
        return None
    if id(rotary.table) in known:
        return known[id(rotary.table)]
    rotation = None
    try:
        rotation = Rotation.from_cache(rotary.table, rotary.neox)
    except RotationUnknown as reason:
        logger.warning(
            "the rotary embedding %s cannot be undone (%s): stage two compares V only",
            rotary.kind, reason,
        )  # fmt: skip
    known[id(rotary.table)] = rotation
    return rotation
