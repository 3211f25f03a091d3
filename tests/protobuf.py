"""Random protobuf messages, for hypothesis."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: st.text(st.characters(codec="utf-8"), max_size=12),
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 9),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 9),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats() | st.floats(0, 1),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 1),
}


def messages(descriptor: Descriptor, depth: int = 3) -> st.SearchStrategy[Message]:
    """Messages with a few fields set to anything that their types allow.

    Few, as a single wrong one is enough to have a request refused before others are looked at.
    """
    fields = {
        field.name: _values(field, depth)
        for field in descriptor.fields
        if depth > 0 or field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE
    }
    names = (
        st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)
        if fields
        else st.just([])
    )
    chosen = names.flatmap(
        lambda some: st.fixed_dictionaries({name: fields[name] for name in some})
    )
    return chosen.map(lambda values: _made(descriptor, values))


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        entry = field.message_type
        if entry.GetOptions().map_entry:
            key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
            return st.dictionaries(_values(key, depth), _values(value, depth - 1), max_size=3)
        one = messages(entry, depth - 1)
    else:
        one = _SCALARS[field.cpp_type]
    return st.lists(one, max_size=3) if field.is_repeated else one


def _made(descriptor: Descriptor, fields: dict[str, Any]) -> Message:
    message = GetMessageClass(descriptor)()
    for name, value in fields.items():
        field, target = descriptor.fields_by_name[name], getattr(message, name)
        is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        if isinstance(value, dict):
            for key, entry in value.items():
                if isinstance(entry, Message):
                    target[key].CopyFrom(entry)
                else:
                    target[key] = entry
        elif field.is_repeated:
            target.extend(value)
        elif is_message:
            target.CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


@st.composite
def requests(draw: st.DrawFn, descriptor: Descriptor) -> Any:
    """Messages that ask for tokens, most of which are not refused for what is missing, and for few
    tokens, as far as they may be right."""
    message: Any = draw(messages(descriptor))
    if draw(st.integers(0, 3)):
        message.model = ""
    if draw(st.integers(0, 3)):
        if "messages" in descriptor.fields_by_name:
            message.messages.add(role="user", content="Hello")
        elif message.WhichOneof("prompt") is None:
            message.text = "Hello"
    if message.sampling.max_tokens not in (-1, 1, 2, 3):
        message.sampling.max_tokens = 2
    return message


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a message as a broken or hostile client may send them."""
    if not data:
        return draw(st.binary(max_size=16))
    cut = draw(st.integers(0, len(data) - 1))
    return draw(
        st.sampled_from(
            [
                data[:cut],  # ends too early
                data + data[cut:],  # fields twice, or the middle of one
                data[:cut] + bytes([data[cut] ^ 1 << draw(st.integers(0, 7))]) + data[cut + 1 :],
                data[:cut] + draw(st.binary(min_size=1, max_size=8)) + data[cut:],
                data + draw(st.binary(min_size=1, max_size=8)),
            ]
        )
    )
