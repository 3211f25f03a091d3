"""Trains a probe from texts to file: reads them, cross-validates by text, trains on all of them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Literal

from torch import Tensor
from tqdm import tqdm

from memshare import __version__
from memshare.errors import UserError
from memshare.lab.probe.collect import TARGETS, Sample, Samples, Target
from memshare.lab.probe.evaluate import Dropping, Tally, judge, rank_correlation
from memshare.lab.probe.fit import Fit, fit
from memshare.lab.probe.reader import CacheReader
from memshare.lab.probe.texts import SHORTEST, Text, folds, own_texts, recorded_texts, solutions
from memshare.lab.problems import FAMILIES
from memshare.mechanisms.compaction.probe.card import Judged, ProbeCard, TrainingTexts
from memshare.mechanisms.compaction.probe.file import Probe
from memshare.mechanisms.compaction.probe.network import ProbeNetwork
from memshare.mechanisms.compaction.probe.turn import turn_of
from memshare.mechanisms.compaction.probe.weights import fingerprint
from memshare.mechanisms.compaction.scorers.probe import ProbeScorer

logger = logging.getLogger(__name__)

TRAINING_SEED = 1_000_000  # of solutions: far from those that are judged


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What to train, and how well to measure it.

    Attributes:
        model: resolved: folder or hub id.
        name: how the card calls it.
        recorded: folders of texts by their kinds.
        own: texts that the model writes itself.
        solutions: worked problems of the test reasoner.
        prefix: tokens of a text that are read, at most.
        continuation: tokens behind the prefix by which damage is judged.
        freed: fractions of the prefix that are dropped to judge it.
        folds: of the cross-validation; 0 leaves it out.
        judged: texts whose damage is measured, at most; 0 measures rank correlation alone.
        together: KV heads that networks read together, a kind of networks each; empty for two
            kinds: all heads of a layer, and each alone.
        target: what they learn to tell.
        smoothing: tokens on each side over which what they tell is averaged.
        how: hyperparameters; their ``together`` is not looked at.
        work: folder for what was read and trained so far.
        device: as torch names it.
        dtype: of weights and cache.
        licences: of model and texts, for the card.
    """

    model: str
    name: str
    recorded: dict[str, Path]
    own: int
    solutions: int
    prefix: int
    continuation: int
    freed: tuple[float, ...]
    folds: int
    judged: int
    together: tuple[int, ...]
    target: Target
    smoothing: int
    how: Fit
    work: Path
    device: str
    dtype: Literal["float32", "bfloat16"]
    licences: str


def train(plan: TrainingPlan) -> Probe:
    """Train a probe.

    Raises:
        UserError: the model or the texts cannot be used.
    """
    reader = CacheReader(plan.model, plan.device, plan.dtype)
    weights = fingerprint(plan.model)
    samples = Samples(plan.work, weights, plan.prefix, plan.target)
    kinds = _kinds(plan, reader)
    texts = _texts(plan, reader)
    read = samples.collect(texts, reader)
    validation = _cross_validate(plan, reader, read, kinds) if plan.folds else _Validation()
    tensors = {
        together: _fit(plan, reader, read, together, f"training, heads together: {together}")
        for together in kinds
    }
    counts = Counter(text.kind for text in texts)
    card = ProbeCard(
        model=plan.name,
        weights=weights,
        layers=reader.layers,
        heads=reader.heads,
        channels=reader.channels,
        together=kinds,
        turn=turn_of(reader.rotation),
        neighbours=plan.how.neighbours,
        smoothing=plan.smoothing,
        hidden=plan.how.hidden,
        target=TARGETS[plan.target],
        trained_on=tuple(
            TrainingTexts(
                kind=kind,
                texts=count,
                tokens=sum(sample.length for sample in read if sample.text.kind == kind),
            )
            for kind, count in counts.items()
        ),
        seen=tuple(sorted(text.digest for text in texts)),
        rank_correlation={
            together: sum(found) / len(found) for together, found in validation.correlations.items()
        },
        judged=validation.judged(),
        made_by=f"MemShare {__version__}, {datetime.now(UTC):%Y-%m-%d}",
        licences=plan.licences,
    )
    return Probe(card, tensors)


@dataclass(slots=True)
class _Validation:
    """What was found on texts that the probe of their fold had not seen."""

    correlations: dict[int, list[float]] = field(default_factory=dict)
    tallies: dict[tuple[str, float, int], Tally] = field(default_factory=dict)

    def judged(self) -> tuple[Judged, ...]:
        return tuple(tally.judged(Dropping(freed)) for (_, freed, _), tally in self.tallies.items())


def _kinds(plan: TrainingPlan, reader: CacheReader) -> tuple[int, ...]:
    """How many heads are read together, the most first.

    Raises:
        UserError: the model's heads do not make such groups.
    """
    kinds = set(plan.together) or {reader.heads, 1}
    for together in kinds:
        if reader.heads % together:
            raise UserError(
                f"--heads-together {together}: {plan.model} has {reader.heads} KV heads; give "
                f"divisors of that"
            )
    return tuple(sorted(kinds, reverse=True))


def _cross_validate(
    plan: TrainingPlan, reader: CacheReader, read: Sequence[Sample], kinds: Sequence[int]
) -> _Validation:
    """Train without each fold in turn, and measure on it."""
    if len(read) < 2:
        raise UserError("--folds: cross-validation takes two texts; give more, or --folds 0")
    found = _Validation()
    to_judge = _to_judge(plan, read)
    parts = folds([sample.text for sample in read], plan.folds)
    for number, part in enumerate(parts, start=1):
        seen = [sample for i, sample in enumerate(read) if i not in part]
        unseen = [read[i] for i in part]
        scorers = {}
        for together in kinds:
            title = f"fold {number} of {len(parts)}, heads together: {together}"
            tensors = _fit(plan, reader, seen, together, title)
            network = _by_layer(tensors, plan)
            correlation = rank_correlation(unseen, reader.layers, network)
            found.correlations.setdefault(together, []).append(correlation)
            probe = ProbeNetwork(tensors, plan.how.neighbours, plan.smoothing)
            reach = plan.how.neighbours + plan.smoothing
            scorers[together] = ProbeScorer(probe, reader.rotation, reach)
            logger.info(
                "fold %d, heads together: %d: rank correlation %.3f on %d texts",
                number, together, correlation, len(unseen),
            )  # fmt: skip
        chosen = [sample.text for sample in unseen if sample.text.digest in to_judge]
        for text in tqdm(chosen, desc="judging", unit="text", disable=None):
            _judge(plan, reader, text, scorers, found)
    return found


def _to_judge(plan: TrainingPlan, read: Sequence[Sample]) -> frozenset[str]:
    """Digests of the texts that are long enough to be judged, evenly spread over all."""
    long = [
        sample.text.digest
        for sample in read
        if len(sample.text.tokens) >= (sample.text.cut or plan.prefix) + 2
        and (sample.text.cut or len(sample.text.tokens) >= plan.prefix + plan.continuation)
    ]
    count = min(plan.judged, len(long))
    return frozenset(long[i * len(long) // count] for i in range(count))


def _judge(
    plan: TrainingPlan,
    reader: CacheReader,
    text: Text,
    scorers: Mapping[int, ProbeScorer],
    found: _Validation,
) -> None:
    prefix = text.cut or plan.prefix
    rest = len(text.tokens) - prefix if text.cut else plan.continuation
    reading = reader.read(text, prefix, rest)
    for (together, scorer), freed in product(scorers.items(), plan.freed):
        key = (text.kind, freed, together)
        size = reader.heads // together  # whose ranks have no more heads than that
        tally = found.tallies.setdefault(key, Tally(text.kind, prefix, size))
        tally.measured.append(judge(reader, reading, scorer, Dropping(freed)))


def _fit(
    plan: TrainingPlan, reader: CacheReader, samples: Sequence[Sample], together: int, title: str
) -> dict[str, Tensor]:
    how = replace(plan.how, together=together)
    return fit(samples, reader.layers, how, plan.work, plan.device, title)


def _by_layer(tensors: dict[str, Tensor], plan: TrainingPlan) -> Callable[[int], ProbeNetwork]:
    def network(layer: int) -> ProbeNetwork:
        of_layer = {name: tensor[layer : layer + 1] for name, tensor in tensors.items()}
        return ProbeNetwork(of_layer, plan.how.neighbours, plan.smoothing)

    return network


def _texts(plan: TrainingPlan, reader: CacheReader) -> list[Text]:
    texts = [
        text
        for kind, folder in plan.recorded.items()
        for text in recorded_texts(folder, reader.tokenizer, SHORTEST, kind)
    ]
    texts += solutions(reader.tokenizer, plan.solutions, TRAINING_SEED, FAMILIES)
    if plan.own:
        texts += _own_texts(plan, reader)
    if not texts:
        raise UserError("there is nothing to train on; give --texts DIR or --own COUNT")
    return texts


def _own_texts(plan: TrainingPlan, reader: CacheReader) -> list[Text]:
    """Texts that the model writes, or has written in an earlier run."""
    file = plan.work / "own.jsonl"
    known = {}
    if file.exists():
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("]")]
        known = dict(rows)

    with file.open("a") as lines:

        def write(prompt: list[int], number: int) -> list[int]:
            if number not in known:
                longest = max(plan.prefix - len(prompt), SHORTEST)
                known[number] = reader.write(prompt, SHORTEST, longest, seed=number)
                lines.write(f"{json.dumps([number, known[number]])}\n")
                lines.flush()
            return list(known[number])

        written = own_texts(reader.tokenizer, plan.own, write)
        bar = tqdm(written, total=plan.own, desc="the model writes", unit="text", disable=None)
        return list(bar)
