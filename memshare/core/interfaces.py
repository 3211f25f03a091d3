"""What MemShare needs from the engine that it runs in, and nothing more.

vLLM's own request and block objects satisfy :class:`EngineRequest` and :class:`Block`. The adapter
of a vLLM version (memshare/engine/vllm_0_32/) creates the tables. It alone uses what is not vLLM's
public API; everything else is written against this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from memshare.core.footprint import Footprint, SideGroup
from memshare.core.token_map import TokenMap

if TYPE_CHECKING:
    from torch import Tensor

NULL_BLOCK = 0
"""The id of the null block, on every rank."""


class Block(Protocol):
    """A block of the KV cache."""

    @property
    def block_id(self) -> int:
        """Its number, the same on every rank."""
        ...

    @property
    def ref_cnt(self) -> int:
        """How many entries of all block tables point to it."""
        ...

    @property
    def is_null(self) -> bool:
        """Whether it is the null block, which holds no tokens and belongs to no request."""
        ...


class SamplingOptions(Protocol):
    """How a request wants its tokens chosen."""

    @property
    def extra_args(self) -> Mapping[str, object] | None:
        """``vllm_xargs``, among them MemShare's own options."""
        ...

    @property
    def prompt_logprobs(self) -> int | None:
        """How many log-probabilities of each prompt token are asked for."""
        ...


class LoraAdapter(Protocol):
    """A LoRA adapter."""

    @property
    def lora_int_id(self) -> int:
        """Its number in this engine, from 1."""
        ...


class AskedAdapter(LoraAdapter, Protocol):
    """A LoRA adapter as a request asks for it."""

    @property
    def lora_name(self) -> str:
        """Its name."""
        ...

    @property
    def lora_path(self) -> str:
        """Where it is to be read from."""
        ...


class EngineRequest(Protocol):
    """A request as the engine's scheduler holds it: live, and read only."""

    @property
    def request_id(self) -> str:
        """The engine's name for it."""
        ...

    @property
    def sampling_params(self) -> SamplingOptions | None:
        """None for a request that generates nothing."""
        ...

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens that it may generate."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        ...

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Token ids of prompt and output so far."""
        ...

    @property
    def output_token_ids(self) -> Sequence[int]:
        """Token ids of the output so far."""
        ...

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is written, or will be when the steps in flight are done."""
        ...

    @property
    def num_in_flight_tokens(self) -> int:
        """Those of them that steps in flight have yet to write."""
        ...

    @property
    def num_preemptions(self) -> int:
        """How often it has lost its blocks."""
        ...

    @property
    def mm_features(self) -> Sequence[object]:
        """Images and the like; placeholder tokens stand for them in the prompt."""
        ...

    @property
    def prompt_embeds(self) -> object | None:
        """Embeddings that were sent in place of a prompt."""
        ...

    @property
    def lora_request(self) -> LoraAdapter | None:
        """The adapter that it runs with."""
        ...

    @property
    def cache_salt(self) -> str | None:
        """Requests with different salts share no block."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether its prompt may still grow."""
        ...


class BlockTables(Protocol):
    """The scheduler's block tables: those of the layers with full attention, whose entries
    mechanisms may change. What is said of publishing and of references holds for every group of
    layers."""

    @property
    def token_map(self) -> TokenMap:
        """Where tokens lie under the entries."""
        ...

    @property
    def footprint(self) -> Footprint:
        """How many blocks tokens take, in the tables of every group."""
        ...

    @property
    def publishes_prompt_end(self) -> bool:
        """Whether the engine publishes the block in which a prompt ends before it is full, and does
        so again in later steps, tainted or not."""
        ...

    @property
    def total(self) -> int:
        """KV blocks that requests can use (the null block is not one)."""
        ...

    @property
    def free(self) -> int:
        """Free KV blocks."""
        ...

    def table(self, request_id: str) -> Sequence[Block] | None:
        """The request's blocks, live, in order; None while it holds none. Not to be modified."""
        ...

    def entries(self, request_id: str) -> int:
        """How many entries the request's table has; 0 while it holds no blocks."""
        ...

    def block_ids(self) -> dict[str, list[int]]:
        """Block ids of every request that holds blocks, by request."""
        ...

    def repoint(self, request_id: str, index: int, donor: Block) -> int:
        """Let entry ``index`` point at ``donor`` instead; returns how many blocks became free."""
        ...

    def drop_entries(self, request_id: str, indexes: Sequence[int]) -> int:
        """Let these entries, not the last of the table, point at the null block instead: holes.
        Returns how many blocks became free. A published block can still be found, as long as it is
        not reused: it is exact."""
        ...

    def make_writable(self, request_id: str, indexes: Sequence[int]) -> bool:
        """Let nobody find the blocks of these entries in the prefix cache any more; False, with
        nothing changed, if another entry points at one of them."""
        ...

    def unpublish_step(self, request: EngineRequest) -> bool:
        """Take back the blocks, in any group, that the step that is being scheduled completes: the
        engine has published them before it computes them. False, with nothing changed, if another
        request has found one already."""
        ...

    def publishes_soon(self, request: EngineRequest) -> bool:
        """Whether the step that is being scheduled may publish a block of this request."""
        ...

    def stop_publishing(self, request_id: str) -> None:
        """Taint: none of the request's later blocks may enter the prefix cache, in any group."""
        ...

    def is_publishing(self, request_id: str) -> bool:
        """Whether blocks of this request may still enter the prefix cache."""
        ...

    def blocks_to_admit(self, request: EngineRequest) -> int:
        """Free blocks, of all groups, that a waiting request takes when it is admitted: those of
        all its tokens, less what running requests hold of it already."""
        ...

    def keep_free(self, blocks: int) -> None:
        """Let the engine admit a waiting request only if this many blocks stay free."""
        ...

    def reference_faults(self) -> list[str]:
        """Blocks whose count is not the number of entries that point to them; [] if all is well."""
        ...


class WorkerTables(Protocol):
    """A worker's copy of the same tables: what its attention reads."""

    def repoint(self, request_id: str, index: int, block_id: int) -> bool:
        """Let entry ``index`` of a request point at ``block_id``; False if it isn't known."""
        ...

    def block_ids(self, request_id: str, count: int) -> list[int] | None:
        """The first ``count`` block ids of a request; None if it isn't known. For checks: waits for
        the device."""
        ...


class AttentionView(Protocol):
    """What this rank's attention is given in a step: its tables, less their null entries.

    Tables and lengths of the engine stay as they are. Holds from the beginning of a step to that of
    the next, since a draft model reads tables after the step's own forward pass. The worker clears
    it before dummy runs, which see plain tables.
    """

    def leave_out(self, null_entries: Mapping[str, int]) -> None:
        """Leave out the null entries of these requests, in the step that begins.

        Args:
            null_entries: how many entries of the table of each request are null; of every request
                that has some.
        """
        ...

    def clear(self) -> None:
        """No request has null entries any more."""
        ...


class PageSelector(Protocol):
    """What chooses, for this rank's attention, the pages that requests read when they generate."""

    def read_all(self, requests: Set[str]) -> None:
        """Let these requests read all of their pages, in the step that begins."""
        ...

    def clear(self) -> None:
        """The step is over: no request is named any more."""
        ...

    def rewritten(self, blocks: Tensor) -> None:
        """Every slot of these blocks may hold another token now, in any layer and head.

        Args:
            blocks: ``[n]`` int64 ids, on the caches' device.
        """
        ...

    def take_counts(self) -> tuple[int, int]:
        """Pages read, and pages there, of requests that generate, since the last call; each counted
        for every layer and KV head."""
        ...


class Admission(NamedTuple):
    """A request that is given blocks for the first time, or again after a preemption.

    Attributes:
        request_id: of it.
        adapter: name of its LoRA adapter; None without one.
        block_ids: all that it holds.
        found: tokens at its beginning that need not be computed.
    """

    request_id: str
    adapter: str | None
    block_ids: Sequence[int]
    found: int


class BlockGrowth(NamedTuple):
    """Blocks that a step gives to requests.

    Attributes:
        admitted: requests that held none.
        grown: further blocks of others, by request.
    """

    admitted: Sequence[Admission]
    grown: Sequence[tuple[str, Sequence[int]]]


class Scheduled(NamedTuple):
    """What the engine has just scheduled.

    Attributes:
        preempted: requests that have lost their blocks.
        sent_whole: requests whose whole block list goes to the workers with this step.
        resumed: whether preempted requests are among those.
    """

    preempted: Sequence[str]
    sent_whole: Sequence[str]
    resumed: bool


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share one block table.

    Attributes:
        index: of the group among the engine's.
        block_size: token slots in a block.
        layers: names of the layers, in the order of the model.
        beside: the engine's other groups, which take blocks of the same pool.
    """

    index: int
    block_size: int
    layers: Sequence[str]
    beside: Sequence[SideGroup] = ()
