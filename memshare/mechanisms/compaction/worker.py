"""The worker part: chooses the tokens that stay, moves them together, and shows attention the rest.

How many blocks become free follows from the commands, so the scheduler reuses them in the same step
and waits for no answer; what is reported is how long it took. Each rank chooses for the KV heads
that it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from memshare.core.interfaces import NULL_BLOCK, AttentionView
from memshare.kv.layout import KVLayout, LayoutUnknown
from memshare.kv.moves import TokenMover
from memshare.mechanisms.compaction.messages import (
    CompactionCommands,
    CompactionReport,
    Packing,
)
from memshare.mechanisms.compaction.packing import move_along, plan_moves
from memshare.mechanisms.compaction.scorers.contract import choose
from memshare.mechanisms.compaction.scorers.registry import ScorerChoice, build_scorer
from memshare.mechanisms.compaction.slots import SlotBook, SlotFacts
from memshare.mechanisms.compaction.stopwatch import Stopwatch
from memshare.mechanisms.contract import WorkerContext, WorkerPart

logger = logging.getLogger(__name__)

_SCORED_BYTES = 4 << 20  # of K and V in float32, read for a scorer at once: caches hold it


class CompactionUnsupported(ValueError):  # noqa: N818 - a finding about a model, not a fault
    """Tokens of this model's KV cache cannot be moved; the text says why and what to do."""


class CompactionChoice(ScorerChoice, Protocol):
    """What the policy's parameters say about choosing tokens."""

    @property
    def position_weight(self) -> float:
        """See :func:`~memshare.mechanisms.compaction.scorers.contract.choose`."""
        ...


class CompactionWorkerPart(WorkerPart):
    """Does before each step what the scheduler part has decided.

    Attributes:
        slots: which tokens lie under packed entries.
    """

    def __init__(self, context: WorkerContext, params: CompactionChoice) -> None:
        """Learn where K and V lie.

        Args:
            context: of this rank; with a view.
            params: they name the scorer, and how much a token's place counts beside its worth.

        Raises:
            CompactionUnsupported: some layer's cache cannot be read.
            ScorerUnusable: the scorer does not work with this model.
        """
        self._view: AttentionView | None = context.view
        self._selector = context.selector
        self._tables = context.tables
        self._token_map = context.token_map
        self._scorer = build_scorer(params, context)
        self._position_weight = params.position_weight
        self._caches = list(context.caches.values())
        self._layouts = [_layout(context, name, cache) for name, cache in context.caches.items()]
        size = context.token_map.block_size
        self._mover = TokenMover(self._caches, self._layouts, size)
        self.slots = SlotBook(size)
        self._stopwatch = Stopwatch(self._caches[0].device)
        logger.info(
            "tokens of %d layers move by %d copies", len(self._caches), self._mover.launches
        )

    def before_step(self, commands: CompactionCommands) -> None:
        """Forget, pack, edit the table, and tell attention how many entries are holes."""
        for request_id in commands.ended:
            self.slots.forget(request_id)
        if commands.packings:
            with self._stopwatch.running():
                for packing in commands.packings:
                    self._pack(packing)
        for packing in commands.packings:
            for entry in packing.entries[packing.keep :]:
                if not self._tables.repoint(packing.request_id, entry, NULL_BLOCK):
                    logger.error("a packing of %s, which has no table here", packing.request_id)
                    break
        if commands.holes:
            assert self._view is not None, "the engine was started without an attention view"
            self._view.leave_out(commands.holes)

    def after_step(self) -> CompactionReport | None:
        """See :meth:`WorkerPart.after_step`."""
        seconds = self._stopwatch.take()
        return CompactionReport(seconds) if seconds else None

    @torch.inference_mode()
    def _pack(self, packing: Packing) -> None:
        request_id, entries, keep = packing.request_id, packing.entries, packing.keep
        kept, gone = entries[:keep], entries[keep:]
        if not kept:
            self.slots.drop(request_id, gone)
            return
        blocks = self._to_device(packing.blocks)
        facts = SlotFacts.joined(list(self._facts(packing, blocks)))
        room = keep * self._token_map.block_size
        stays = choose(facts.worths, facts.positions, room, self._position_weight)
        moves = plan_moves(stays, room)
        self._mover.move(blocks, moves.sources, moves.targets)
        if self._selector is not None:
            self._selector.rewritten(blocks[:keep])
        packed = SlotFacts(
            move_along(facts.positions, moves, room), move_along(facts.worths, moves, room)
        )
        self.slots.pack(request_id, kept, gone, packed)

    def _facts(self, packing: Packing, blocks: Tensor) -> Iterator[SlotFacts]:
        """What is known of the tokens under the entries, in order; new ones are scored."""
        known = [self.slots.get(packing.request_id, entry) for entry in packing.entries]
        # Runs of entries whose tokens are consecutive; each packed entry is a run of its own.
        numbered = enumerate(packing.entries)
        runs = groupby(numbered, lambda at: (known[at[0]] is None, at[1] - at[0]))
        for (is_new, _), run in runs:
            places = [place for place, _ in run]
            if is_new:
                yield from self._score(
                    packing.entries[places[0]], blocks[places[0] : places[-1] + 1]
                )
            else:
                yield from (fact for place in places if (fact := known[place]) is not None)

    def _score(self, entry: int, blocks: Tensor) -> Iterator[SlotFacts]:
        """Score the tokens of consecutive entries, as many at once as memory allows."""
        cache = self._caches[0]
        size = self._token_map.block_size
        per_block = len(self._caches) * cache.shape[1] * size * cache.shape[3] * 4
        at_once = max(1, _SCORED_BYTES // per_block)
        for part in blocks.split(at_once):
            tokens = len(part) * size
            first = self._token_map.first_position(entry)
            positions = torch.arange(first, first + tokens, dtype=torch.int32, device=cache.device)
            keys, values = self._read(part)
            worths = self._scorer.score(keys, values, positions)
            yield SlotFacts(positions.expand(worths.shape), worths.float())
            entry += len(part)

    def _read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of whole blocks, each ``[layers, heads, tokens, channels]`` float32."""
        split = self._token_map.block_size // self._caches[0].shape[2]
        if split > 1:  # the cache's blocks are parts of the engine's
            inner = torch.arange(split, device=blocks.device)
            blocks = (blocks[:, None] * split + inner).flatten()
        heads, slots, channels = self._caches[0].shape[1], len(blocks), self._layouts[0].channels
        slots *= self._layouts[0].slots
        shape = (2, len(self._caches), heads, slots, channels)
        read = torch.empty(shape, device=blocks.device)
        for layer, (cache, layout) in enumerate(zip(self._caches, self._layouts, strict=True)):
            keys, values = read[:, layer].view(2, heads, len(blocks), layout.slots, channels)
            layout.gather_into(cache, blocks, keys.transpose(0, 1), values.transpose(0, 1))
        return read[0], read[1]

    def _to_device(self, numbers: Sequence[int]) -> Tensor:
        device = self._caches[0].device
        tensor = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
        return tensor.to(device, non_blocking=True)


def _layout(context: WorkerContext, name: str, cache: Tensor) -> KVLayout:
    try:
        return KVLayout.learn(context.layers[name], cache)
    except LayoutUnknown as reason:
        raise CompactionUnsupported(
            f"MemShare cannot move tokens of attention layer {name}: {reason}. Choose policy "
            "'oldest' or 'random', which move nothing, or mode 'off'."
        ) from None
