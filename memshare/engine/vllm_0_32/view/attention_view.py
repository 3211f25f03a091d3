"""What attention is given in place of the engine's block tables: the same without null entries.

vLLM keeps a request's table indexed by position, on both sides; slot mapping, allocation and
positions depend on it. A *hole* is an entry that holds the null block, as vLLM's own sliding-window
manager leaves them. Right before an attention backend builds its metadata, holes are squeezed out
of a copy of the rows, and lengths shrink by a block for each. Keys carry their rotation, so
attention does not mind where its tokens lie.

The place for that is a subclass of the backend's own metadata builder, which vLLM itself uses for
chunked local attention and for fast prefill (``subclass_attention_backend``). It works for every
backend and for both model runners, because both end in ``AttentionGroup.build_metadata``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.attention.backend import subclass_attention_backend

from memshare.core.interfaces import CacheGroup
from memshare.core.token_map import TokenMap
from memshare.engine.vllm_0_32.cache_groups import is_full
from memshare.engine.vllm_0_32.view.squeeze import RowSqueezer, squeeze_on

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import CUDAGraphMode, VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionMetadataBuilder,
        CommonAttentionMetadata,
    )
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1ModelRunner

Counts = npt.NDArray[np.int32]


class RowSource(Protocol):
    """Says, for the batch that is about to run, from which rows entries must be left out."""

    def null_entries(self, batch: CommonAttentionMetadata) -> Counts | None:
        """How many of the entries of each row are null, ``[rows]``, on the host; None if none is
        in any row."""
        ...


class HolesOfRequests:
    """:class:`~memshare.core.interfaces.AttentionView` of a model runner: holes by request, looked
    up by row."""

    def __init__(self, runner: V1ModelRunner | V2ModelRunner) -> None:
        self._runner = runner
        self._holes: Mapping[str, int] = {}

    def leave_out(self, null_entries: Mapping[str, int]) -> None:
        """See :meth:`AttentionView.leave_out`."""
        self._holes = null_entries

    def clear(self) -> None:
        """See :meth:`AttentionView.clear`."""
        self._holes = {}

    def null_entries(self, batch: CommonAttentionMetadata) -> Counts | None:
        """See :meth:`RowSource.null_entries`."""
        if not self._holes:
            return None
        counts = numbers_by_row(self._runner, batch, self._holes)
        return counts if counts.any() else None


def numbers_by_row(
    runner: object, batch: CommonAttentionMetadata, numbers: Mapping[str, int]
) -> Counts:
    """Numbers of requests, by their row in the batch; 0 for requests that have none.

    Args:
        runner: vLLM's model runner, of either kind.
        batch: that is about to run.
        numbers: by request; some may not be scheduled in this step.
    """
    of: Any = runner
    counts = np.zeros(batch.num_reqs, np.int32)
    if hasattr(runner, "req_states"):
        # V2's rows are in the order of the step; `req_idx` names the state behind each.
        states = of.req_states.req_id_to_index
        by_state = {states[name]: number for name, number in numbers.items() if name in states}
        for row, state in enumerate(cast(Any, batch.req_idx)[: len(counts)].tolist()):
            counts[row] = by_state.get(state, 0)
        return counts
    rows = of.input_batch.req_id_to_index
    for name, number in numbers.items():
        row = rows.get(name)
        if row is not None and row < len(counts):
            counts[row] = number
    return counts


class ViewBuilder:
    """Marks a metadata builder that leaves null entries out.

    Attributes:
        rows: where there are any; None until a runner is attached.
        split: into how many blocks of its own the backend splits one of the engine's.
    """

    rows: RowSource | None = None
    split: int = 1


@functools.cache  # vLLM groups layers by their backend's class
def with_view(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The same backend, whose builder leaves null entries out of what it is given."""
    base: Any = backend.get_builder_cls()

    class Builder(ViewBuilder, base):  # type: ignore[misc]
        requires_block_table_width = True  # so that vLLM passes it to `__init__`
        # It would put a plain table into metadata that was built from a squeezed one.
        supports_update_block_table = False

        def __init__(
            self,
            kv_cache_spec: AttentionSpec,
            layer_names: list[str],
            vllm_config: VllmConfig,
            device: torch.device,
            block_table_width: int,
        ) -> None:
            width = {"block_table_width": block_table_width}
            own = width if base.requires_block_table_width else {}
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **own)
            mode: CUDAGraphMode | None = vllm_config.compilation_config.cudagraph_mode
            self._squeezed = SqueezedTables(
                vllm_config.scheduler_config.max_num_seqs,
                block_table_width,
                kv_cache_spec.block_size,
                device,
                captured=mode is not None and mode.has_full_cudagraphs(),
            )

        # The names are vLLM's: captures pass them as keywords, steps by position.
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            counts = None if self.rows is None else self.rows.null_entries(common_attn_metadata)
            seen = self._squeezed.view(common_attn_metadata, counts, self.split)
            return super().build(common_prefix_len, seen, *args, **kwargs)

    return subclass_attention_backend("View", backend, cast(Any, Builder))


class SqueezedTables:
    """One builder's tables and lengths without null entries.

    Full CUDA graphs read tables and lengths at the addresses that they were captured with. Where
    such graphs may exist, every batch goes through buffers that are made once; elsewhere a batch
    without null entries is passed on as it is.
    """

    def __init__(
        self, rows: int, width: int, block_size: int, device: torch.device, captured: bool
    ) -> None:
        """
        Args:
            rows: the most requests in a batch.
            width: of the engine's block tables, in the backend's blocks.
            block_size: token slots in one of the backend's blocks.
            device: of the tables.
            captured: whether full CUDA graphs may read them.
        """
        self._shape = (rows, width)
        self._block_size = block_size
        self._device = device
        self._captured = captured
        self._squeeze = squeeze_on(device)
        self._rows = RowSqueezer()
        self._buffers = self._make() if captured else None

    def view(
        self, batch: CommonAttentionMetadata, counts: Counts | None, split: int
    ) -> CommonAttentionMetadata:
        """What attention is to see of a batch: the batch itself if nothing is left out.

        Args:
            batch: not modified.
            counts: null entries of each row, in the engine's blocks; None if there are none.
            split: the backend's blocks in one of the engine's.
        """
        if counts is None and not self._captured:
            return batch
        if self._buffers is None:
            self._buffers = self._make()
        table, lens = (buffer[: batch.num_reqs] for buffer in self._buffers)
        used = min(TokenMap(self._block_size).entries(batch.max_seq_len), table.shape[1])
        plain = batch.block_table_tensor[: batch.num_reqs, :used]
        if counts is None:
            table[:, :used].copy_(plain)
            lens.copy_(batch.seq_lens)
            return replace(batch, block_table_tensor=table, seq_lens=lens)
        if self._device.type == "cpu":
            rows = np.flatnonzero(counts).tolist()
            self._rows.squeeze(
                plain, batch.seq_lens, rows, self._block_size, split, table[:, :used], lens
            )
        else:  # no host data: nothing is uploaded, nothing waits
            self._squeeze(plain, batch.seq_lens, self._block_size, split, table[:, :used], lens)
        upper = batch.seq_lens_cpu_upper_bound
        longest = batch.max_seq_len
        if upper is not None:  # FlashInfer plans from it, so it must stay as tight as it was
            shorter = upper.numpy() - counts * (self._block_size * split)  # NumPy: small arrays
            upper, longest = torch.from_numpy(shorter), min(longest, int(shorter.max()))
        return replace(
            batch,
            block_table_tensor=table,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=upper,
            max_seq_len=longest,
            _num_computed_tokens_cache=None,
        )

    def _make(self) -> tuple[Tensor, Tensor]:
        table = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        return table, torch.zeros(self._shape[0], dtype=torch.int32, device=self._device)


# ---- a worker's layers and runner ----


def install_view(vllm_config: VllmConfig) -> None:
    """See :meth:`Adapter.install_view`."""
    for layer in full_layers(vllm_config):
        layer.attn_backend = with_view(layer.attn_backend)


def attach_view(runner: object, group: CacheGroup) -> HolesOfRequests:
    """See :meth:`Adapter.attention_view`."""
    view = HolesOfRequests(cast("V1ModelRunner | V2ModelRunner", runner))
    for builder in group_builders(runner, group):
        ours = cast(ViewBuilder, builder)
        ours.rows = view
        ours.split = group.block_size // builder.kv_cache_spec.block_size
    return view


def builder_refusals(runner: object, group: CacheGroup) -> Iterator[str]:
    """See :meth:`Adapter.builder_refusals`."""
    if getattr(getattr(runner, "speculator", None), "attn_groups", None):
        yield (
            "model runner V2 lengthens a draft's sequences within its graphs, behind the view; set "
            "VLLM_USE_V2_MODEL_RUNNER=0, draft by 'ngram', or choose another policy"
        )
    for builder in group_builders(runner, group):
        spec: Any = builder.kv_cache_spec
        if not isinstance(builder, ViewBuilder):
            yield (
                f"attention layer {builder.layer_names[0]} builds its metadata with "
                f"{type(builder).__name__}, which dropped tokens cannot be hidden from; choose "
                "another attention backend, or another policy"
            )
        elif group.block_size % spec.block_size:
            yield (
                f"the attention backend's blocks of {spec.block_size} tokens do not divide the "
                f"engine's of {group.block_size}; set --block-size to a multiple"
            )


def view_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """See :meth:`Adapter.view_refusals`."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if parallel.use_ubatching:
        yield (
            "micro-batches (enable_dbo or ubatch_size) split the rows of a batch; leave them off, "
            "or choose another policy"
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill is on; leave it off, or choose another policy"
    if model.is_mm_prefix_lm or model.rswa_window is not None:
        yield (
            f"{model.model} attends by position (bidirectional prefixes, or a window behind the "
            "prompt); choose another model or another policy"
        )
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if getattr(getattr(layer, "impl", None), "alibi_slopes", None) is not None:
            yield (
                f"attention layer {name} has ALiBi biases, which depend on where a token lies; "
                "choose another model or another policy"
            )
            return


def full_layers(vllm_config: VllmConfig) -> Iterator[Attention]:
    """The layers of the editable group, and those that read its caches."""
    from vllm.model_executor.layers.attention import Attention

    layers = vllm_config.compilation_config.static_forward_context
    for layer in layers.values():
        if not isinstance(layer, Attention):
            continue
        owner = layers[layer.kv_sharing_target_layer_name or layer.layer_name]
        spec = owner.get_kv_cache_spec(vllm_config)
        if spec is not None and is_full(spec):
            yield layer


def group_builders(runner: object, group: CacheGroup) -> Iterator[AttentionMetadataBuilder[Any]]:
    """Of the model, and of a draft model that has a KV cache."""
    groups = list(cast(Any, runner).attn_groups[group.index])
    drafter = getattr(runner, "drafter", None)
    for of_draft in getattr(drafter, "draft_attn_groups", ()):
        if of_draft.kv_cache_group_id == group.index:
            groups.append(of_draft)
    for attention_group in groups:
        yield from attention_group.metadata_builders
