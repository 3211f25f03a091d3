"""``docs/reference/http.md``: routes and bodies, from the OpenAPI schema of the server's app.

The app is vLLM's own, put together as a replica does for a model that generates, without an engine.
Imports vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from memshare.lab.markdown import table

INTRODUCTION = """\
# HTTP

The app is the OpenAI server of vLLM {version}, behind [keys](../security.md#the-key-table). A
running server has the whole schema at `/openapi.json` and shows it at `/docs` (with keys: to
operators).

MemShare adds to the body of an inference request the keys of `vllm_xargs` that are listed in
[per request](../configuration.md#per-request), and to a whole reply
`kv_transfer_params.memshare`, if asked ([usage](../grpc.md#usage)). It refuses `cache_salt`: the
salt follows from the key.

Headers: `Authorization: Bearer KEY` or `x-api-key: KEY`; `x-session-id` keeps a conversation on one
replica ([routing](../scaling.md#routing)); `traceparent` continues a trace.

| status | when |
| --- | --- |
| 400 | the body is wrong; the message names the field |
| 401, 403 | no key or an unknown one; a key that is not for this |
| 404 | no such model or route |
| 408 | the body did not arrive within `replica.body_timeout_s` |
| 413 | the body is larger than `replica.max_body_bytes` |
| 429 | a limit of the tenant, or more requests than may wait; `Retry-After` says when |
| 500 | a fault of ours, or the replica was killed: try again |
| 503 | no engine is left ([faults](../faults.md#for-clients)); `Retry-After` says when |
"""

_CALLERS = {
    "open": "everybody",
    "free": "every key",
    "inference": "every key, within its limits",
    "operator": "operators",
}


def schema() -> tuple[str, dict[str, Any]]:
    """vLLM's version, and the OpenAPI schema of a replica's app."""
    from vllm.entrypoints.launchers.app import build_app

    from cluster.engine.options import parse_words
    from memshare.engine.versions import installed_vllm

    app = build_app(parse_words(["--model", "MODEL"]), ("generate",))
    return installed_vllm().partition("+")[0], app.openapi()


def render() -> str:
    """The whole page."""
    version, api = schema()
    parts = [INTRODUCTION.format(version=version), "## Routes\n"]
    rows = []
    bodies: dict[str, list[str]] = {}
    for path, methods in sorted(api["paths"].items()):
        for method, operation in methods.items():
            used = _bodies(operation) if caller(path) == "inference" else []
            for body in used:
                bodies.setdefault(body, []).append(f"`{method.upper()} {path}`")
            links = " or ".join(f"[{body}](#{body.lower()})" for body in used)
            rows.append([f"`{method.upper()}`", f"`{path}`", _CALLERS[caller(path)], links])
    parts.append(table(["method", "path", "with keys, who", "body"], rows) + "\n")
    parts.append(
        "The [live page](../page.md) adds `/memshare/`, and for operators `/memshare/api/state`, "
        "`/memshare/api/trace` and `/memshare/api/config`.\n"
    )
    parts.append("## Bodies of inference routes\n")
    for name, routes in bodies.items():
        parts.append(f"### {name}\n\nOf {', '.join(routes)}.\n")
        parts.append(_fields(api, name) + "\n")
    return "\n".join(parts).rstrip() + "\n"


def caller(path: str) -> str:
    """Which callers may use a route: by the lists that guard it."""
    from cluster.http.asgi import FREE_PATHS, INFERENCE_PATHS, OPEN_PATHS

    if path in OPEN_PATHS:
        return "open"
    if path in FREE_PATHS:
        return "free"
    return "inference" if path in INFERENCE_PATHS else "operator"


def _bodies(operation: dict[str, Any]) -> list[str]:
    """Names of the models of which an operation takes one."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = content.get("schema", {})
    return [name for v in schema.get("anyOf", [schema]) if (name := _reference(v))]


def _reference(value: dict[str, Any]) -> str:
    return str(value.get("$ref", "")).rpartition("/")[2]


def _fields(api: dict[str, Any], name: str) -> str:
    model = api["components"]["schemas"][name]
    required = set(model.get("required", ()))
    rows = (
        [
            f"`{field}`",
            " or ".join(dict.fromkeys(_kinds(value))),
            "required" if field in required else _default(value),
            _one_line(value.get("description", "")),
        ]
        for field, value in model.get("properties", {}).items()
    )
    return table(["field", "type", "default", "meaning"], rows)


def _kinds(value: dict[str, Any]) -> Iterator[str]:
    for option in value.get("anyOf", value.get("oneOf", [value])):
        if "anyOf" in option or "oneOf" in option:
            yield from _kinds(option)
        elif "$ref" in option:
            yield f"`{_reference(option)}`"
        elif option.get("type") == "array":
            yield "list of " + " or ".join(dict.fromkeys(_kinds(option.get("items", {}))))
        elif "enum" in option or "const" in option:
            values = option.get("enum", [option.get("const")])
            yield " or ".join(f"`{v}`" for v in values)
        else:
            yield str(option.get("type", "anything"))


def _default(value: dict[str, Any]) -> str:
    if value.get("default") is None:
        return ""
    return f"`{value['default']}`".replace("|", "\\|")


def _one_line(text: str) -> str:
    """A description in one cell: its first paragraph, and no markup of others."""
    first = text.partition("\n\n")[0]
    return re.sub(r"([<|])", r"\\\1", " ".join(first.split()))
