"""Write ``docs/configuration.md`` from the configuration models.

    python -m tools.docs.configuration

The models are the truth: names, types, limits, defaults and descriptions all come from them. Needs
neither torch, vLLM nor Ray. A test fails while the page differs from what this script would write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import ClusterArgs
from cluster.tenancy.keys import Tenant
from memshare.config import MemShareConfig, PolicyParams, registry
from memshare.request_options import RequestOptions

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"

_WORDS = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Path: "path",
}

INTRODUCTION = """\
<!-- Written by tools/docs/configuration.py from the models. Change those, then run it again. -->

# Configuration

- [MemShare](#memshare): what the library does, with or without Ray.
- [Ray Serve application](#ray-serve-application): `args` in a Ray Serve config file.
- [Key table](#key-table): who may use the application, and how much.
- [Per request](#per-request): what one request may ask for.

Every field has a default, except `model` of the application. Unknown fields and wrong values are
refused before the engine loads, with the field, its value and the fix. The configuration that
results is logged at start.

## Where values come from

Four places. A later one wins, field by field:

1. the defaults below;
2. the YAML file that `MEMSHARE_CONFIG` names, or `config` among the explicit options;
3. environment variables `MEMSHARE_*`: upper case, `__` steps into a section, the value is read as
   YAML;
4. explicit options: `kv_connector_extra_config` of vLLM, or `memshare` in the arguments of the Ray
   Serve application.

An explicit `config` is used instead of `MEMSHARE_CONFIG`, not on top of it. Naming another policy
replaces the whole section `policy`; its parameters are not carried over.

A YAML file:

```yaml
mode: share
trigger:
  kind: pressure
  low_watermark: 0.05
policy:
  name: paper
  survivor: newest
protect:
  recent_tokens: 256
```

The same by environment variables:

```sh
MEMSHARE_MODE=share
MEMSHARE_TRIGGER__KIND=pressure
MEMSHARE_TRIGGER__LOW_WATERMARK=0.05
MEMSHARE_POLICY__NAME=paper
MEMSHARE_POLICY__SURVIVOR=newest
MEMSHARE_PROTECT__RECENT_TOKENS=256
```

The same on plain vLLM, as the value of `--kv-transfer-config`:

```json
{
  "kv_connector": "MemShareConnector",
  "kv_connector_module_path": "memshare.engine.connector",
  "kv_role": "kv_producer",
  "kv_connector_extra_config": {
    "mode": "share",
    "trigger": {"kind": "pressure", "low_watermark": 0.05},
    "policy": {"name": "paper", "survivor": "newest"},
    "protect": {"recent_tokens": 256}
  }
}
```

`configs/` holds complete files: `cluster.yaml`, `autoscale.yaml`, `agents.yaml`, `demo.yaml`,
`single-gpu.yaml`, `gpu.yaml` and `multi-node.yaml` for Ray Serve, `observe.yaml` and `paper.yaml`
for `MEMSHARE_CONFIG`.
"""

KEY_TABLE = """\
The file that `auth.file` names, the variable that `auth.variable` names, or both; each tenant
stands in one of them, and keys as hashes. `memshare keys new --tenant acme` prints a key and its
entry, `memshare keys check FILE` reads a table as the cluster does. See [security](security.md).

```yaml
tenants:
  acme:
    keys:
      ci: "sha256:8b0f2a6fbbf0a52a9f8a8a3e51c2b41a2b25b8a0d6bb3a7f0d0c5a9e4f3d2c1b"
    concurrent_requests: 16
    tokens_per_minute: 200000
    models: [qwq-32b]
    permissions:
      may_set_thresholds: false
  platform:
    keys:
      prometheus: "sha256:1f3c9a77d1b0e6f5a4c3b2918070605f4e3d2c1b0a99887766554433221100ff"
    operator: true
```

Fields of a tenant:
"""

PER_REQUEST = """\
Keys of `vllm_xargs` in the body of an OpenAI request. Other keys are left alone. They only restrict
or tune: `memshare: on` does not switch on a server in mode `observe` or `off`. On the Ray Serve
application a wrong key or value is answered with HTTP 400. Plain vLLM serves such a request exactly
and counts it (`opted_out`, reason `invalid_options`).
"""


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## MemShare\n"]
    parts += _sections(MemShareConfig)
    parts.append("## Ray Serve application\n")
    parts += _sections(ClusterArgs)
    parts += ["## Key table\n", KEY_TABLE, *_sections(Tenant)]
    parts += ["## Per request\n", PER_REQUEST, _table("", RequestOptions)]
    return "\n".join(parts).rstrip() + "\n"


def _sections(model: type[BaseModel]) -> Iterator[str]:
    """The table of the top level, then one part for each section below it."""
    yield _table("", model)
    yield from _below("", model)


def _below(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        for section in _models(field):
            if section is not MemShareConfig:  # has a part of its own, also in ClusterArgs
                yield f"### {_heading(name, section)}\n\n{_text(section.__doc__ or '')}\n"
                yield _table(f"{prefix}{name}.", section)
                yield from _below(f"{prefix}{name}.", section)


def _table(prefix: str, model: type[BaseModel]) -> str:
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        links = [f"[{label}](#{anchor(heading)})" for label, heading in _targets(name, field)]
        kind = " or ".join(links) or _kind(field.annotation, field.metadata)
        text = _text(field.description or "Which policy it is.")
        cells = [f"`{prefix}{name}`", kind, _default(field), text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _models(field: FieldInfo) -> list[type[BaseModel]]:
    """The section that a field holds, or the variants of it; [] for a plain value."""
    if field.annotation is PolicyParams:
        return list(registry.built_in_params())
    options = get_args(field.annotation) or (field.annotation,)
    return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]


def _tag(section: type[BaseModel]) -> str | None:
    """The ``name`` by which a variant of a section is chosen."""
    field = section.model_fields.get("name")
    return str(get_args(field.annotation)[0]) if field is not None else None


def _heading(name: str, section: type[BaseModel]) -> str:
    tag = _tag(section)
    return f"`{name}`" if tag is None else f"`{name}` with name `{tag}`"


def _targets(name: str, field: FieldInfo) -> Iterator[tuple[str, str]]:
    """(label, heading) of the parts where a section is described."""
    for section in _models(field):
        if section is MemShareConfig:
            yield "section", "MemShare"
        else:
            yield _tag(section) or "section", _heading(name, section)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        tag = _tag(type(value))
        return "see there" if tag is None else f"`{tag}`"
    if value in ({}, ()):
        return "empty"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _kind(annotation: Any, metadata: Sequence[object] = ()) -> str:
    """A field's type and limits, in words."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(members[0], [*members[1:], *metadata])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in members)
    if origin in (Union, UnionType):
        return " or ".join(_kind(member, metadata) for member in members)
    if origin is tuple:
        return f"list of {_kind(members[0])}"
    if origin is dict:
        return f"map of {_kind(members[0])} to {_kind(members[1])}"
    if annotation is NoneType:
        return "null"
    return _WORDS[annotation] + _limits(metadata)


def _limits(metadata: Sequence[object]) -> str:
    limits: dict[str, float] = {}
    for item in metadata:
        for limit in item.metadata if isinstance(item, FieldInfo) else [item]:
            limits |= {n: getattr(limit, n) for n in ("ge", "gt", "le") if hasattr(limit, n)}
    if "gt" in limits:
        upper = f", up to {limits['le']:.15g}" if "le" in limits else ""
        return f" above {limits['gt']:.15g}{upper}"
    if "ge" in limits:
        low = limits["ge"]
        return f" {low:.15g} to {limits['le']:.15g}" if "le" in limits else f" from {low:.15g}"
    return ""


def _text(description: str) -> str:
    """A docstring as Markdown on one line."""
    return " ".join(description.replace("``", "`").split())


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = [c for c in heading.strip().lower() if c.isalnum() or c in " -_"]
    return "".join(kept).replace(" ", "-")


def slugify(heading: str, _separator: str) -> str:
    """:func:`anchor`, for mkdocs, so that links hold on the site and on GitHub."""
    return anchor(heading)


def main() -> int:
    """Write the page; return the exit status."""
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
