"""Shared memory that clients of the same machine have registered: tensors are read and written where they lie."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxinfer.errors import InvalidOption, InvalidRequest, ModelNotFound
from jaxinfer.serving.inference.datatypes import short

HOME = Path("/dev/shm")  # where Linux has POSIX shared memory as files
MOST_REGIONS = 1024
PARAMETERS = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")


@dataclass(frozen=True)
class Region:
    """A piece of the shared memory `key`: `byte_size` bytes from `offset` on."""

    name: str
    key: str
    offset: int
    byte_size: int
    file: int = field(repr=False)
    memory: mmap.mmap = field(repr=False)

    def __del__(self):
        os.close(self.file)


class Regions:
    """The regions by name. Whoever may ask may register any shared memory that this process may read and write, and
    whoever shortens memory that is in use stops this process (SIGBUS): for clients that are trusted.

    Raises InvalidRequest (ModelNotFound for a region that is not registered).
    """

    def __init__(self):
        if not HOME.is_dir():
            raise InvalidOption(f"shared_memory needs {HOME}, which this system does not have")
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: Any, offset: Any, byte_size: Any) -> None:
        if not name or not isinstance(key, str) or not _is_file_name(file := key.removeprefix("/")):
            raise InvalidRequest(f"region {short(name)} has the key {short(key)}; it must be a shared memory's name")
        _check_sizes(name, offset, byte_size)
        try:
            opened = os.open(HOME / file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, UnicodeEncodeError) as error:
            why = getattr(error, "strerror", "its name is no Unicode")
            raise InvalidRequest(f"region {name}: shared memory {short(key)} cannot be opened: {why}") from error
        try:
            _check_end(name, opened, offset + byte_size)
            memory = mmap.mmap(opened, offset + byte_size)
        except BaseException:
            os.close(opened)
            raise
        region = Region(name, key, offset, byte_size, opened, memory)
        with self._lock:
            if name in self._regions or len(self._regions) >= MOST_REGIONS:
                raise InvalidRequest(f"region {name} is registered already" if name in self._regions else
                                     f"{MOST_REGIONS} regions are registered; unregister some first")
            self._regions[name] = region

    def unregister(self, name: str = "") -> None:
        """One, or all. The memory stays as long as a request reads it."""
        with self._lock:
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()

    def status(self, name: str = "") -> list[Region]:
        with self._lock:
            return [self._found(name)] if name else list(self._regions.values())

    def view(self, parameters: Mapping[str, Any]) -> memoryview:
        """What a tensor's parameters name: so many bytes of a region."""
        where, begin, length = PARAMETERS
        with self._lock:
            region = self._found(parameters.get(where))
        offset: Any = parameters.get(begin, 0)
        size: Any = parameters.get(length)
        _check_sizes(region.name, offset, size)
        if offset + size > region.byte_size:
            raise InvalidRequest(f"region {region.name} has {region.byte_size} bytes; {size} from {offset} on are not "
                                 "in it")
        _check_end(region.name, region.file, region.offset + region.byte_size)
        start = region.offset + offset
        return memoryview(region.memory)[start: start + size]

    def _found(self, name: Any) -> Region:
        if not isinstance(name, str) or name not in self._regions:
            raise ModelNotFound(f"there is no region {short(name)}; registered are {short(sorted(self._regions))}")
        return self._regions[name]


def memory_of(what: str, parameters: Mapping[str, Any], regions: Regions | None) -> memoryview | None:
    """The shared memory that a tensor's parameters name, if they do."""
    if not parameters.keys() & set(PARAMETERS):
        return None
    if regions is None:
        raise InvalidRequest(f"{what} names shared memory, which this server does not take (it is started without it)")
    return regions.view(parameters)


def _is_file_name(name: str) -> bool:
    return 0 < len(name.encode(errors="replace")) < 256 and name not in (".", "..") and not {"/", "\0"} & {*name}


def _check_sizes(name: str, offset: Any, size: Any) -> None:
    if type(offset) is not int or type(size) is not int or not 0 <= offset < 2**62 or not 0 <= size < 2**62:
        raise InvalidRequest(f"region {name}: offset is {short(offset)} and byte size {short(size)}; they must be "
                             "integers from 0 on")


def _check_end(name: str, file: int, end: int) -> None:
    """That the memory is there to the end. It can be cut off later, which nobody can prevent."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or not 0 < end <= found.st_size:
        raise InvalidRequest(f"region {name} ends at byte {end}; the shared memory has {found.st_size}, and a region "
                             "one byte at least")
