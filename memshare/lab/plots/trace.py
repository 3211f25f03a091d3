"""A text as a page: its repetitions, what was given up, and arcs from that to its twins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from memshare.core.token_map import TokenMap
from memshare.lab.replay.prefilled import PrefilledTrace, Prefix

Kind = Literal["prompt", "plain", "twin", "gone"]


class Mark(NamedTuple):
    """What is to be seen of one token.

    Attributes:
        kind: ``gone`` is in a block that was given up, ``twin`` is written elsewhere too.
        twin: position of its twin, the copy before or after it that is more alike; -1 if it has
            none.
        similarity: to its twin, 0..1.
    """

    kind: Kind
    twin: int
    similarity: float


class TokenRun(NamedTuple):
    """Tokens ``[start, end)`` that look the same, whose twins stand side by side as well."""

    start: int
    end: int
    kind: Kind
    twin: int
    similarity: float


def marks(prefilled: PrefilledTrace, before: Prefix, after: Prefix, block_size: int) -> list[Mark]:
    """One mark for each token of the prefix.

    Args:
        prefilled: the text.
        before: the prefix with nothing given up: its twins are the first ones.
        after: the same with blocks given up.
        block_size: tokens.
    """
    found = []
    if before.twins is None:
        raise ValueError("the policy has not looked for twins")
    twins, similarity = before.twins.best
    token_map = TokenMap(block_size)
    for position in range(prefilled.prefix):
        twin, score = int(twins[position]), float(max(similarity[position], 0.0))
        kind: Kind = "twin" if twin >= 0 else "plain"
        if token_map.entry(position) in after.donor_of:
            kind = "gone"
        elif position < prefilled.prompt:
            kind = "prompt"
        found.append(Mark(kind, twin, round(score, 2)))
    return found


def with_twin(found: Sequence[Mark]) -> tuple[float, float]:
    """Fractions of tokens whose twin stands later, and earlier."""
    later = sum(mark.twin > position for position, mark in enumerate(found))
    earlier = sum(0 <= mark.twin < position for position, mark in enumerate(found))
    return later / len(found), earlier / len(found)


def runs(found: Sequence[Mark]) -> Iterator[TokenRun]:
    """Join neighbours of one kind whose twins are neighbours."""
    start = 0
    for i in range(1, len(found) + 1):
        if i < len(found) and found[i].kind == found[i - 1].kind:
            apart = found[i].twin - found[i - 1].twin
            if found[i].kind == "prompt" or apart == 1 or found[i].twin == found[i - 1].twin == -1:
                continue
        scores = [mark.similarity for mark in found[start:i]]
        first = found[start]
        yield TokenRun(start, i, first.kind, first.twin, round(float(np.mean(scores)), 2))
        start = i


def write_trace(
    tokens: Sequence[bytes], found: Sequence[Mark], title: str, facts: dict[str, str], path: Path
) -> None:
    """Write the page. It needs no network.

    Args:
        tokens: the bytes of each token of the prefix.
        found: marks of the same.
        title: of the page.
        facts: shown above the text, by name.
        path: the file.
    """
    # A run is cut where the twins of another one begin, so that an arc has an end to point at.
    whole = list(runs(found))
    ends = {run.twin for run in whole if run.twin >= 0}
    pieces: list[TokenRun] = []
    for run in whole:
        cuts = [run.start, *(p for p in range(run.start + 1, run.end) if p in ends), run.end]
        for start, end in pairwise(cuts):
            twin = run.twin + start - run.start if run.twin >= 0 else -1
            pieces.append(run._replace(start=start, end=end, twin=twin))
    piece_of = {p: i for i, piece in enumerate(pieces) for p in range(piece.start, piece.end)}
    data = {
        "title": title,
        "facts": list(facts.items()),
        "spans": [
            {
                "text": b"".join(tokens[piece.start : piece.end]).decode(errors="replace"),
                "kind": piece.kind,
                "similarity": piece.similarity,
                "twin": piece_of.get(piece.twin),
            }
            for piece in pieces
        ],
    }
    page = files("memshare.lab.plots").joinpath("trace.html").read_text(encoding="utf-8")
    # "</script>" in a text must not end the data.
    payload = json.dumps(data).replace("<", "\\u003c")
    path.write_text(page.replace("__DATA__", payload), encoding="utf-8")
