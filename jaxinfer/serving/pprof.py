"""Profiles in pprof's format, as `go tool pprof`, speedscope and pprof.me open it: a gzipped protocol buffer.

The message is google/pprof's proto/profile.proto, of which this writes the fields that stacks and their values need.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping

Frame = tuple[str, str, int]  # function, file, the line that runs
Stack = tuple[Frame, ...]  # the caller first


def encode(stacks: Mapping[Stack, tuple[int, ...]], types: Iterable[tuple[str, str]], *, began_ns: int,
           duration_ns: int, period_ns: int) -> bytes:
    """`stacks` with a value for each of `types`, (what, unit), the last of which is the one to show."""
    strings: dict[str, int] = {"": 0}
    functions: dict[tuple[str, str], int] = {}
    locations: dict[Frame, int] = {}
    text = lambda s: strings.setdefault(s, len(strings))
    body = bytearray()
    kinds = [_field(1, text(what)) + _field(2, text(unit)) for what, unit in types]
    for kind in kinds:
        body += _message(1, kind)
    for stack, values in stacks.items():
        ids = [locations.setdefault(frame, len(locations) + 1) for frame in reversed(stack)]  # the leaf first
        body += _message(2, _packed(1, ids) + _packed(2, values))
    for (name, file, line), id in locations.items():
        function = functions.setdefault((name, file), len(functions) + 1)
        body += _message(4, _field(1, id) + _message(4, _field(1, function) + _field(2, line)))
    for (name, file), id in functions.items():
        body += _message(5, _field(1, id) + _field(2, text(name)) + _field(3, text(name)) + _field(4, text(file)))
    for string in strings:
        body += _message(6, string.encode("utf-8", "replace"))
    body += _field(9, began_ns) + _field(10, duration_ns) + _message(11, kinds[-1]) + _field(12, period_ns)
    return gzip.compress(bytes(body))


def _varint(value: int) -> bytes:
    """
    >>> _varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _message(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _packed(number: int, values: Iterable[int]) -> bytes:
    return _message(number, b"".join(map(_varint, values)))
