"""Which adapter is in which of a worker's LoRA slots, and whether it is the one that was checked.

vLLM loads an adapter when a request first needs it or a server is told to, into any free slot, and
may do so again. Block hashes vouch for the contents that adapters had when the engine started, so
nothing else may load; and what is loaded stays, because there is a slot for each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.lora.utils import get_adapter_absolute_path

from memshare.agents.adapter import digest_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.request import Request

    from memshare.agents.family import Family

logger = logging.getLogger(__name__)


class AdapterRefused(ValueError):  # noqa: N818 - reads as a finding in the log
    """An adapter is not what the engine was started with. The text says what to do."""


class FamilySlots:
    """The slots of one worker, watched.

    Attributes:
        columns: low-rank columns that each slot's adapter reads, ``[slots, rank]``. Changed in
            place, because captured graphs read it.
    """

    def __init__(self, family: Family, slots: int, rank: int, device: torch.device) -> None:
        """
        Args:
            family: the adapters that may load.
            slots: that vLLM has (``max_loras``).
            rank: that each slot has room for (``max_lora_rank``).
            device: of the model.
        """
        self._family = family
        self._names: dict[int, str] = {}
        self.columns = torch.zeros(slots, rank, dtype=torch.long, device=device)

    def watch(self, manager: WorkerLoRAManager) -> None:
        """Check what this manager loads, and follow which slot it goes to."""
        unchecked: Any = manager
        slots: Any = manager._adapter_manager
        add, load, activate = manager.add_adapter, unchecked._load_adapter, slots.activate_adapter

        def add_once(request: LoRARequest) -> bool:
            number = self._number(request)
            if request.lora_int_id == number and not request.load_inplace:
                return add(request)  # as in every step; see FamilyRequests.follow
            if number in manager.list_adapters():
                self._vouch(request, number)
                return True
            return add(_numbered(request, number))

        def load_checked(request: LoRARequest) -> Any:
            loaded = load(request)
            self._vouch(request, request.lora_int_id)  # behind the load: for what has been read
            return loaded

        def keep(lora_id: int) -> bool:
            logger.warning(
                "adapter %r stays loaded: it has a slot of its own as long as the engine runs",
                self._names.get(lora_id, lora_id),
            )
            return False

        def activate_followed(lora_id: int) -> Any:
            activated = activate(lora_id)
            if activated:  # and not in its slot before: vLLM calls this in every step
                self._place(lora_id, slots.lora_index_to_id.index(lora_id))
            return activated

        unchecked.add_adapter, unchecked.remove_adapter = add_once, keep
        unchecked._load_adapter = load_checked
        slots.activate_adapter = activate_followed

    def _number(self, request: LoRARequest) -> int:
        name = request.lora_name
        if self._family.member(name) is None:
            known = ", ".join(adapter.name for adapter in self._family.adapters)
            raise AdapterRefused(
                f"adapter {name!r} is none of those that share a cache ({known}); add it to "
                "agents.adapters and restart the engine"
            )
        return self._family.number(name)

    def _vouch(self, request: LoRARequest, number: int) -> None:
        member = self._family.member(request.lora_name)
        folder = Path(get_adapter_absolute_path(request.lora_path))
        if member is None or digest_of(folder) != member.digest:
            raise AdapterRefused(
                f"adapter {request.lora_name!r} ({folder}) is not what it was when the engine "
                "started, and cached blocks may be the old one's; restart the engine"
            )
        self._names[number] = request.lora_name

    def _place(self, lora_id: int, slot: int) -> None:
        # vLLM's dummies, which it warms up with, have no name here and read any columns.
        own = self._family.columns.get(self._names.get(lora_id, ""), range(0))
        wanted = torch.arange(self.columns.shape[1]) + own.start
        last = max(self._family.width - 1, 0)
        row: Tensor = wanted.clamp(max=last)
        self.columns[slot].copy_(row, non_blocking=True)


def number_adapter(request: Request, number: Callable[[str], int]) -> None:
    """See :meth:`Adapter.number_adapter`."""
    asked = request.lora_request
    if asked is not None:
        request.lora_request = _numbered(asked, number(asked.lora_name))


def _numbered(asked: LoRARequest, number: int) -> LoRARequest:
    """The same adapter under the family's number: a copy, since programs keep theirs. One that is
    to be loaded "in place" would be read anew in every step."""
    ours = copy(asked)
    ours.lora_int_id, ours.load_inplace = number, False
    return ours


def install_family(vllm_config: VllmConfig, runner: object, family: Family) -> None:
    """See :meth:`Adapter.install_family`."""
    from memshare.engine.vllm_0_32.shared_values import share_values

    lora, model_runner = vllm_config.lora_config, cast(Any, runner)
    assert lora is not None, "see memshare/engine/agents.py"
    slots = FamilySlots(family, lora.max_loras, lora.max_lora_rank, model_runner.device)
    slots.watch(model_runner.lora_manager)
    if family.width:
        share_values(vllm_config, cast(nn.Module, model_runner.get_model()), family, slots.columns)
