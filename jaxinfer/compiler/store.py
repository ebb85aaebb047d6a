"""Files that only we could have written, each under the digest of everything that can change what is in it.

A file is MAGIC, the SHA-256 of all that follows, the length of a note, the note (JSON), and the payload, deflated. It
is written beside its place and renamed, so that a reader finds all of it or nothing. The payload is a pickle, which
runs what it says: nothing is read from a folder or a file that another user owns or may write.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import stat
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxinfer.errors import CorruptFile, UntrustedCache

MAGIC = b"jaxinfer program 1\n"
SUFFIX = ".program"
NAME = re.compile(r"[0-9a-f]{64}")
DIGEST = hashlib.sha256().digest_size
ABANDONED = 3600  # seconds after which an unfinished file belongs to a process that has died


@dataclass(frozen=True)
class Stored:
    """One file: its name, its bytes on disk, when it was `used` last (seconds since 1970), and its note."""

    name: str
    size: int
    used: float
    note: dict[str, Any]


class Store:
    """The files of one folder, of at most `limit` bytes in all: those used the longest ago go first."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit

    def get(self, name: str) -> tuple[dict[str, Any], bytes] | None:
        """Note and payload of a file, which counts as used; None if it is not there.

        Raises UntrustedCache, or CorruptFile.
        """
        data = self._read(name)
        return None if data is None else unpack(data, self.folder / (name + SUFFIX))

    def has(self, name: str) -> bool:
        """Whether a file is there, sound or not."""
        return (self.folder / (name + SUFFIX)).exists()

    def put(self, name: str, note: dict[str, Any], payload: bytes) -> None:
        """Write a file, or replace it, then make room. Raises UntrustedCache, or OSError (a full disk)."""
        self._write(name, pack(note, payload))

    def items(self) -> list[Stored]:
        """All files that are whole, the latest used first. To be looked at, they are not used."""
        found = []
        for name, size, used in self._files():
            with suppress(CorruptFile):
                data = self._read(name, use=False)
                if data is not None:
                    found.append(Stored(name, size, used, unpack(data, self.folder / name)[0]))
        return sorted(found, key=lambda item: -item.used)

    def prune(self, limit: int) -> tuple[int, int]:
        """Remove what was used the longest ago until at most `limit` bytes are left: how many files, and bytes."""
        with self._opened() as folder:
            return (0, 0) if folder is None else _evict(folder, limit)

    def export(self, file: BinaryIO) -> int:
        """Write all files into a tar archive; how many there were."""
        count = 0
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, _, used in sorted(self._files()):
                data = self._read(name, use=False)
                if data is None:
                    continue
                with suppress(CorruptFile):
                    unpack(data, self.folder / name)
                    info = tarfile.TarInfo(name + SUFFIX)
                    info.size, info.mtime = len(data), int(used)
                    archive.addfile(info, io.BytesIO(data))
                    count += 1
        return count

    def take(self, file: BinaryIO, source: Path) -> int:
        """Take in the files of such an archive; how many there were. Raises CorruptFile before the first that is not
        whole or not ours."""
        count = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    name, content = info.name.removesuffix(SUFFIX), archive.extractfile(info)
                    if not NAME.fullmatch(name) or content is None:
                        raise CorruptFile(f"{source}: {info.name!r} is no program of jaxinfer's")
                    data = content.read()
                    unpack(data, source / info.name)
                    self._write(name, data)
                    count += 1
        except tarfile.TarError as error:
            raise CorruptFile(f"{source}: not an archive of `jaxinfer cache export`: {error}") from error
        return count

    # Inside.

    def _read(self, name: str, use: bool = True) -> bytes | None:
        with self._opened() as folder:
            if folder is None:
                return None
            try:
                descriptor = os.open(name + SUFFIX, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            except FileNotFoundError:
                return None
            try:
                _check(os.fstat(descriptor), self.folder / (name + SUFFIX), stat.S_ISREG)
                if use:
                    with suppress(OSError):  # root's folder, which we may only read
                        os.utime(descriptor)
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read()
            finally:
                os.close(descriptor)

    def _write(self, name: str, data: bytes) -> None:
        if len(data) > self.limit:
            raise OSError(f"{name} has {len(data):,} bytes, more than the whole cache may have: {self.limit:,}")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._opened() as folder:
            unfinished = f".{name}.{secrets.token_hex(8)}"
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.rename(unfinished, name + SUFFIX, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished, dir_fd=folder)
                raise
            assert folder is not None
            _evict(folder, self.limit)

    def _files(self) -> list[tuple[str, int, float]]:
        """Name, size and time of last use of each file."""
        with self._opened() as folder:
            return [] if folder is None else _files(folder)

    @contextmanager
    def _opened(self) -> Iterator[int | None]:
        """A descriptor of the folder, by which all else is found: its name may mean another one by then. None if there
        is no folder."""
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield None
            return
        try:
            _check(os.fstat(descriptor), self.folder, stat.S_ISDIR)
            yield descriptor
        finally:
            os.close(descriptor)


def pack(note: dict[str, Any], payload: bytes) -> bytes:
    """The bytes of a file."""
    text = json.dumps(note).encode()
    rest = len(text).to_bytes(4, "little") + text + zlib.compress(payload, 1)
    return MAGIC + hashlib.sha256(rest).digest() + rest


def unpack(data: bytes, path: Path) -> tuple[dict[str, Any], bytes]:
    """Note and payload. Raises CorruptFile."""
    start = len(MAGIC) + DIGEST
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(data[start:]).digest() != data[len(MAGIC): start]:
        raise CorruptFile(f"{path}: its bytes are not those that were written")
    end = start + 4 + int.from_bytes(data[start: start + 4], "little")
    return json.loads(data[start + 4: end]), zlib.decompress(data[end:])


def _check(found: os.stat_result, path: Path, is_kind: Any) -> None:
    """Raises UntrustedCache unless nobody but us, or root, could have put it there."""
    if not is_kind(found.st_mode):
        raise UntrustedCache(f"{path} is not what belongs there; remove it")
    if found.st_uid not in (0, os.geteuid()):
        raise UntrustedCache(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}: what is in it is not run; "
                             "set JAXINFER_CACHE to a folder of your own")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UntrustedCache(f"{path} may be written by other users (mode {stat.S_IMODE(found.st_mode):o}): what is in "
                             f"it is not run; chmod go-w {path}")


def _files(folder: int) -> list[tuple[str, int, float]]:
    found = []
    for entry in os.listdir(folder):
        name = entry.removesuffix(SUFFIX)
        if NAME.fullmatch(name) and name != entry:
            with suppress(FileNotFoundError):  # another process may remove it
                status = os.stat(entry, dir_fd=folder, follow_symlinks=False)
                found.append((name, status.st_size, status.st_mtime))
    return found


def _evict(folder: int, limit: int) -> tuple[int, int]:
    files = sorted(_files(folder), key=lambda file: file[2])
    total, count, freed = sum(size for _, size, _ in files), 0, 0
    for name, size, _ in files:
        if total - freed <= limit:
            break
        with suppress(OSError):  # another process has removed it
            os.unlink(name + SUFFIX, dir_fd=folder)
        count, freed = count + 1, freed + size
    for entry in os.listdir(folder):
        if entry.startswith("."):
            with suppress(FileNotFoundError):
                if os.stat(entry, dir_fd=folder).st_mtime < time.time() - ABANDONED:
                    os.unlink(entry, dir_fd=folder)
    return count, freed
