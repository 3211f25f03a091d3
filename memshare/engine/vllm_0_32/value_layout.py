"""How wide keys and values are in the cache when values have low-rank columns.

vLLM's attention on CPUs knows one width for both, out of a few: keys are padded with zeros. On GPUs
two backends take values of another width than keys (``FLASH_ATTN_DIFFKV``, ``TRITON_ATTN_DIFFKV``),
so nothing is padded. Both are vLLM's own, made for models with such heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend


@dataclass(frozen=True, slots=True)
class ValueLayout:
    """Widths of a head in the cache.

    Attributes:
        keys: of a key, and of a query.
        values: of a value with its columns.
        backend: that takes them; None for the platform's own choice.
    """

    keys: int
    values: int
    backend: type[AttentionBackend] | None = None


def layout_of(vllm_config: VllmConfig, width: int) -> ValueLayout | None:
    """The layout on this platform; None if its attention takes no heads so wide.

    Args:
        vllm_config: its model, and the attention backend that its user wants.
        width: low-rank columns.
    """
    head_dim = vllm_config.model_config.get_head_size()
    if current_platform.is_cpu():
        return _padded(head_dim + width)
    return _split(vllm_config, head_dim, head_dim + width)


def padded_sizes() -> list[int]:
    """Widths of heads that vLLM's attention on CPUs takes."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend.get_supported_head_sizes()


def _padded(wanted: int) -> ValueLayout | None:
    size = next((size for size in sorted(padded_sizes()) if size >= wanted), None)
    return None if size is None else ValueLayout(size, size)


def _split(vllm_config: VllmConfig, keys: int, values: int) -> ValueLayout:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    # Triton's takes any widths; FlashAttention's only some pairs, so it is the user's choice, by
    # vLLM's own option.
    wanted = vllm_config.attention_config.backend
    if wanted is None or not wanted.name.endswith("_DIFFKV"):
        wanted = AttentionBackendEnum.TRITON_ATTN_DIFFKV
    backend: Any = wanted.get_class()
    backend.set_head_size_v(values)
    return ValueLayout(keys, values, backend)
