"""The store: a file is there whole or not at all, and nothing is read that somebody else could have written."""

import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from multiprocessing.pool import ThreadPool

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.compiler.store import ABANDONED, SUFFIX, Store, pack, unpack
from jaxinfer.errors import CorruptFile, UntrustedCache

A, B, C = (f"{i:064x}" for i in (10, 11, 12))
NOTE = {"model": "decoder", "kernels": {"attend": "visits"}}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "programs", 10**6)


def names(store):
    return sorted(file.name for file in store.folder.iterdir())


def test_what_is_put_is_there_until_it_is_replaced(store):
    assert store.get(A) is None and store.items() == [] and store.prune(0) == (0, 0)
    store.put(A, NOTE, b"one")
    store.put(B, {}, b"two")
    assert store.get(A) == (NOTE, b"one") and store.get(B) == ({}, b"two") and store.get(C) is None
    store.put(A, {}, b"three")
    assert store.get(A) == ({}, b"three") and names(store) == [A + SUFFIX, B + SUFFIX]


@given(payload=st.binary(max_size=64), at=st.floats(0, 1, exclude_max=True), by=st.integers(1, 255), data=st.data())
def test_a_file_with_any_byte_flipped_or_missing_is_refused(payload, at, by, data):
    whole = pack(NOTE, payload)
    assert unpack(whole, "here") == (NOTE, payload)
    flipped = bytearray(whole)
    flipped[int(at * len(whole))] ^= by
    for broken in (bytes(flipped), whole[: int(at * len(whole))], whole + b"\0"):
        with pytest.raises(CorruptFile, match="here"):
            unpack(broken, "here")


def test_a_broken_file_harms_no_other(store):
    store.put(A, NOTE, b"one")
    store.put(B, NOTE, b"two")
    (store.folder / (A + SUFFIX)).write_bytes(b"")
    with pytest.raises(CorruptFile):
        store.get(A)
    assert store.get(B) and [item.name for item in store.items()] == [B]
    store.put(A, NOTE, b"again")
    assert store.get(A) == (NOTE, b"again")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_not_read(store, mode):
    store.put(A, NOTE, b"one")
    store.folder.chmod(mode)
    for act in (lambda: store.get(A), lambda: store.put(B, NOTE, b""), store.items, lambda: store.prune(0)):
        with pytest.raises(UntrustedCache, match=rf"{store.folder}.*{mode:o}"):
            act()
    store.folder.chmod(0o755)
    assert store.get(A) == (NOTE, b"one")


def test_a_file_that_others_may_write_is_not_read(store):
    store.put(A, NOTE, b"one")
    (store.folder / (A + SUFFIX)).chmod(0o620)
    with pytest.raises(UntrustedCache, match="620"):
        store.get(A)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_another_user_owns_is_not_read(store, what, monkeypatch):
    store.put(A, NOTE, b"one")
    mine = os.geteuid()
    if mine == 0:
        os.chown(store.folder if what == "folder" else store.folder / (A + SUFFIX), 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UntrustedCache, match="12345"):
        store.get(A)


def test_a_link_or_a_folder_in_the_place_of_a_file_is_not_followed(store, tmp_path):
    store.put(A, NOTE, b"one")
    (store.folder / (A + SUFFIX)).rename(tmp_path / "elsewhere")
    (store.folder / (A + SUFFIX)).symlink_to(tmp_path / "elsewhere")
    (store.folder / (B + SUFFIX)).mkdir()
    for name, error in ((A, OSError), (B, UntrustedCache)):
        with pytest.raises(error):
            store.get(name)


def test_the_store_and_its_files_are_for_nobody_else(store):
    before = os.umask(0)
    try:
        store.put(A, NOTE, b"one")
    finally:
        os.umask(before)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert (store.folder / (A + SUFFIX)).stat().st_mode & 0o777 == 0o600


def test_what_was_used_the_longest_ago_goes_first(tmp_path):
    size = len(pack({}, os.urandom(1000)))
    store = Store(tmp_path, 2 * size + 100)
    for age, name in ((3, A), (2, B)):
        store.put(name, {}, os.urandom(1000))
        os.utime(tmp_path / (name + SUFFIX), (time.time() - age,) * 2)
    assert store.get(A), "now B is the one that was used the longest ago"
    store.put(C, {}, os.urandom(1000))
    assert names(store) == [A + SUFFIX, C + SUFFIX]
    assert [item.name for item in store.items()] == [C, A]
    assert store.prune(size + 50) == (1, size) and names(store) == [C + SUFFIX]


def test_what_is_larger_than_the_limit_is_not_stored(tmp_path):
    store = Store(tmp_path, 1000)
    store.put(A, {}, b"small")
    with pytest.raises(OSError, match="1,000"):
        store.put(B, {}, os.urandom(2000))
    assert names(store) == [A + SUFFIX]


FILL = """
import resource, sys
from pathlib import Path
from jaxinfer.compiler.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Store(Path(sys.argv[1]), 10**6).put("f" * 64, {}, bytes(__import__("random").randbytes(20000)))
except OSError as error:
    print("refused:", error)
"""
HANG = """
import os, sys
from pathlib import Path
from jaxinfer.compiler import store
os.rename = lambda *args, **how: (print("written", flush=True), sys.stdin.read())
store.Store(Path(sys.argv[1]), 10**6).put("f" * 64, {}, b"half")
"""
WRITE = """
import sys
from pathlib import Path
from jaxinfer.compiler.store import Store
store, payload = Store(Path(sys.argv[1]), 10**7), bytes(range(256)) * 2000
for _ in range(15):
    store.put("f" * 64, {}, payload)
    assert store.get("f" * 64) == ({}, payload)
"""


def start(code, folder):
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_a_full_disk_is_an_error_and_leaves_nothing(store):
    """A limit on the size of files stands in for the disk."""
    store.put(A, NOTE, b"one")
    assert "refused" in start(FILL, store.folder).communicate(timeout=60)[0]
    assert names(store) == [A + SUFFIX] and store.get(A)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY, "it is the other process's limit"


def test_a_process_killed_while_it_writes_leaves_the_rest_whole(store):
    store.put(A, NOTE, b"one")
    process = start(HANG, store.folder)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (unfinished,) = (name for name in names(store) if name.startswith("."))
    assert store.get("f" * 64) is None and [item.name for item in store.items()] == [A]
    store.put(B, NOTE, b"two")
    assert unfinished in names(store), "its process might still be writing"
    os.utime(store.folder / unfinished, (time.time() - ABANDONED - 1,) * 2)
    store.put(C, NOTE, b"three")
    assert names(store) == [name + SUFFIX for name in (A, B, C)]


def test_two_processes_and_four_threads_may_write_the_same_file(store):
    both = [start(WRITE, store.folder) for _ in range(2)]
    with ThreadPool(4) as pool:
        pool.map(lambda i: [store.put("f" * 64, {"by": i}, b"x" * 10**5) or store.get("f" * 64) for _ in range(20)],
                 range(4))
    assert [process.wait(60) for process in both] == [0, 0]
    assert store.get("f" * 64) and names(store) == ["f" * 64 + SUFFIX]


def test_an_archive_carries_programs_to_another_machine(store, tmp_path):
    store.put(A, NOTE, b"one")
    store.put(B, {}, b"two")
    (store.folder / (C + SUFFIX)).write_bytes(b"broken")
    archive, other = BytesIO(), Store(tmp_path / "other", 10**6)
    assert store.export(archive) == 2
    archive.seek(0)
    assert other.take(archive, tmp_path / "a.tar") == 2 and other.get(A) == (NOTE, b"one") and other.get(B)


SOUND = pack({}, b"")


@pytest.mark.parametrize("name, data", [(A + SUFFIX, b"junk"), ("../" + A + SUFFIX, SOUND), ("x", SOUND)])
def test_an_archive_with_anything_else_in_it_is_refused(store, tmp_path, name, data):
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, BytesIO(data))
    archive.seek(0)
    with pytest.raises(CorruptFile, match=r"a\.tar"):
        store.take(archive, tmp_path / "a.tar")
    with pytest.raises(CorruptFile, match="not an archive"):
        store.take(BytesIO(b"no tar"), tmp_path / "a.tar")
    assert store.items() == []
