"""What the scheduler side knows of one request, and what it knows of one pair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memshare.request_options import RequestOptions
from memshare.search.steps import StepSegmenter

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


@dataclass(eq=False, slots=True)
class RequestState:
    """One live request. A preemption starts a new generation: all of its blocks are new then.

    Attributes:
        request: vLLM's own object.
        options: what the request asked for.
        history: key of its steps at the evaluators: its id, or its tenant.
        generation: how often it has lost its blocks.
        segmenter: cuts its output; None if the policy needs no steps.
        fed: tokens that the segmenter has seen, counted from the first output token.
        emitted: output tokens that lie in finished steps.
        full: full, committed blocks when last looked at.
        repointed: entries that point at a donor.
        sharers: the same entries by the id of the block that they point at.
        tainted_from: first block that must never be published; None while the KV is exact.
        held_back: verified pairs that can't be applied before the next block.
        sent_whole_at: engine step in which its block list was last sent to the workers whole.
        given_up: blocks it has given up in its life.
        peak_blocks: most blocks it is known to have held; what it holds now may be more.
        alive: false once vLLM has finished it.
    """

    request: Request
    options: RequestOptions
    history: str
    segmenter: StepSegmenter | None
    generation: int = 0
    fed: int = 0
    emitted: int = 0
    full: int = 0
    repointed: set[int] = field(default_factory=set)
    sharers: dict[int, list[int]] = field(default_factory=dict)
    tainted_from: int | None = None
    held_back: list[Candidate] = field(default_factory=list)
    sent_whole_at: int = -1
    given_up: int = 0
    peak_blocks: int = 0
    alive: bool = True

    @property
    def request_id(self) -> str:
        """vLLM's id."""
        return str(self.request.request_id)

    def holds_alone(self, block: KVCacheBlock) -> bool:
        """Whether only this request's own entries point at a block that it has written."""
        return bool(block.ref_cnt == 1 + len(self.sharers.get(block.block_id, ())))

    def sharers_are_right(self, table: list[KVCacheBlock]) -> bool:
        """Whether ``sharers`` holds each re-pointed entry once, under its block."""
        noted = {entry: block for block, entries in self.sharers.items() for entry in entries}
        return noted == {entry: table[entry].block_id for entry in self.repointed}

    def note_held(self, entries: int) -> None:
        """Its table, of so many entries, is about to shrink or to be remapped."""
        self.peak_blocks = max(self.peak_blocks, entries - len(self.repointed))

    @property
    def has_plain_prompt(self) -> bool:
        """Whether the prompt's token ids say what its blocks hold: not where placeholders stand for
        images, nor where embeddings were sent."""
        return not self.request.mm_features and self.request.prompt_embeds is None

    def start_generation(self, segmenter: StepSegmenter | None) -> None:
        """Forget everything about blocks that no longer exist."""
        self.generation += 1
        self.segmenter = segmenter
        self.fed = self.emitted = self.full = 0
        self.repointed = set()
        self.sharers = {}
        self.tainted_from = None
        self.held_back = []


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A table entry as it was when a pair was proposed; validated by object identity later."""

    state: RequestState
    generation: int
    index: int
    block: KVCacheBlock

    def is_current(self, table: list[KVCacheBlock] | None) -> bool:
        """Whether the entry still is what it was: nothing in between moved or freed the block."""
        return (
            self.state.alive
            and self.state.generation == self.generation
            and table is not None
            and self.index < len(table)
            and table[self.index] is self.block
        )


@dataclass(eq=False, slots=True)
class Candidate:
    """A (target, donor) pair on its way from stage one to a remap."""

    target: Entry
    donor: Entry
    damage: float = 1.0

    @property
    def target_key(self) -> tuple[str, int, int]:
        """Request, generation and index of the target."""
        target = self.target
        return (target.state.request_id, target.generation, target.index)
