"""The section ``selection``: which pages of the KV cache attention reads."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from memshare.config.fields import Real, Section, Whole


class SelectionConfig(Section):
    """Page selection: a request that generates reads the pages that may matter to its query, and no
    others. It reads less and frees nothing. Off unless ``budget`` or ``pages`` is set; on CPUs
    only. Prompts are read whole. Mode ``observe`` or ``share``, with any policy."""

    budget: Annotated[Real, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of a request's pages that each layer and KV head reads, rounded up. A page is a
    block of the cache."""
    pages: Annotated[Whole, Field(ge=1)] | None = None
    """The same as a number of pages, whatever the request's length. Instead of ``budget``."""
    first_pages: Whole = Field(default=1, ge=0)
    """Pages at the beginning of a request that are always read. They count within the budget."""
    recent_pages: Whole = Field(default=2, ge=1)
    """The newest pages, which are always read. They count within the budget."""
    exempt_layers: Whole = Field(default=2, ge=0)
    """First layers of the model that read everything."""

    @property
    def on(self) -> bool:
        """Whether anything is selected."""
        return self.budget is not None or self.pages is not None

    @model_validator(mode="after")
    def _one_budget(self) -> SelectionConfig:
        if self.budget is not None and self.pages is not None:
            raise ValueError(
                f"budget ({self.budget}) and pages ({self.pages}) are both set; leave one out"
            )
        always = self.first_pages + self.recent_pages
        if self.pages is not None and self.pages < always:
            raise ValueError(
                f"pages ({self.pages}) must not be below first_pages + recent_pages ({always}), "
                "which are always read; raise the one or lower the others"
            )
        return self
