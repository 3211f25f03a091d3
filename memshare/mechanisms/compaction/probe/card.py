"""What a probe is for, what it was trained on, and how good it is on texts that it has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from memshare.config.fields import Fraction

FORMAT = 2
"""Of the file. Raised when older readers would misread it."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainingTexts(_Record):
    """One kind of texts that the probe was trained on."""

    kind: str
    texts: int
    tokens: int


class Judged(_Record):
    """What dropping tokens by the probe does to texts that it has not seen.

    Attributes:
        texts: how many, of what kind.
        prefix: tokens of each, of which some were dropped.
        freed: fraction of them that was dropped, in every layer and head.
        every: tokens from one compaction to the next, as serving does it; 0 if once, at the end.
        recent: last tokens that were not dropped; cards that do not say were made with 128.
        tensor_parallel_size: ranks that shared the heads, each choosing by its own.
        kl: KL divergence of the next-token distributions from the exact ones, nats per token.
        same_top: fraction of tokens whose most likely next token stays the same.
        unchanged: texts in which it stays so at every token.
    """

    kind: str
    texts: int
    prefix: int
    freed: Fraction
    every: int = 0
    recent: int = 128
    tensor_parallel_size: int = 1
    kl: float
    same_top: Fraction
    unchanged: int

    @property
    def how_often(self) -> str:
        """In words."""
        return f"every {self.every} tokens" if self.every else "yes"


class ProbeCard(_Record):
    """See module docstring.

    Attributes:
        format: see ``FORMAT``.
        model: how its model is called.
        weights: see :func:`~memshare.mechanisms.compaction.probe.weights.fingerprint`.
        layers: attention layers of the model.
        heads: KV heads of each, over all ranks.
        channels: of one head.
        together: KV heads that a network reads together, the most first: the file has networks of
            each kind. A rank uses the first kind of which it has whole groups.
        turn: angle by which each rotated pair of key channels turns from one position to the next,
            in radians.
        neighbours: tokens on each side that the probe averages over.
        smoothing: tokens on each side over which what it tells is averaged: the words around a fact
            are needed to find it.
        hidden: units of the network.
        target: what it was trained to tell.
        trained_on: texts.
        seen: digests of these, so that nobody judges it by them.
        rank_correlation: Spearman's, of what it tells and what it was to tell, mean over layers,
            heads and texts, on texts that it has not seen; by heads read together.
        judged: its damage.
        made_by: MemShare's version, and the date.
        licences: of model and texts.
    """

    format: int = FORMAT
    model: str = Field(min_length=1)
    weights: tuple[float, ...] | None
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    channels: int = Field(ge=1)
    together: tuple[int, ...] = Field(min_length=1)
    turn: tuple[float, ...]
    neighbours: int = Field(ge=0)
    smoothing: int = Field(default=0, ge=0)
    hidden: int = Field(ge=1)
    target: str
    trained_on: tuple[TrainingTexts, ...]
    seen: tuple[str, ...] = ()
    rank_correlation: dict[int, float] = Field(default_factory=dict)
    judged: tuple[Judged, ...] = ()
    made_by: str
    licences: str = ""

    def with_judged(self, rows: Iterable[Judged]) -> Self:
        """The card with some measurements more, instead of older ones of the same kind."""
        known = {_what(row): row for row in (*self.judged, *rows)}
        return self.model_copy(update={"judged": tuple(known[key] for key in sorted(known))})

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        for together in self.together:
            if together < 1 or self.heads % together:
                raise ValueError(f"heads: {self.heads} do not make groups of together: {together}")
        if list(self.together) != sorted(set(self.together), reverse=True):
            raise ValueError(f"together: {self.together} must fall")
        return self

    def group(self, heads: int) -> int | None:
        """How many heads the networks read together that a rank with ``heads`` uses: the most of
        which it has whole groups, or else the fewest of which it has a part of one; None if its
        heads fit neither."""
        whole = (together for together in self.together if heads % together == 0)
        parts = (together for together in reversed(self.together) if together % heads == 0)
        return next(whole, next(parts, None))

    @property
    def reach(self) -> int:
        """Tokens on each side on which a token's worth depends."""
        return self.neighbours + self.smoothing

    @property
    def tensor_parallel_sizes(self) -> tuple[int, ...]:
        """Sizes that can be used. Where a rank has one head, larger ones can be used too that
        repeat heads."""
        heads = self.heads
        sizes = (size for size in range(1, heads + 1) if heads % size == 0)
        return tuple(size for size in sizes if self.group(heads // size) is not None)

    def markdown(self) -> str:
        """The card as people read it."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"# Probe of {self.model}\n"
        yield (
            "Tells from cached keys and values which tokens will be needed. MemShare's policy "
            "`compaction` keeps tokens by it.\n"
        )
        yield f"- **Model**: {self.model}, {self.layers} layers, {self.heads} KV heads,"
        yield f"  {self.channels} channels. Other weights or shapes are refused."
        yield f"- **Target**: {self.target}."
        kinds = " or ".join(map(str, self.together))
        yield f"- **Network**: a perceptron per layer and {kinds} of its KV heads, with"
        yield f"  {self.hidden} hidden units; reads a token's K and V, and their average over"
        yield f"  {2 * self.neighbours + 1} tokens."
        if self.smoothing:
            yield f"  What it tells is averaged over {2 * self.smoothing + 1} tokens."
        sizes = ", ".join(map(str, self.tensor_parallel_sizes))
        yield f"- **Tensor-parallel sizes**: {sizes}."
        for texts in self.trained_on:
            yield f"- **Trained on**: {texts.kind}: {texts.texts} texts, {texts.tokens} tokens."
        for together, correlation in self.rank_correlation.items():
            yield f"- **Rank correlation** with it, unseen texts, heads together: {together}:"
            yield f"  {correlation:.2f}"
        yield f"- **Made by**: {self.made_by}"
        if self.licences:
            yield f"- **Licences**: {self.licences}"
        if self.judged:
            yield "\nDamage on texts that the probe has not seen (mean over texts):\n"
            yield (
                "| texts | prefix | dropped | at once? | recent window | tensor-parallel size | "
                "KL | same top token | texts unchanged |"
            )
            yield f"|{' --- |' * 9}"
        for row in self.judged:
            yield (
                f"| {row.texts} {row.kind} | {row.prefix} | {row.freed:.0%} | {row.how_often} | "
                f"{row.recent} | {row.tensor_parallel_size} | {row.kl:.4f} | {row.same_top:.3f} | "
                f"{row.unchanged} |"
            )
        yield ""


def _what(row: Judged) -> tuple[str, float, int, int, int]:
    """Tells measurements apart: of two with the same, the later one holds."""
    return row.kind, row.freed, row.every, row.recent, row.tensor_parallel_size
