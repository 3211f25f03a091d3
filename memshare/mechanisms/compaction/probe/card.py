"""What a probe is for, what it was trained on, and how good it is on texts that it has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from memshare.config.fields import Fraction

FORMAT = 1
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
        kl: KL divergence of the next-token distributions from the exact ones, nats per token.
        same_top: fraction of tokens whose most likely next token stays the same.
        unchanged: texts in which it stays so at every token.
    """

    kind: str
    texts: int
    prefix: int
    freed: Fraction
    every: int = 0
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
        together: KV heads that a network reads together: a rank must have whole groups of them.
        turn: angle by which each rotated pair of key channels turns from one position to the next,
            in radians.
        neighbours: tokens on each side that the probe averages over.
        hidden: units of the network.
        target: what it was trained to tell.
        trained_on: texts.
        seen: digests of these, so that nobody judges it by them.
        rank_correlation: Spearman's, of what it tells and what it was to tell, mean over layers,
            heads and texts, on texts that it has not seen.
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
    together: int = Field(ge=1)
    turn: tuple[float, ...]
    neighbours: int = Field(ge=0)
    hidden: int = Field(ge=1)
    target: str
    trained_on: tuple[TrainingTexts, ...]
    seen: tuple[str, ...] = ()
    rank_correlation: float | None = None
    judged: tuple[Judged, ...] = ()
    made_by: str
    licences: str = ""

    def with_judged(self, rows: Iterable[Judged]) -> Self:
        """The card with some measurements more, instead of older ones of the same kind."""
        known = {(row.kind, row.freed, row.every): row for row in self.judged}
        known |= {(row.kind, row.freed, row.every): row for row in rows}
        return self.model_copy(update={"judged": tuple(known[key] for key in sorted(known))})

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.heads % self.together:
            raise ValueError(f"heads: {self.heads} do not make groups of together: {self.together}")
        return self

    @property
    def tensor_parallel_sizes(self) -> tuple[int, ...]:
        """Sizes whose ranks have whole groups of heads each. Where a group is one head, larger
        sizes can be used too that repeat heads."""
        groups = self.heads // self.together
        return tuple(size for size in range(1, groups + 1) if groups % size == 0)

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
        yield f"- **Network**: a perceptron per layer and {self.together} of its KV heads, with"
        yield f"  {self.hidden} hidden units; reads a token's K and V, and their average over"
        yield f"  {2 * self.neighbours + 1} tokens."
        sizes = ", ".join(map(str, self.tensor_parallel_sizes))
        yield f"- **Tensor-parallel sizes**: {sizes}."
        for texts in self.trained_on:
            yield f"- **Trained on**: {texts.kind}: {texts.texts} texts, {texts.tokens} tokens."
        if self.rank_correlation is not None:
            yield f"- **Rank correlation** with it, unseen texts: {self.rank_correlation:.2f}"
        yield f"- **Made by**: {self.made_by}"
        if self.licences:
            yield f"- **Licences**: {self.licences}"
        if self.judged:
            yield "\nDamage on texts that the probe has not seen (mean over texts):\n"
            yield "| texts | prefix | dropped | at once? | KL | same top token | texts unchanged |"
            yield "| --- | --- | --- | --- | --- | --- | --- |"
        for row in self.judged:
            yield (
                f"| {row.texts} {row.kind} | {row.prefix} | {row.freed:.0%} | {row.how_often} | "
                f"{row.kl:.4f} | {row.same_top:.3f} | {row.unchanged} |"
            )
        yield ""
