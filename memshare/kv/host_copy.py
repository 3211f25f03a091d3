"""A tensor on its way to the host, for which nobody waits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A copy that has been started.

    Attributes:
        tensor: on the host; to be read when :meth:`is_ready` says so.
    """

    tensor: Tensor
    _copied: torch.cuda.Event | None

    @classmethod
    def start(cls, tensor: Tensor) -> HostCopy:
        """Begin to copy. A tensor that is on the host is copied at once: it may be overwritten."""
        if tensor.device.type == "cpu":
            return cls(tensor.clone(), None)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(host, copied)

    def is_ready(self) -> bool:
        """Whether it has arrived."""
        return self._copied is None or bool(self._copied.query())
