"""``docs/reference/grpc.md``: methods, messages and fields, from ``memshare/proto/memshare.proto``.

The compiler gives descriptors and, by source positions, the comments that belong to them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from memshare.lab.markdown import table

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "memshare" / "proto" / "memshare.proto"

INTRODUCTION = """\
# gRPC messages

Package `{package}`. How to call it, keys, statuses and limits: [gRPC](../grpc.md). An `optional`
field that is not set takes the server's default; any other is empty, zero or false.
"""

# Numbers of fields in descriptor.proto, of which a path to a comment is made.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _NESTED, _METHODS, _VALUES = 2, 3, 2, 2


def render() -> str:
    """The whole page."""
    file = _compile()
    comments = {
        tuple(location.path): " ".join(
            (location.leading_comments + " " + location.trailing_comments).split()
        )
        for location in file.source_code_info.location
    }
    parts = [INTRODUCTION.format(package=file.package)]
    for i, service in enumerate(file.service):
        parts.append(f"## Service {service.name}\n")
        rows = []
        for j, method in enumerate(service.method):
            stream = "stream of " if method.server_streaming else ""
            rows.append([
                f"`{method.name}`", _link(method.input_type),
                stream + _link(method.output_type),
                _cell(comments.get((_SERVICES, i, _METHODS, j), "")),
            ])  # fmt: skip
        parts.append(table(["method", "takes", "returns", "what"], rows) + "\n")
    parts.append("## Messages\n")
    for i, message in enumerate(file.message_type):
        parts += _message(message, message.name, (_MESSAGES, i), comments)
    parts.append("## Enumerations\n")
    for i, enum in enumerate(file.enum_type):
        parts += _enum(enum, (_ENUMS, i), comments)
    return "\n".join(parts).rstrip() + "\n"


def _compile() -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        subprocess.run(
            [
                *[sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCE.parent}"],
                *["--include_source_info", f"--descriptor_set_out={out}", SOURCE.name],
            ],
            cwd=SOURCE.parent,
            check=True,
        )
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _message(
    message: DescriptorProto,
    name: str,
    path: tuple[int, ...],
    comments: dict[tuple[int, ...], str],
) -> Iterator[str]:
    yield f"### {name}\n"
    if comments.get(path):
        yield comments[path] + "\n"
    maps = {f".{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
    rows = []
    for j, field in enumerate(message.field):
        group = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            group = f"one of `{message.oneof_decl[field.oneof_index].name}`. "
        rows.append([
            f"`{field.name}`", _type(field, maps), str(field.number),
            group + _cell(comments.get((*path, _FIELDS, j), "")),
        ])  # fmt: skip
    yield (table(["field", "type", "number", "meaning"], rows) if rows else "No fields.") + "\n"
    for j, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, f"{name}.{nested.name}", (*path, _NESTED, j), comments)


def _enum(
    enum: EnumDescriptorProto, path: tuple[int, ...], comments: dict[tuple[int, ...], str]
) -> Iterator[str]:
    yield f"### {enum.name}\n"
    if comments.get(path):
        yield comments[path] + "\n"
    rows = (
        [f"`{value.name}`", str(value.number), _cell(comments.get((*path, _VALUES, j), ""))]
        for j, value in enumerate(enum.value)
    )
    yield table(["value", "number", "meaning"], rows) + "\n"


def _type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    entry = next((maps[end] for end in maps if field.type_name.endswith(end)), None)
    if entry is not None:
        key, value = entry.field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    kind = (
        _link(field.type_name)
        if field.type_name
        else FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    )
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def _link(type_name: str) -> str:
    """``.memshare.v1.Usage`` as a link to its heading; Google's own types by name."""
    name = type_name.removeprefix(".memshare.v1.")
    if name.startswith("."):
        return f"`{name[1:]}`"
    return f"[{name}](#{name.lower().replace('.', '')})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
