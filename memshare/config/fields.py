"""What sections of the configuration are made of: their base, and kinds of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_switch(value: object) -> object:
    # pydantic would take true for 1, and YAML 1.1 reads a bare `yes` as true.
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false (in YAML also yes, no, on, off)")
    return value


Whole = Annotated[int, BeforeValidator(_no_switch)]
Real = Annotated[float, BeforeValidator(_no_switch)]
Fraction = Annotated[Real, Field(ge=0.0, le=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class PolicyParams(Section):
    """Base of a mechanism's parameters: the section ``policy``, when its ``name`` chooses it.

    A mechanism narrows ``name`` to the one literal by which users choose it.
    """

    name: str
