"""A mechanism that packs what a test tells it to, and a reference from which the same tokens are
deleted.

Its scheduler half decides nothing. Everything else is the product's own: tables, messages, view,
worker part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from memshare.config import PolicyParams, registry
from memshare.mechanisms.compaction.messages import CompactionCommands, Packing
from memshare.mechanisms.contract import Mechanism, SchedulerPart

NAME = "scripted"


class ScriptedParams(PolicyParams):
    name: Literal["scripted"]
    scorer: str = "random"
    seed: int = 0
    probe: str | None = None
    position_weight: float = 0.7


class Scripted(Mechanism[ScriptedParams]):
    params = ScriptedParams
    edits_view = True

    def scheduler_part(self, context: Any) -> ScriptedPart:
        return ScriptedPart(context)

    def worker_part(self, context: Any) -> Any:
        from memshare.mechanisms.compaction.worker import CompactionWorkerPart

        return CompactionWorkerPart(context, self._params)


@contextmanager
def registered() -> Iterator[None]:
    """While this lasts, ``policy.name`` may be ``scripted``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, NAME, f"{__name__}:Scripted")
        registry.forget_packages()
        yield
    registry.forget_packages()


@dataclass
class Plan:
    """Pack entries of a request once so many of its tokens are computed."""

    request: str
    computed: int
    entries: Sequence[int]
    keep: int


class ScriptedPart(SchedulerPart):
    def __init__(self, context: Any) -> None:
        self._tables, self._tracker = context.tables, context.tracker
        self.plans: list[Plan] = []
        self.freed: dict[str, int] = {}
        self._holes: dict[str, int] = {}
        self._ended: list[str] = []

    def commands(self) -> CompactionCommands | None:
        packings = []
        for plan in list(self.plans):
            for state in self._tracker:
                request = state.request
                ready = request.request_id.split("-")[0] == plan.request
                ready &= request.num_computed_tokens >= plan.computed
                ready &= bool(self._tables.entries(request.request_id))
                if (
                    ready
                    and state.sent_whole_at != self._tracker.step
                    and self._tables.unpublish_step(request)
                ):
                    self.plans.remove(plan)
                    packings.append(self._pack(request, plan))
        ended, self._ended = tuple(self._ended), []
        if not packings and not ended and not self._holes:
            return None
        return CompactionCommands(tuple(packings), dict(self._holes), ended)

    def on_gone(self, state: Any, reason: str) -> None:
        if self._holes.pop(state.request_id, None) is not None:
            self._ended.append(state.request_id)

    def _pack(self, request: Any, plan: Plan) -> Packing:
        name, tables = request.request_id, self._tables
        committed = request.num_computed_tokens - request.num_in_flight_tokens
        assert max(plan.entries) < tables.token_map.full(committed)
        blocks = tables.table(name)
        ids = tuple(blocks[entry].block_id for entry in plan.entries)
        assert tables.make_writable(name, plan.entries[: plan.keep])
        tables.stop_publishing(name)
        gone = tables.drop_entries(name, plan.entries[plan.keep :])
        assert gone == len(plan.entries) - plan.keep
        self._holes[name] = self._holes.get(name, 0) + gone
        self.freed[plan.request] = self.freed.get(plan.request, 0) + gone
        return Packing(name, tuple(plan.entries), ids, plan.keep)


@dataclass
class Event:
    """What a packing has left: from position ``start`` on each layer and head sees only these.

    Attributes:
        start: tokens computed before.
        kept: ``[layers, heads, n]`` positions below ``start``, ascending.
    """

    start: int
    kept: Tensor


Seen = list[Tensor | None]
"""What lies under each entry of a request's table on one rank, ``[layers, heads, slots]``
positions: None where nothing was packed, no slot for a hole."""


def event(seen: Seen, start: int, size: int) -> Event:
    """What a packing has left of a request of which ``start`` tokens were computed."""
    shape = next(positions.shape[:2] for positions in seen if positions is not None)
    kept = [
        torch.arange(entry * size, min(start, (entry + 1) * size)).expand(*shape, -1)
        if positions is None
        else positions.long()
        for entry, positions in enumerate(seen)
    ]
    return Event(start, torch.cat(kept, 2).sort(-1).values)


class RankNotes:
    """Notes on one rank, in its process, which logits it computes and what packings have left.

    Attributes:
        logits: by request and position.
        packings: of each, the engine's name of the request and what was seen.
    """

    def __init__(self, worker: Any, policy: str, logits: int | None = None) -> None:
        """Watch a worker; ``logits`` is how many of a row are kept, None for all."""
        self.logits: dict[tuple[str, int], Tensor] = {}
        self.packings: list[tuple[str, Seen]] = []
        self._note_logits(worker.model_runner, logits)
        self._note_packings(worker._memshare.parts[policy], worker.model_runner)

    def _note_logits(self, runner: Any, count: int | None) -> None:
        prepare, compute = runner._prepare_inputs, runner.model.compute_logits
        rows: list[tuple[str, int]] = []

        def prepare_inputs(*args: Any) -> Any:
            prepared = prepare(*args)
            at = prepared[0]
            starts = torch.from_numpy(runner.query_start_loc.np[: runner.input_batch.num_reqs + 1])
            places = torch.searchsorted(starts, at.to(starts.dtype), right=True) - 1
            names = [runner.input_batch.req_ids[place].split("-")[0] for place in places.tolist()]
            rows[:] = zip(names, runner.positions[at].tolist(), strict=True)
            return prepared

        def compute_logits(hidden: Tensor) -> Any:
            logits = compute(hidden)
            if logits is not None and rows:
                for row, values in zip(rows, logits, strict=False):
                    self.logits[row] = values[:count].float().clone()
                rows.clear()
            return logits

        runner._prepare_inputs, runner.model.compute_logits = prepare_inputs, compute_logits

    def _note_packings(self, part: Any, runner: Any) -> None:
        before_step, tables = part.before_step, part._tables
        empty = torch.empty(len(part._caches), part._caches[0].shape[1], 0, dtype=torch.int32)

        def note(commands: CompactionCommands) -> None:
            before_step(commands)
            for packing in commands.packings:
                name = packing.request_id
                entries = len(runner.requests[name].block_ids[tables._group])
                blocks = tables.block_ids(name, entries)
                seen: Seen = []
                for entry, block in enumerate(blocks):
                    facts = part.slots.get(name, entry)
                    if facts is not None:
                        seen.append(facts.positions.clone())
                    else:
                        seen.append(empty if block == 0 else None)
                self.packings.append((name, seen))

        part.before_step = note


class Watched:
    """A real engine whose logits are noted by request and position, and whose packings are read
    back from the worker."""

    def __init__(self, engine: Any) -> None:
        self.llm = engine.llm.llm_engine
        self.part: ScriptedPart = engine.side.parts[NAME]
        self.worker = engine.core.model_executor.driver_worker.worker
        self.tokens: dict[str, list[int]] = {}
        self.events: dict[str, list[Event]] = {}
        self._prompts: dict[str, list[int]] = {}
        self._notes = RankNotes(self.worker, NAME)
        self._note_events(self.worker._memshare.parts[NAME])

    @property
    def logits(self) -> dict[tuple[str, int], Tensor]:
        return self._notes.logits

    @logits.setter
    def logits(self, logits: dict[tuple[str, int], Tensor]) -> None:
        self._notes.logits = logits

    def add(self, name: str, prompt: Sequence[int], tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        self._prompts[name], self.events[name] = list(prompt), []
        self.llm.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.llm.has_unfinished_requests() and not until():
            for output in self.llm.step():
                name, tokens = output.request_id, output.outputs[0].token_ids
                self.tokens[name] = self._prompts[name] + list(tokens)

    def worst(self, name: str, reference: Tensor, start: int = 0) -> float:
        """The largest difference of logits from the reference's, and it must compare some."""
        return worst(self.logits, name, reference, start)

    def _note_events(self, part: Any) -> None:
        before_step, size = part.before_step, part._token_map.block_size

        def note(commands: CompactionCommands) -> None:
            before_step(commands)
            for name, seen in self._notes.packings:
                self.events[name.split("-")[0]].append(event(seen, self.computed(name), size))
            self._notes.packings.clear()

        part.before_step = note

    def computed(self, request_id: str) -> int:
        """Tokens whose KV is written before the step that begins."""
        state = next(s for s in self.part._tracker if s.request_id == request_id)
        # vLLM has counted the step's own tokens when its workers begin it.
        return int(state.request.num_computed_tokens - state.request.num_in_flight_tokens)


def worst(
    logits: Mapping[tuple[str, int], Tensor], name: str, reference: Tensor, start: int = 0
) -> float:
    """The largest difference of a request's logits from the reference's behind ``start``."""
    gaps = [
        float((row.double() - reference[position, : len(row)]).abs().max())
        for (request, position), row in logits.items()
        if request == name and position >= start
    ]
    assert len(gaps) >= 20
    return max(gaps)


class Reference:
    """transformers in float64, with a cache from which tokens are deleted by layer and head."""

    def __init__(self, folder: str, **options: Any) -> None:
        """``options`` are those of ``from_pretrained``."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", **options
        ).eval()
        text = (Path(np.__file__).parent / "_core" / "fromnumeric.py").read_text()
        self._ids: list[int] = self._tokenizer(text[:25000])["input_ids"]

    def text(self, start: int, count: int) -> list[int]:
        return self._ids[start : start + count]

    @torch.inference_mode()
    def logits(
        self, tokens: Sequence[int], events: Sequence[Event], shift: int = 0, swap: bool = False
    ) -> Tensor:
        """Logits of every position.

        Args:
            tokens: prompt and output.
            events: what is deleted, and when.
            shift, swap: for controls: keep the tokens beside those that should be kept, or those
                of the next head.
        """
        from transformers import DynamicCache

        cache, held, held_start, done = DynamicCache(config=self._model.config), None, 0, 0
        logits = []
        ends = [event.start for event in events] + [len(tokens)]
        for event, end in zip([None, *events], ends, strict=True):
            if event is not None:
                kept = event.kept.roll(1, 1) if swap else event.kept
                kept = (kept + shift).clamp(max=event.start - 1)
                before = torch.arange(event.start).expand(*kept.shape[:2], -1)
                if held is not None:
                    before = torch.cat((held, before[..., held_start:]), 2)
                places = torch.searchsorted(before.contiguous(), kept.contiguous())
                full = [layer for layer in cache.layers if not layer.is_sliding]
                for layer, own in zip(full, places, strict=True):
                    index = own.clamp(max=before.shape[2] - 1)[None, :, :, None].expand(
                        -1, -1, -1, layer.keys.shape[-1]
                    )
                    layer.keys = layer.keys.gather(2, index)
                    layer.values = layer.values.gather(2, index)
                held, held_start = kept, event.start
            step = end - done if held is None else 1
            for first in range(done, end, step):
                ids = torch.tensor([tokens[first : first + step]])
                positions = torch.arange(first, first + ids.shape[1])[None]
                out = self._model(ids, past_key_values=cache, position_ids=positions)
                logits.append(out.logits[0])
            done = end
        return torch.cat(logits)
