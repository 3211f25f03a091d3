"""What the scheduler side knows about one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memshare.core.interfaces import Block, EngineRequest
from memshare.request_options import RequestOptions


@dataclass(eq=False, slots=True)
class RequestState:
    """One live request. A preemption starts a new generation: all of its blocks are new then.

    Attributes:
        request: the engine's own object.
        options: what the request asked for.
        history: key of its steps at the evaluators: its id, or its tenant.
        generation: how often it has lost its blocks.
        full: full, committed blocks when last looked at.
        repointed: entries that point at a donor.
        sharers: the same entries by the id of the block that they point at.
        holes: entries whose block has been dropped; they hold the null block.
        tainted_from: first block that must never be published; None while the KV is exact.
        sent_whole_at: engine step in which its block list was last sent to the workers whole.
        given_up: blocks it has given up in its life.
        dropped_tokens: tokens it has lost in its life, in every layer and KV head as many.
        peak_blocks: most blocks it is known to have held; what it holds now may be more.
        alive: false once the engine has finished it.
    """

    request: EngineRequest
    options: RequestOptions
    history: str
    generation: int = 0
    full: int = 0
    repointed: set[int] = field(default_factory=set)
    sharers: dict[int, list[int]] = field(default_factory=dict)
    holes: set[int] = field(default_factory=set)
    tainted_from: int | None = None
    sent_whole_at: int = -1
    given_up: int = 0
    dropped_tokens: int = 0
    peak_blocks: int = 0
    alive: bool = True

    @property
    def request_id(self) -> str:
        """The engine's name for it."""
        return str(self.request.request_id)

    @property
    def lost(self) -> int:
        """Entries that hold no block of their own any more: re-pointed, or holes."""
        return len(self.repointed) + len(self.holes)

    def holds_alone(self, block: Block) -> bool:
        """Whether only this request's own entries point at a block that it has written."""
        return bool(block.ref_cnt == 1 + len(self.sharers.get(block.block_id, ())))

    def sharers_are_right(self, table: Sequence[Block]) -> bool:
        """Whether ``sharers`` holds each re-pointed entry once, under its block."""
        noted = {entry: block for block, entries in self.sharers.items() for entry in entries}
        return noted == {entry: table[entry].block_id for entry in self.repointed}

    def note_held(self, entries: int) -> None:
        """Its table, with this many entries, is about to shrink, to be remapped or compacted."""
        self.peak_blocks = max(self.peak_blocks, entries - self.lost)

    @property
    def has_plain_prompt(self) -> bool:
        """Whether the prompt's token ids say what its blocks hold: not where placeholders stand for
        images, nor where embeddings were sent."""
        return not self.request.mm_features and self.request.prompt_embeds is None

    def start_generation(self) -> None:
        """Forget everything about blocks that no longer exist."""
        self.generation += 1
        self.full = 0
        self.repointed = set()
        self.sharers = {}
        self.holes = set()
        self.tainted_from = None
