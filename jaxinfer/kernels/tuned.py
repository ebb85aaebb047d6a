"""Block sizes of our kernels as they were measured on each kind of device: data, in `tuned.json`.

A kernel's name there ends in its version, since what was measured for one says nothing of the next. Where nothing was
measured the kernel's own default is taken. `bench/tune.py` measures, and writes the file.

>>> from typing import NamedTuple
>>> class Blocks(NamedTuple):
...     rows: int
>>> tuned("nothing/1", Blocks(64))
Blocks(rows=64)
>>> with trying({"nothing/1": (32,)}):
...     tuned("nothing/1", Blocks(64))
Blocks(rows=32)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from jaxinfer.kernels.op import device_kind

FILE = Path(__file__).with_name("tuned.json")  # kernel/version -> kind of device -> numbers
TABLE: Mapping[str, Mapping[str, list[int]]] = json.loads(FILE.read_text())
Blocks = TypeVar("Blocks", bound=tuple)  # a NamedTuple of integers

_tried: ContextVar[Mapping[str, tuple[int, ...]] | None] = ContextVar("tried", default=None)


@contextmanager
def trying(blocks: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Trace kernels with these numbers inside the `with` block."""
    token = _tried.set(blocks)
    try:
        yield
    finally:
        _tried.reset(token)


def tuned(kernel: str, default: Blocks) -> Blocks:
    """The numbers for `kernel` on the kind of device that is traced for, in the shape of `default`."""
    found = (_tried.get() or {}).get(kernel) or TABLE.get(kernel, {}).get(device_kind())
    return type(default)._make(found) if found else default  # type: ignore[attr-defined]
