"""The configuration: where its values come from, and which win.

Values come from four places. A later one wins, field by field:

1. the defaults below,
2. the YAML file named by ``MEMSHARE_CONFIG`` (or by ``config`` among the explicit options),
3. environment variables ``MEMSHARE_*``; ``__`` steps into a section, the value is read as YAML
   (``MEMSHARE_MODE=observe``, ``MEMSHARE_TRIGGER__LOW_WATERMARK=0.1``),
4. explicit options: ``kv_connector_extra_config`` of vLLM, or the ``memshare`` argument of the
   Ray Serve application.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from memshare.config.errors import ConfigError, explain
from memshare.config.model import MemShareConfig

ENV_PREFIX = "MEMSHARE_"
ENV_FILE = "MEMSHARE_CONFIG"
ENV_KEY = "MEMSHARE_KEY"
"""A client's key, which is none of the fields: a shell may hold both."""


def load_config(
    explicit: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None
) -> MemShareConfig:
    """Merge all sources (module docstring) and validate the result.

    Args:
        explicit: nested options that win over everything else; may hold ``config``, a YAML path.
        environ: the environment; ``os.environ`` if None.

    Raises:
        ConfigError: a file cannot be read, or a field is unknown or wrong.
    """
    environ = os.environ if environ is None else environ
    explicit = dict(explicit or {})
    path = explicit.pop("config", None) or environ.get(ENV_FILE)
    layers: list[tuple[str, dict[str, Any]]] = []
    if path:
        layers.append((str(path), _read_yaml(str(path))))
    layers.append((f"{ENV_PREFIX}* variables", _from_environ(environ)))
    layers.append(("explicit options", explicit))
    merged: dict[str, Any] = {}
    for _, values in layers:
        merged = merge(merged, values)
    try:
        return MemShareConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, MemShareConfig, [n for n, v in layers if v])) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"MemShare configuration file {path!r} cannot be read: {error.strerror}\n"
            f"    fix: correct the path in {ENV_FILE} or in the option 'config'"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"MemShare configuration file {path!r} is not YAML: {error}\n"
            "    fix: correct the line that the message names"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"MemShare configuration file {path!r} holds a {type(values).__name__}\n"
            "    fix: write fields at its top level, for example 'mode: observe'"
        )
    return values


def without_fields(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would configure MemShare: for comparisons, which say themselves
    how each side is configured."""
    return {key: value for key, value in environ.items() if not key.startswith(ENV_PREFIX)}


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    # A section's name first: merged later, it would replace what came before it.
    for key in sorted(environ, key=lambda key: (not key.endswith("__NAME"), key)):
        if not key.startswith(ENV_PREFIX) or key in (ENV_FILE, ENV_KEY):
            continue
        *sections, name = key.removeprefix(ENV_PREFIX).lower().split("__")
        try:
            value = yaml.safe_load(environ[key])
        except yaml.YAMLError:
            value = environ[key]
        nested: dict[str, Any] = {name: value}
        for section in reversed(sections):
            nested = {section: nested}
        values = merge(values, nested)
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; a section that names another policy replaces the whole policy section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        replaces = (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and "name" in value
            and value["name"] != old.get("name")
        )
        if isinstance(value, Mapping) and key in base and not isinstance(old, Mapping):
            continue  # a section was given as something else: keep that, so that it is refused
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not replaces:
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged
