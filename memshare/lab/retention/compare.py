"""``memshare probe compare``: all policies on the same texts, dropping the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from memshare.errors import UserError
from memshare.lab.markdown import table
from memshare.lab.probe.judging import JUDGED_SEED, probe_for, scorer_for
from memshare.lab.probe.reader import CacheReader
from memshare.lab.probe.texts import Text, recorded_texts, solutions
from memshare.lab.replay.divergence import COLUMNS
from memshare.lab.retention.attention import AttentionUse
from memshare.lab.retention.needles import KIND, answer_tokens, needles
from memshare.lab.retention.policies import POLICIES, Watched, judge_policy

_KL, _TOP = COLUMNS.index("kl"), COLUMNS.index("same_top")
_SCORERS = ("probe", "recency", "random")  # that look at the cache alone


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """What to compare, and on what.

    Attributes:
        model: resolved; reads recorded texts and needles.
        reasoner: resolved; reads worked problems of its own kind.
        recorded: folders of texts by their kinds.
        solutions: worked problems, of the family ``recall``.
        needles: texts that hide a number.
        policies: names of :data:`POLICIES`.
        prefix: tokens of a text of which some are dropped; a worked problem has its own.
        continuation: tokens behind a recorded text's prefix, to judge by.
        freed: fractions of the prefix.
        recent: last tokens that always stay.
        window: last queries that ``window`` looks at.
        position_weight: see :func:`~memshare.mechanisms.compaction.scorers.contract.choose`.
        limit: recorded texts.
    """

    model: str
    reasoner: str
    recorded: dict[str, Path]
    solutions: int
    needles: int
    policies: tuple[str, ...]
    prefix: int
    continuation: int
    freed: tuple[float, ...]
    recent: int
    window: int
    position_weight: float
    limit: int


class Measured(BaseModel):
    """One text, one policy, one fraction.

    Attributes:
        kl: KL divergence of the next-token distributions from the exact ones, nats per token.
        kept: whether the most likely token is the same throughout: of a needle, in its key.
        needs: bytes that serving would keep beside the request's KV.
        kv: bytes of that KV, 16 bits a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    text: str
    policy: str
    freed: float
    kl: float
    kept: bool
    needs: int
    kv: int


def compare(plan: ComparePlan, work: Path) -> list[Measured]:
    """Judge every policy; what ``work`` holds already is not done again.

    Args:
        plan: see there.
        work: file that takes what is measured, a line each.

    Raises:
        UserError: model, probe or texts cannot be used, or the file is of another plan.
    """
    found = _read(work, plan)
    done = {(one.kind, one.text, one.policy, one.freed) for one in found}
    groups: tuple[tuple[str, Callable[[CacheReader], list[Text]]], ...] = (
        (plan.model, lambda reader: _recorded(plan, reader) + _needles(plan, reader)),
        (plan.reasoner, lambda reader: solutions(reader.tokenizer, plan.solutions, JUDGED_SEED)),
    )
    wanted = (bool(plan.recorded) or plan.needles > 0, plan.solutions > 0)
    if not any(wanted):
        raise UserError("nothing to judge by: give --texts DIR, --solutions or --needles COUNT")
    with work.open("a") as file:
        for (model, texts_of), is_wanted in zip(groups, wanted, strict=True):
            if is_wanted:
                for one in _judge_all(plan, model, texts_of, done):
                    found.append(one)
                    file.write(f"{one.model_dump_json()}\n")
                    file.flush()
    return found


def _judge_all(
    plan: ComparePlan,
    model: str,
    texts_of: Callable[[CacheReader], list[Text]],
    done: set[tuple[str, str, str, float]],
) -> Iterator[Measured]:
    reader = CacheReader(model)
    routed = any(POLICIES[name].routed for name in plan.policies)
    probe = probe_for(model, None, reader)[1] if _needs_probe(plan) else None
    seen_in_training = probe.card.seen if probe else ()
    names = [name for name in _SCORERS if name != "probe" or probe is not None]
    scorers = {name: scorer_for(name, probe, 1, reader) for name in names}
    texts = [text for text in texts_of(reader) if text.digest not in seen_in_training]
    recorded = [text.name for text in texts if text.kind in plan.recorded]
    left_out = set(recorded[plan.limit :])
    texts = [text for text in texts if text.name not in left_out]
    for text in tqdm(texts, desc="judging", unit="text", disable=None):
        left = [
            (name, freed)
            for name in plan.policies
            for freed in plan.freed
            if (text.kind, text.name, name, freed) not in done
        ]
        if not left:
            continue
        prefix = text.cut or plan.prefix
        rest = len(text.tokens) - prefix if text.cut else plan.continuation
        reading = reader.read(text, prefix, rest)
        counted = answer_tokens(reader.tokenizer, text) if text.kind == KIND else rest - 1
        wrong = reading.log_probs[:-1].argmax(-1) != reading.tokens[prefix + 1 :]
        if text.kind == KIND and bool(wrong[-counted:].any()):
            continue  # the model does not find it even with everything there
        use = AttentionUse(prefix, plan.window)
        reader.read_watched(text, prefix, use)
        routers = reader.read_routers(text, prefix) if routed else None
        seen = Watched(reading, use, scorers, routers)
        for name, freed in left:
            policy = POLICIES[name]
            rows = judge_policy(reader, seen, policy, freed, plan.recent, plan.position_weight)
            yield Measured(
                kind=text.kind, text=text.name, policy=name, freed=freed,
                kl=float(rows[:, _KL].mean()),
                kept=bool((rows[-counted:, _TOP] == 1).all()),
                needs=policy.needs(reader, prefix, plan.window),
                kv=4 * reader.layers * reader.heads * reader.channels * prefix,
            )  # fmt: skip


def _needs_probe(plan: ComparePlan) -> bool:
    return any(name.startswith("probe") for name in plan.policies)


def _recorded(plan: ComparePlan, reader: CacheReader) -> list[Text]:
    shortest = plan.prefix + plan.continuation
    return [
        text
        for kind, folder in plan.recorded.items()
        for text in recorded_texts(folder, reader.tokenizer, shortest, kind)
    ]


def _needles(plan: ComparePlan, reader: CacheReader) -> list[Text]:
    return needles(reader.tokenizer, plan.needles, plan.prefix)


def _read(work: Path, plan: ComparePlan) -> list[Measured]:
    """What the file holds; a new one gets the plan as its first line."""
    # Other policies, fractions and more texts may be added to what was measured.
    grows = {"policies", "freed", "solutions", "needles", "recorded", "limit"}
    settings = json.dumps({k: v for k, v in asdict(plan).items() if k not in grows})
    if not work.exists():
        work.write_text(f"{settings}\n")
        return []
    first, *lines = work.read_text().splitlines()
    if first != settings:
        raise UserError(
            f"--work {work}: it was measured with other settings; name another file, or delete it"
        )
    return [Measured.model_validate_json(line) for line in lines]


def board(found: Iterable[Measured]) -> str:
    """One table: policies by rows; KL of recorded texts, answers and needles that stay."""
    found = list(found)
    freed = sorted({one.freed for one in found})
    kinds = list(dict.fromkeys(one.kind for one in found))
    policies = [name for name in POLICIES if any(one.policy == name for one in found)]
    heads = ["policy", "from"]
    heads += [f"{kind}, {part:.0%}" for kind in kinds for part in freed]
    rows = []
    for name in policies:
        ours = [one for one in found if one.policy == name]
        row = [name, POLICIES[name].source]
        row += [
            _cell([one for one in ours if (one.kind, one.freed) == (kind, part)])
            for kind in kinds
            for part in freed
        ]
        extra = max(one.needs / one.kv for one in ours)
        rows.append([*row, f"{extra:.1%}"])
    return table([*heads, "kept beside KV"], rows)


def _cell(measured: list[Measured]) -> str:
    """KL of texts that differ in some token in any case; else how many stay as they are."""
    if not measured:
        return ""
    kept = f"{sum(one.kept for one in measured)} of {len(measured)}"
    kl = sum(one.kl for one in measured) / len(measured)
    counted = measured[0].kind == KIND or measured[0].kind.endswith("solutions")
    return f"{kept}" if counted else f"{kl:.4f}"
