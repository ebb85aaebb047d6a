"""A file that is cut short or changed while it is read is an error that names it and the tensor; one that is replaced
or removed is still there for who has it open."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.errors import CorruptFile
from jaxinfer.frontend.gguf import open_gguf
from jaxinfer.frontend.safetensors import open_safetensors
from tests.gguf_files import Blocks, write_gguf


def safetensors(folder: Path):
    save_file({"first": np.ones((4, 8), np.float32), "last": np.ones((512, 64), np.float32)}, folder / "m.safetensors")
    return folder / "m.safetensors", lambda: open_safetensors(folder / "m.safetensors")["last"]


def gguf(folder: Path):
    blocks = np.zeros((512, 36), np.uint8)
    path = write_gguf(folder / "m.gguf", {"general.architecture": "llama"}, {"last": Blocks(blocks, "Q4_0")})
    return path, lambda: open_gguf(path)[1]["last"]


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    found = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("format", [safetensors, gguf])
def test_a_file_that_is_changed(tmp_path, format):
    path, tensor_of = format(tmp_path)
    tensor = tensor_of()
    tensor.rows(0, 2)
    touch(path)
    for read in (tensor.read, lambda: tensor.rows(0, 2), lambda: tensor.rows(0, 2, slice(0, 32))):
        with pytest.raises(CorruptFile, match="has changed since it was opened") as caught:
            read()
        assert str(path) in str(caught.value) and "'last'" in str(caught.value)


@pytest.mark.parametrize("away", [replace, Path.unlink], ids=["replaced", "removed"])
@pytest.mark.parametrize("format", [safetensors, gguf])
def test_a_file_whose_name_is(tmp_path, format, away):
    path, tensor_of = format(tmp_path)
    tensor = tensor_of()
    before = tensor.rows(0, 2)
    away(path)
    np.testing.assert_array_equal(tensor.rows(0, 2), before)
    np.testing.assert_array_equal(tensor.read()[:2], before)


CUT_SHORT = """
import sys
from pathlib import Path
from jaxinfer.errors import CorruptFile
from tests import test_files

path, tensor_of = getattr(test_files, sys.argv[1])(Path(sys.argv[2]))
tensor = tensor_of()
rows = tensor.rows(0, 256)
with path.open("r+b") as file:
    file.truncate(path.stat().st_size - 16)
try:
    tensor.rows(256, 512)
except CorruptFile as error:
    print(error)
"""


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_a_file_that_is_cut_short_while_it_is_read_does_not_end_the_process(tmp_path, format):
    """A process of its own, which a read through the map would end."""
    ran = subprocess.run([sys.executable, "-c", CUT_SHORT, format, str(tmp_path)], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert ran.returncode == 0, ran.stderr
    assert "m." + format in ran.stdout and "ends early: tensor 'last' has 16 bytes from byte" in ran.stdout


def test_columns_are_read_alone(tmp_path, monkeypatch):
    array = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
    save_file({"w": array}, tmp_path / "m.safetensors")
    tensor, counts, preadv = open_safetensors(tmp_path / "m.safetensors")["w"], [], os.preadv

    def counted(*args):
        counts.append(preadv(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    np.testing.assert_array_equal(tensor.rows(1, 5, slice(8, 24)), array[1:5, 8:24])
    assert sum(counts) == 4 * 16 * 4
