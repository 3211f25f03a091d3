"""``memshare probe evaluate``: scorers on texts, the probe's on texts that it has not seen."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from memshare.errors import UserError
from memshare.lab.probe.evaluate import Dropping, Tally, judge
from memshare.lab.probe.reader import CacheReader
from memshare.lab.probe.texts import Text, recorded_texts, solutions
from memshare.mechanisms.compaction.probe.card import Judged
from memshare.mechanisms.compaction.probe.file import Probe, ProbeUnusable, read_probe, write_probe
from memshare.mechanisms.compaction.probe.find import ServedModel, find_probe
from memshare.mechanisms.compaction.probe.network import ProbeNetwork
from memshare.mechanisms.compaction.scorers.contract import TokenScorer
from memshare.mechanisms.compaction.scorers.probe import ProbeScorer
from memshare.mechanisms.compaction.scorers.random import RandomScorer
from memshare.mechanisms.compaction.scorers.recency import Recency

logger = logging.getLogger(__name__)

JUDGED_SEED = 20_000  # of solutions


@dataclass(frozen=True, slots=True)
class JudgingPlan:
    """What to judge, and on what.

    Attributes:
        model: resolved: folder or hub id.
        recorded: folders of texts by their kinds.
        solutions: worked problems of the test reasoner.
        probe: file or name; None takes the one that fits.
        tensor_parallel_size: as many ranks share the heads, each choosing by its own.
        scorers: ``probe``, ``recency``, ``random``; the last one without a weight of positions.
        prefix: tokens of each text of which some are dropped.
        continuation: tokens behind it.
        freed: fractions of the prefix.
        recent: last tokens that always stay.
        position_weight: see :func:`choose`.
        every: tokens from one compaction to the next; 0 compacts once.
        limit: texts.
        record: whether the probe's figures are added to its card.
        device: as torch names it.
        dtype: of weights and cache.
    """

    model: str
    recorded: dict[str, Path]
    solutions: int
    probe: str | None
    tensor_parallel_size: int
    scorers: tuple[str, ...]
    prefix: int
    continuation: int
    freed: tuple[float, ...]
    recent: int
    position_weight: float
    every: int
    limit: int
    record: bool
    device: str
    dtype: Literal["float32", "bfloat16"]


def judge_texts(plan: JudgingPlan) -> list[tuple[str, Judged]]:
    """Judge every scorer at every fraction, kind of texts by kind.

    Raises:
        UserError: model, probe or texts cannot be used.
    """
    reader = CacheReader(plan.model, plan.device, plan.dtype)
    found = probe_for(plan.model, plan.probe, reader) if "probe" in plan.scorers else None
    probe = found and found[1]
    texts = _texts(plan, reader, frozenset(probe.card.seen if probe else ()))
    size = plan.tensor_parallel_size
    tallies: dict[tuple[str, str, Dropping], Tally] = {}
    for text in tqdm(texts, desc="judging", unit="text", disable=None):
        prefix = text.cut or plan.prefix
        rest = len(text.tokens) - prefix if text.cut else plan.continuation
        reading = reader.read(text, prefix, rest)
        for name in plan.scorers:
            weight = 0.0 if name == "random" else plan.position_weight
            for freed in plan.freed:
                how = Dropping(freed, plan.recent, weight, plan.every)
                tally = tallies.setdefault((name, text.kind, how), Tally(text.kind, prefix, size))
                scorer = scorer_for(name, probe, size, reader)
                tally.measured.append(judge(reader, reading, scorer, how))
    rows = [(name, tally.judged(how)) for (name, _, how), tally in tallies.items()]
    if plan.record and found is not None:
        path, probe = found
        card = probe.card.with_judged(row for name, row in rows if name == "probe")
        write_probe(replace(probe, card=card), path)
    return rows


def probe_for(model: str, name: str | None, reader: CacheReader) -> tuple[Path, Probe]:
    """The probe to judge, and its file.

    Args:
        model: resolved: folder or hub id.
        name: file or name of the probe; None takes the one that fits.
        reader: of the model.

    Raises:
        UserError: there is none, or it does not fit.
    """
    served = ServedModel(model, reader.layers, reader.heads, reader.channels)
    try:
        path = find_probe(name, served)
        if path is None:
            raise UserError(
                f"no probe fits {model}; name one with --probe, or train one with `memshare "
                "probe train`"
            )
        return path, read_probe(path)
    except ProbeUnusable as reason:
        raise UserError(str(reason)) from None


def _texts(plan: JudgingPlan, reader: CacheReader, seen: frozenset[str]) -> list[Text]:
    shortest = plan.prefix + plan.continuation
    texts = [
        text
        for kind, folder in plan.recorded.items()
        for text in recorded_texts(folder, reader.tokenizer, shortest, kind)
    ]
    texts += solutions(reader.tokenizer, plan.solutions, JUDGED_SEED)
    if not texts:
        raise UserError("there is nothing to judge by; give --texts DIR or --solutions COUNT")
    unseen = [text for text in texts if text.digest not in seen]
    if not unseen:
        raise UserError(
            "the probe was trained on each of these texts, and would look better than it is; give "
            "others (the cross-validation's figures are in its card: `memshare probe show`)"
        )
    if len(unseen) < len(texts):
        logger.warning(
            "%d of %d texts are left out: the probe was trained on them",
            len(texts) - len(unseen), len(texts),
        )  # fmt: skip
    return unseen[: plan.limit]


def scorer_for(name: str, probe: Probe | None, size: int, reader: CacheReader) -> TokenScorer:
    """A scorer over a text that ``reader`` has read.

    Args:
        name: ``probe``, ``recency`` or ``random``.
        probe: for the first.
        size: of tensor parallelism: each rank scores by its own heads.
        reader: of the model.

    Raises:
        UserError: the probe does not serve this size.
    """
    if name == "recency":
        return Recency()
    if name == "random":
        return RandomScorer(seed=0, first_head=0)
    assert probe is not None  # it was asked for
    heads, device = reader.heads // size, torch.device(reader.device)
    together = probe.card.group(heads) if heads * size == reader.heads else None
    if together is None:
        sizes = ", ".join(map(str, probe.card.tensor_parallel_sizes))
        raise UserError(f"--tensor-parallel-size {size}: the probe is for {sizes}")
    networks = [probe.network(together).part(rank * heads, heads, device) for rank in range(size)]
    return ProbeScorer(RankNetworks(networks), reader.rotation, probe.card.reach)


class RankNetworks:
    """The networks of all ranks, as one."""

    def __init__(self, networks: list[ProbeNetwork]) -> None:
        """Put together ``networks``, rank by rank."""
        self._networks = networks

    def worth(self, upright: Tensor, values: Tensor) -> Tensor:
        """See :meth:`ProbeNetwork.worth`."""
        parts = (tensor.chunk(len(self._networks), 1) for tensor in (upright, values))
        worths = (
            network.worth(*part)
            for network, part in zip(self._networks, zip(*parts, strict=True), strict=True)
        )
        return torch.cat(list(worths), 1)
