"""A configuration that cannot be used, explained: field, value and fix."""

from __future__ import annotations

import difflib
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from memshare.config import registry
from memshare.config.fields import PolicyParams


class ConfigError(ValueError):
    """A configuration that cannot be used. The text names each field, its value and the fix."""


def explain(error: ValidationError, model: type[BaseModel], sources: list[str]) -> str:
    """Turn a pydantic error into lines of field, value and fix."""
    lines = [f"MemShare configuration is not valid ({', '.join(sources) or 'defaults'}):"]
    for item in error.errors():
        path, owner, field = _locate(model, item["loc"])
        value = item["input"]
        if item["type"].startswith("union_tag_"):  # the field that tells the variants apart
            path.append("name")
            value = value.get("name")
        name = ".".join(path)
        if item["type"] == "extra_forbidden":
            known = list(owner.model_fields)
            close = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known fields: {', '.join(known)}"
            # Not its value: what is no field may be a secret.
            lines.append(f"  {name}: there is no such field\n    fix: {hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if not path:  # a rule about several fields, which names them
                lines.append(f"  {message}")
                continue
            lines.append(f"  {name} = {value!r}: {message}\n    fix: {_fix(field)}")
    return "\n".join(lines)


def _fix(field: FieldInfo | None) -> str:
    if field is None:
        return "give the values that the message asks for"
    text = " ".join((field.description or "").split())
    if field.is_required():
        return f"set it; {text}" if text else f"set it to {get_args(field.annotation)}"
    default = field.get_default(call_default_factory=True)
    shown = "" if isinstance(default, BaseModel) else f" (default: {default!r})"
    return f"{text}{shown}"


def _locate(
    model: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[str], type[BaseModel], FieldInfo | None]:
    """Follow an error's location; returns (field names, model that owns the last, its field).

    pydantic puts the tag of a discriminated union and the name of a union member among the
    location; a user never wrote those, so they are left out.
    """
    path: list[str] = []
    owner, field = model, None
    for part in loc:
        if field is not None:
            members = _models_of(field)
            if members == [PolicyParams] and part in registry.names():
                owner, field = registry.params_type(str(part)), None
                continue
            if not members:
                if isinstance(part, int):
                    path[-1] += f"[{part}]"
                elif get_origin(field.annotation) is dict and part != "[key]":
                    path.append(part)
                continue
            owner = members[0]
        path.append(str(part))
        field = owner.model_fields.get(str(part))
    return path, owner, field


def _models_of(field: FieldInfo) -> list[type[BaseModel]]:
    options = get_args(field.annotation) or (field.annotation,)
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
