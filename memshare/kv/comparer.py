"""Stage two on one rank: which layers are compared, how they are read, when results are ready."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memshare.config import DistanceConfig
from memshare.engine.messages import BlockAt, JobBatch, JobResult, TwinBatch
from memshare.kv.layout import KVLayout, LayoutUnknown
from memshare.kv.rotary import Rotation, RotationUnknown
from memshare.kv.similarity import (
    LayerBlocks,
    PairSums,
    TokenScale,
    similarity_sums,
    spread_layers,
    token_similarity_sums,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

logger = logging.getLogger(__name__)


class StageTwoUnsupported(ValueError):  # noqa: N818 - a finding about a model, not a fault
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


class StageTwo:
    """Compares blocks, or tokens, in a few layers; results come back when the device has them."""

    def __init__(
        self,
        config: DistanceConfig,
        model: torch.nn.Module,
        attention: dict[str, Attention],
        kv_caches: dict[str, Tensor],
    ) -> None:
        """Choose the layers and learn how to read them.

        Args:
            config: norm, tensors and layers.
            model: the loaded model; its rotary modules are looked up beside the attention layers.
            attention: vLLM's attention layers by name.
            kv_caches: per layer name, ``[blocks, heads, slots, 2 * channels]``.

        Raises:
            StageTwoUnsupported: a layer's cache cannot be read.
        """
        self._config = config
        names = spread_layers(list(kv_caches), config.layers)
        rotations: dict[int, Rotation | None] = {}
        layers = []
        for name in names:
            try:
                layout = KVLayout.learn(attention[name], kv_caches[name])
            except LayoutUnknown as reason:
                raise StageTwoUnsupported(
                    f"MemShare cannot compare blocks of attention layer {name}: {reason}. "
                    "Choose policy 'oldest' or 'random', which compare nothing, or mode 'off'."
                ) from None
            rotation = _rotation_beside(model, name, rotations) if self._corrects_keys else None
            keys = config.tensors != "v" and (rotation is not None or not self._corrects_keys)
            values = config.tensors != "k" or not keys
            layers.append(_Layer(name, kv_caches[name], layout, rotation, keys, values))
        self._layers = tuple(layers)
        self._ready: deque[_Pending] = deque()

    @property
    def _corrects_keys(self) -> bool:
        return self._config.norm == "relative"

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that are compared."""
        return tuple(layer.name for layer in self._layers)

    @torch.inference_mode()
    def launch(self, batches: Sequence[JobBatch | TwinBatch]) -> None:
        """Start comparing. On a GPU this only enqueues work behind the forward pass."""
        for batch in batches:
            if isinstance(batch, TwinBatch):
                ids: tuple[int, ...] = (batch.job_id,)
                sums = token_similarity_sums(self._gather_tokens(batch))
            else:
                ids = tuple(job.job_id for job in batch.jobs)
                sums = self._compare_blocks(batch)
            self._ready.append(_Pending.start(ids, sums.total, sums.count))

    def collect(self) -> dict[int, JobResult]:
        """Results that have reached the host; never waits for the device."""
        results: dict[int, JobResult] = {}
        while self._ready and self._ready[0].is_ready():
            results.update(self._ready.popleft().results())
        return results

    def _compare_blocks(self, batch: JobBatch) -> PairSums:
        device = self._layers[0].cache.device
        targets, target_at = _split((job.target for job in batch.jobs), device)
        donors, donor_at = _split((job.donor for job in batch.jobs), device)
        sample, sample_at = _split(batch.sample, device)
        return similarity_sums(
            self._gather(targets, donors, sample),
            target_at, donor_at, sample_at, self._config.norm,
        )  # fmt: skip

    def _gather_tokens(self, batch: TwinBatch) -> Iterator[tuple[Tensor, Tensor, TokenScale]]:
        device = self._layers[0].cache.device
        tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
        blocks, positions = torch.cat((tokens[0], tokens[2])), torch.cat((tokens[1], tokens[3]))
        for layer in self._layers:
            slots = positions % layer.layout.slots
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

    def _gather(
        self, targets: Tensor, donors: Tensor, sample: Tensor
    ) -> Iterator[tuple[LayerBlocks, LayerBlocks, LayerBlocks]]:
        together = torch.cat((targets, donors, sample))
        sizes = (len(targets), len(donors), len(sample))
        for layer in self._layers:
            keys, values = layer.layout.gather(layer.cache, together)
            a, b, c = (
                LayerBlocks(k if layer.keys else None, v if layer.values else None, layer.rotation)
                for k, v in zip(keys.split(sizes), values.split(sizes), strict=True)
            )
            yield a, b, c


@dataclass(frozen=True, slots=True)
class _Pending:
    """Sums of one batch on their way to the host, as many for each job."""

    job_ids: tuple[int, ...]
    total: Tensor
    count: int
    copied: torch.cuda.Event | None

    @classmethod
    def start(cls, job_ids: tuple[int, ...], total: Tensor, count: int) -> _Pending:
        if total.device.type == "cpu":
            return cls(job_ids, total, count, None)
        host = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
        host.copy_(total, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(job_ids, host, count, copied)

    def is_ready(self) -> bool:
        return self.copied is None or bool(self.copied.query())

    def results(self) -> dict[int, JobResult]:
        by_job = self.total.view(len(self.job_ids), -1).tolist()
        return {
            job_id: JobResult(totals, self.count, ranks=1)
            for job_id, totals in zip(self.job_ids, by_job, strict=True)
        }


def _split(
    blocks: Iterator[BlockAt] | Sequence[BlockAt], device: torch.device
) -> tuple[Tensor, ...]:
    """Block ids and positions as two ``[N]`` int64 tensors."""
    pairs = torch.tensor([(b.block_id, b.position) for b in blocks], dtype=torch.int64)
    return tuple(pairs.view(-1, 2).to(device, non_blocking=True).unbind(1))


def _rotation_beside(
    model: torch.nn.Module, attention_name: str, known: dict[int, Rotation | None]
) -> Rotation | None:
    """The rotation that the attention layer's keys went through; None if it can't be undone."""
    parent = model.get_submodule(attention_name.rpartition(".")[0])
    rotary = getattr(parent, "rotary_emb", None)
    if id(rotary) in known:
        return known[id(rotary)]
    rotation = None
    cache = getattr(rotary, "cos_sin_cache", None)
    if rotary is None or not isinstance(cache, Tensor):
        logger.warning(
            "no rotary table beside %s: stage two compares V only in this layer", attention_name
        )
    else:
        try:
            rotation = Rotation.from_cache(cache, bool(rotary.is_neox_style))
        except RotationUnknown as reason:
            logger.warning(
                "the rotary embedding %s cannot be undone (%s): stage two compares V only",
                type(rotary).__name__, reason,
            )  # fmt: skip
    known[id(rotary)] = rotation
    return rotation
