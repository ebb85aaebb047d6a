"""A checkpoint's promises: a directory or a .gguf file, one face; what is missing is named; nothing is read early."""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxinfer.errors import CorruptFile, JaxinferError, ModelNotFound, UnsupportedModel
from jaxinfer.frontend.checkpoint import open_checkpoint
from tests.gguf_files import Typed, write_gguf


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": np.float32([1, 2])}, tmp_path / "model.safetensors")
    return tmp_path


LLAMA = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 8,
    "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1, "llama.feed_forward_length": 6,
    "llama.context_length": 32, "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip


def llama_gguf(path: Path) -> Path:
    shapes = {
        "token_embd.weight": (10, 8), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (4, 8), "rope_freqs.weight": (2,),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return write_gguf(path, LLAMA, {name: rng.random(shape, np.float32) for name, shape in shapes.items()})


def test_a_directory_gives_config_weights_and_generation_settings(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.config == {"model_type": "llama"} and checkpoint.generation == {"eos_token_id": [1, 2]}
    assert checkpoint.tensors["w"].read().tolist() == [1, 2]
    assert (checkpoint.directory, checkpoint.gguf, checkpoint.source) == (directory, None, str(directory))


def test_generation_settings_may_be_absent(directory):
    assert open_checkpoint(directory).generation == {}


def test_a_gguf_file_gives_the_same_in_hugging_face_s_words_and_its_raw_metadata(tmp_path):
    checkpoint = open_checkpoint(llama_gguf(tmp_path / "m.gguf"))
    assert checkpoint.config["hidden_size"] == 8 and checkpoint.generation == {"eos_token_id": 2}
    assert checkpoint.tensors["model.layers.0.self_attn.k_proj.weight"].shape == (4, 8)
    assert checkpoint.directory is None and checkpoint.gguf["llama.block_count"] == 1


def test_a_gguf_file_may_have_any_name(tmp_path):
    assert open_checkpoint(llama_gguf(tmp_path / "blob")).config["model_type"] == "llama"


def test_a_missing_config_is_named_and_so_is_what_is_there_instead(directory):
    (directory / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json among model\.safetensors"):
        open_checkpoint(directory)
    (directory / "m.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"open the file m\.gguf itself"):
        open_checkpoint(directory)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_wrong_json_is_corrupt_and_its_place_is_named(directory, file):
    (directory / file).write_text('{"a": 1,\n "b": }')
    with pytest.raises(CorruptFile, match=rf"{file}: not JSON at line 2, column 7"):
        open_checkpoint(directory)
    (directory / file).write_text("[1]")
    with pytest.raises(CorruptFile, match=rf"{file}: holds a JSON list where an object belongs"):
        open_checkpoint(directory)


def test_what_is_no_model_is_refused_with_what_would_be_right(tmp_path, directory):
    with pytest.raises(ModelNotFound, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UnsupportedModel, match=f"open its directory, {directory}"):
        open_checkpoint(directory / "model.safetensors")
    (tmp_path / "other.gguf").write_bytes(b"GGML")
    with pytest.raises(CorruptFile, match="not a GGUF file"):
        open_checkpoint(tmp_path / "other.gguf")


@given(data=st.data())
def test_no_damage_to_a_gguf_escapes_as_anything_but_our_errors(data):
    with tempfile.TemporaryDirectory() as folder:
        path = llama_gguf(Path(folder) / "m.gguf")
        damaged = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(24, 900), min_size=1, max_size=3)):
            damaged[place] = data.draw(st.sampled_from([0, 1, 2, 255]) | st.integers(0, 255))
        path.write_bytes(damaged)
        try:
            for tensor in open_checkpoint(path).tensors.values():
                assert tensor.read().shape == tensor.shape
        except JaxinferError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("key", sorted(LLAMA.keys() - {"general.architecture", "tokenizer.ggml.eos_token_id"}))
@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, "text", True, float("nan"), [1, 2], [1], ["a"]])
def test_no_value_of_a_key_escapes_as_anything_but_our_errors(tmp_path, key, value):
    value = Typed(value, GGUFValueType.INT32) if type(value) is int else value
    tensors = {"token_embd.weight": np.ones((10, 8), np.float32), "blk.0.attn_q.weight": np.ones((8, 8), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", LLAMA | {key: value}, tensors)
    try:
        for tensor in open_checkpoint(path).tensors.values():
            tensor.read()
    except JaxinferError as error:
        assert str(path) in str(error)


RESIDENT = """
import sys
from jaxinfer.frontend.checkpoint import open_checkpoint

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:"))

before = resident()
checkpoint = open_checkpoint(sys.argv[1])
assert len(checkpoint.tensors) == 3
small = checkpoint.tensors["small"].read().sum()
print(resident() - before, small)
checkpoint.tensors["first"].read().sum()
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures resident memory by Linux's /proc")
def test_opening_a_large_file_and_reading_a_small_tensor_takes_no_memory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    half = 128 << 20
    entry = lambda dtype, size, start, end: {"dtype": dtype, "shape": [size], "data_offsets": [start, end]}
    header = json.dumps({"first": entry("U8", half, 0, half), "small": entry("F32", 4, half, half + 16),
                         "last": entry("U8", half, half + 16, 2 * half + 16)}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(half, 1)
        file.write(np.float32([1, 2, 3, 4]).tobytes())
        file.truncate(8 + len(header) + 2 * half + 16)  # the rest is holes
    # A process of its own, whose memory no other test has grown.
    run = subprocess.run([sys.executable, "-c", RESIDENT, str(tmp_path)], capture_output=True, text=True, check=True)
    (grown, total), (after_reading,) = (line.split() for line in run.stdout.splitlines())
    assert int(grown) < 20 << 10 and float(total) == 10  # KiB
    assert int(after_reading) > 100 << 10  # the measurement sees what is read
