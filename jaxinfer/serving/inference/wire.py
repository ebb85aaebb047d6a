"""Requests and answers as protobuf writes them, with the raw bytes of tensors left where they lie: protobuf itself
would copy them out of a request, and once more into an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from jaxinfer.errors import InvalidRequest
from jaxinfer.serving.inference.schema import CLASSES

RAW_INPUTS = CLASSES["ModelInferRequest"].DESCRIPTOR.fields_by_name["raw_input_contents"].number
RAW_OUTPUTS = CLASSES["ModelInferResponse"].DESCRIPTOR.fields_by_name["raw_output_contents"].number
STREAMED = CLASSES["ModelStreamInferResponse"].DESCRIPTOR.fields_by_name["infer_response"].number
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; the others (groups) are long gone
FIXED = {FIXED64: 8, FIXED32: 4}


def read_request(data: bytes) -> tuple[Any, list[memoryview]]:
    """A ModelInferRequest without its raw contents, and these. Raises InvalidRequest."""
    view, rest, raw, at = memoryview(data), [], [], 0
    while at < len(view):
        start = at
        tag, at = _varint(view, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            _, at = _varint(view, at)
        elif kind in FIXED:
            at += FIXED[kind]
        elif kind == BYTES:
            size, at = _varint(view, at)
            at += size
            if number == RAW_INPUTS and at <= len(view):
                raw.append(view[at - size: at])
                continue
        else:
            raise InvalidRequest(f"the request is no ModelInferRequest: field {number} has the wire type {kind}")
        rest.append(view[start:at])  # if it ends early, protobuf says so
    try:
        return CLASSES["ModelInferRequest"].FromString(b"".join(rest)), raw
    except DecodeError as error:
        raise InvalidRequest(f"the request is no ModelInferRequest: {error}") from error


def write_answer(answer: Any, raw: Sequence[Sequence[memoryview]]) -> bytes:
    """A ModelInferResponse with raw contents, each of which is in pieces. The only copy is the one made here."""
    parts: list[Any] = [answer.SerializeToString()]
    for pieces in raw:
        parts += [_varint_of(RAW_OUTPUTS << 3 | BYTES), _varint_of(sum(map(len, pieces))), *pieces]
    return b"".join(parts)


def write_streamed(answer: bytes) -> bytes:
    """A ModelStreamInferResponse that is this ModelInferResponse."""
    return b"".join((_varint_of(STREAMED << 3 | BYTES), _varint_of(len(answer)), answer))


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends: seven bits a byte, the lowest first."""
    value = 0
    for i, byte in enumerate(view[at: at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise InvalidRequest("the request is no ModelInferRequest: a number in it does not end")


def _varint_of(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))
