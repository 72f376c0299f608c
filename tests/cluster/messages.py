"""Messages nobody would send: hypothesis strategies made from protobuf descriptors, and bytes that are no message.

`anything` fills any fields with any values, edges first. `nearly` takes a good message and spoils a field or two, so
that most of its checks are passed. `wire` spoils the bytes: oneofs given twice, fields nobody knows, text that is no
UTF-8, cuts. Knows no service: a new field is covered from the day it is in the proto.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf import struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

M = TypeVar("M", bound=Message)

DEEPEST = 3  # messages in messages; Structs go deeper
PLACEHOLDER = "\x01\x02\x03"  # of texts that become the three bytes of half a surrogate pair
SURROGATE = b"\xed\xa0\x80"
UNKNOWN_FIELDS = (b"\xf8\x7f\x01", b"\xfa\x7f\x02hi", b"\xfb\x7f\xfc\x7f")  # a number, bytes, a group
TEXTS = (
    *("", " ", "x", "user", "tiny", "\0", "\n", "a" * 129, "batchJobs/", "job.a.0", "../../etc/passwd", "%s{}'\";--"),
    *("\N{GRINNING FACE}" * 3, "\N{GRINNING FACE}" * 2000, "\u2028", "\ufeff", "\u202e", "e\u0301", "\ufffd"),
    *("\U0010ffff", "\\ud800", PLACEHOLDER, "[" * 3000, "k" * 30_000, "9" * 5000),
    *('{"a": 1}', '{"$ref": "#"}', '{"pattern": "(a+)+$"}', "(a+)+$", "(?=a)", "a{1000000}", "start: start", "%json {"),
)
IDS = (0, 1, 2, 5, 319, 320, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS = (0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 2.0, 100.0, 5e-324, 1e-30, 1e30, 1.7e308, math.nan, math.inf, -math.inf)
BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),  # open: any number may come
}


def texts() -> st.SearchStrategy[str]:
    return st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    """The ends of the range, ids about the end of the vocabulary, small numbers, and any."""
    edges = [edge for edge in (low, low + 1, -1, *IDS, high) if low <= edge <= high]
    return st.sampled_from(edges) | st.integers(max(low, -9), min(high, 40)) | st.integers(low, high)


def numbers() -> st.SearchStrategy[float]:
    return st.sampled_from(NUMBERS) | st.floats(0, 2) | st.floats()


@st.composite
def structs(draw: st.DrawFn) -> struct_pb2.Struct:
    """JSON objects, some of them deep, some with numbers that JSON has not, or with values of no kind at all."""
    struct = struct_pb2.Struct()
    for name in draw(st.lists(texts() | st.sampled_from(("documents", "tools", "add_generation_prompt")), max_size=3)):
        value = struct.fields[name]
        for _ in range(draw(st.sampled_from((0, 0, 0, 1, 28)))):
            value = value.struct_value.fields["a"] if draw(st.booleans()) else value.list_value.values.add()
        match draw(st.integers(0, 4)):
            case 0:
                value.number_value = draw(numbers())
            case 1:
                value.string_value = draw(texts())
            case 2:
                value.bool_value = draw(st.booleans())
            case 3:
                value.null_value = struct_pb2.NULL_VALUE
    return struct


def value_of(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    """One value of a field, or of one element of it."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=40) | texts().map(str.encode)
        case FieldDescriptor.CPPTYPE_STRING:
            return texts()
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return numbers()
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return anything(field.message_type, depth + 1)
        case kind:
            return integers(*BITS[kind])


@functools.cache
def anything(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Any]:
    """A message with some of its fields set, to anything that their types allow."""
    if descriptor.full_name == "google.protobuf.Struct":
        return structs()

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        message = GetMessageClass(descriptor)()
        few = st.lists(st.sampled_from(tuple(descriptor.fields)), max_size=4) if descriptor.fields else st.just([])
        for field in draw(few):
            set_field(draw, message, field, depth)
        return message

    return build() if depth < DEEPEST else st.just(GetMessageClass(descriptor)())


def repeated(field: FieldDescriptor) -> bool:
    label: int = field.label  # type: ignore[attr-defined]  # which the types leave out
    return label == FieldDescriptor.LABEL_REPEATED


def set_field(draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int) -> None:
    """Anew, whatever stood there; a member of a oneof displaces the others."""
    message.ClearField(field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        for each in draw(st.lists(value_of(key, depth), max_size=3)):
            getattr(message, field.name)[each] = draw(value_of(value, depth))
    elif repeated(field):
        many = st.lists(value_of(field, depth), max_size=3)
        if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
            many |= st.builds(_repeat, value_of(field, depth), st.sampled_from((70, 300, 3000)))
        getattr(message, field.name).extend(draw(many))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        getattr(message, field.name).CopyFrom(draw(value_of(field, depth)))
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, draw(value_of(field, depth)))


def _repeat(value: Any, count: int) -> list[Any]:
    """Not over the size of message that gRPC takes: what is would never be read."""
    return [value] * (count if not isinstance(value, str | bytes) or len(value) < 100 else 3)


@st.composite
def nearly(draw: st.DrawFn, good: st.SearchStrategy[M]) -> M:
    """A good message of which at most two fields are spoilt."""
    message = draw(good)
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2)))):
        part: Message = message
        depth = 0
        while part.DESCRIPTOR.fields:
            field: Any = draw(st.sampled_from(list[Any](part.DESCRIPTOR.fields)))
            inside = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE and not repeated(field)
            if not inside or not part.HasField(field.name) or draw(st.integers(0, 3)) == 0:
                set_field(draw, part, field, depth)
                break
            part, depth = getattr(part, field.name), depth + 1
    return message


@st.composite
def wire(draw: st.DrawFn, messages: st.SearchStrategy[Message]) -> bytes:
    """A message's bytes, one time in three spoilt."""
    content = draw(messages).SerializeToString()
    place = draw(st.integers(0, len(content)))
    spoilers: Mapping[str, Callable[[], bytes]] = {
        "two in one": lambda: content + draw(messages).SerializeToString(),  # both of a oneof: the later one counts
        "no UTF-8": lambda: content.replace(PLACEHOLDER.encode(), SURROGATE),
        "unknown fields": lambda: content + draw(st.sampled_from(UNKNOWN_FIELDS)),
        "cut": lambda: content[:place],
        "changed": lambda: content[:place] + draw(st.binary(min_size=1, max_size=3)) + content[place + 1 :],
        "noise": lambda: draw(st.binary(max_size=60)),
    }
    kind = draw(st.sampled_from(("", *[""] * 2 * len(spoilers), *spoilers)))
    return spoilers[kind]() if kind else content
