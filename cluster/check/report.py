"""What a check has found, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Literal

from memshare.core.capacity import Concurrency
from memshare.core.footprint import Footprint, SideGroup
from memshare.core.token_map import TokenMap
from memshare.moe.placement.ranks import Placement
from memshare.moe.placement.report import as_object, placement_lines

Level = Literal["ok", "warn", "fail"]
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CheckFinding:
    """One thing that was looked at.

    Attributes:
        section: what it belongs to, such as ``model``.
        level: ``ok``; ``warn`` works, but not well or not for certain; ``fail`` will not work.
        text: what was found.
        fix: what to do about it; empty if there is nothing to do.
    """

    section: str
    level: Level
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one worker (one GPU, or one process on a CPU), and its KV cache.

    Attributes:
        weight_bytes: weights.
        lora_bytes: vLLM's slots for LoRA adapters, used or not.
        kv_bytes: what the KV cache may take.
        kv_source: where ``kv_bytes`` comes from, and how certain it is.
        block_size: tokens in a block.
        block_bytes: of one block, all layers.
        blocks: KV blocks, vLLM's null block included (its ``num_gpu_blocks``).
        vllm_concurrency: requests of the greatest length that vLLM says fit.
        bounds_bytes: of all pages' bounds, beside the KV cache; 0 unless pages are selected.
        kv_dtype: of the KV cache, as vLLM names it.
        kv_gain: how many times the bytes of a block it would take in the model's own dtype.
        beside: layers of a hybrid model that have no full attention, by group.
    """

    weight_bytes: int
    lora_bytes: int
    kv_bytes: int
    kv_source: str
    block_size: int
    block_bytes: int
    blocks: int
    vllm_concurrency: float
    bounds_bytes: int = 0
    kv_dtype: str = "auto"
    kv_gain: float = 1.0
    beside: tuple[SideGroup, ...] = ()

    @property
    def footprint(self) -> Footprint:
        """How many blocks tokens take."""
        return Footprint(TokenMap(self.block_size), self.beside)

    @property
    def usable(self) -> int:
        """Blocks that requests can have."""
        return self.blocks - 1


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests of one shape in one replica, see :mod:`memshare.core.capacity`.

    Attributes:
        prompt: tokens.
        output: tokens.
        freed: fraction of a request's blocks that sharing is taken to give up.
        max_num_seqs: vLLM's limit of running requests.
        plain: without sharing.
        shared: with sharing; None where this configuration does not share.
    """

    prompt: int
    output: int
    freed: float
    max_num_seqs: int
    plain: Concurrency
    shared: Concurrency | None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All findings about one set-up.

    Attributes:
        subject: what was checked.
        findings: what was found.
        memory: of one worker; None if it could not be found out.
        capacity: requests at once; None without ``memory``.
        placement: which rank holds what; None for one rank of a dense model, and for models whose
            layers are not known to the arithmetic.
    """

    subject: str
    findings: tuple[CheckFinding, ...]
    memory: Memory | None = None
    capacity: Capacity | None = None
    placement: Placement | None = None

    @property
    def works(self) -> bool:
        """Whether nothing was found that will not work."""
        return all(finding.level != "fail" for finding in self.findings)

    def as_json(self) -> str:
        """The report as one JSON object; sizes in bytes, lengths in tokens."""
        found = {"works": self.works, **asdict(replace(self, placement=None))}
        if self.placement is not None and self.capacity is not None:
            found["placement"] = as_object(self.placement, *_load(self.capacity))
        return json.dumps(found, indent=2)

    def as_text(self) -> str:
        """The report for a terminal."""
        lines = [f"memshare check: {self.subject}"]
        for section, findings in groupby(self.findings, lambda finding: finding.section):
            lines += ["", section, *_finding_lines(findings)]
        if self.memory is not None:
            lines += ["", "memory of one worker", *_memory_lines(self.memory)]
        if self.capacity is not None:
            lines += ["", "requests at once, in one replica", *_capacity_lines(self.capacity)]
            if self.placement is not None:
                placed = placement_lines(self.placement, *_load(self.capacity))
                lines += ["", "placement", *(f"  {line}".rstrip() for line in placed)]
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        count = {
            level: sum(finding.level == level for finding in self.findings)
            for level in ("warn", "fail")
        }
        warnings = f"{count['warn']} warning{'s' * (count['warn'] != 1)}"
        if self.works:
            return f"Will work, with {warnings}." if count["warn"] else "Will work."
        return f"Will not work: {count['fail']} of these must be put right; {warnings}."


def gib(size: float) -> str:
    """A size in GiB, with digits enough to tell small models apart."""
    return f"{size / GIB:.2f} GiB"


def _finding_lines(findings: Iterable[CheckFinding]) -> Iterable[str]:
    for finding in findings:
        first, *rest = finding.text.splitlines()
        yield f"  {finding.level:<5} {first}"
        yield from (f"        {line}" for line in rest)
        if finding.fix:
            yield f"        fix: {finding.fix}"


def _memory_lines(memory: Memory) -> Iterable[str]:
    per_token = memory.block_bytes / memory.block_size
    yield f"  weights    {gib(memory.weight_bytes)}"
    if memory.lora_bytes:
        yield f"  LoRA slots {gib(memory.lora_bytes)}"
    yield f"  KV cache   {gib(memory.kv_bytes)} ({memory.kv_source})"
    if memory.beside:
        yield (
            f"  KV blocks  {memory.blocks:,} of {memory.block_size} tokens for layers with full "
            f"attention; {len(memory.beside)} other groups of layers take blocks of them, too"
        )
    else:
        yield (
            f"  KV blocks  {memory.blocks:,} of {memory.block_size} tokens: "
            f"{memory.usable * memory.block_size:,} tokens for requests"
        )
    yield f"  a block    {memory.block_bytes:,} bytes; a token {per_token:,.0f}"
    if memory.bounds_bytes:
        yield (
            f"  bounds     {gib(memory.bounds_bytes)} beside the KV cache, for page selection: "
            f"{memory.bounds_bytes / memory.kv_bytes:.1%} of it"
        )
    if memory.kv_gain != 1.0:
        gain = f"{memory.kv_gain:.2f} times the blocks of the model's own dtype"
        yield f"  {memory.kv_dtype:<10} {gain}"


def _load(capacity: Capacity) -> tuple[int, int]:
    """Tokens of a request, and requests of a step, that a placement is explained for."""
    return capacity.prompt + capacity.output, capacity.max_num_seqs


def _capacity_lines(capacity: Capacity) -> Iterable[str]:
    shape = f"{capacity.prompt:,} tokens of prompt and {capacity.output:,} of output"
    yield f"  {shape}; at most {capacity.max_num_seqs} run (max_num_seqs)"
    heads = ("", "blocks each", "all at full length", "spread evenly")
    yield "  {:<24} {:>12} {:>20} {:>15}".format(*heads)
    rows = [("without sharing", capacity.plain)]
    if capacity.shared is not None:
        rows.append((f"{capacity.freed:.0%} of blocks shared", capacity.shared))
    for name, found in rows:
        yield f"  {name:<24} {found.held:>12} {found.at_full_length:>20} {found.spread:>15}"
    if capacity.shared is None:
        yield "  this configuration shares nothing (mode or --freed)"
