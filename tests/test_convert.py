"""Conversion's promises: the same bits and tokens from every format, whole or not at all, mapped where it can be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from safetensors.numpy import load_file

import jaxinfer as ji
from jaxinfer.errors import CheckpointMismatch, CorruptFile, InvalidOption, ModelNotFound
from jaxinfer.frontend.aligned import PADDING
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.folder import save_folder
from jaxinfer.frontend.gguf_tokenizer import from_gguf
from jaxinfer.frontend.saved import Saved, by_name
from jaxinfer.frontend.tokenizer import from_directory
from jaxinfer.frontend.weights import load_params, open_params
from jaxinfer.runtime import origin
from jaxinfer.runtime.convert import convert, verify
from tests import tiny
from tests.gguf_files import write_gguf
from tests.test_checkpoint import LLAMA
from tests.test_cli import jaxinfer

pytestmark = pytest.mark.usefixtures("in_haste")

SCHEMES = [None, "int8", "int4", "fp8"]
HOW = dict(max_context=128, max_rows=1, batch_invariant=True)  # one bucket: little to compile
PROMPT = "The sky is blue because"


def params_of(path: Path, dtype=None, quantize=None):
    """What `ji.load` would have as params."""
    checkpoint = open_checkpoint(path)
    _, graph = origin.model_of(checkpoint, None, None)
    return load_params(graph, checkpoint.tensors, dtype=origin.dtype_of(checkpoint, dtype), source=str(path),
                       quantize=origin.scheme_of(checkpoint, quantize), saved=checkpoint.saved)


def assert_same(found, wanted) -> None:
    found, wanted = by_name(found), by_name(wanted)
    assert list(found) == list(wanted)
    for name, array in found.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert np.asarray(array).tobytes() == np.asarray(wanted[name]).tobytes(), name


def answer(lm):
    output = lm(PROMPT, max_tokens=8, ignore_eos=True, logprobs=2)
    return output.tokens, output.logprobs


@pytest.mark.parametrize("config", [tiny.PLAIN, tiny.ROUTED], ids=["plain", "with experts"])
@pytest.mark.parametrize("quantize", SCHEMES)
def test_an_aligned_file_holds_the_bits_that_a_load_would_make(tmp_path, config, quantize):
    source = tiny.write(tmp_path / "source", config)
    converted = convert(source, tmp_path / "converted", quantize=quantize, dtype="bfloat16")
    wanted = params_of(source, "bfloat16", quantize)
    assert_same(params_of(converted), wanted)
    theirs = load_file(converted / "model.safetensors") if quantize is None else {}
    for name, array in theirs.items():
        assert name.startswith(PADDING) or array.tobytes() == np.asarray(by_name(wanted)[name]).tobytes()
    assert verify(converted) == len(by_name(wanted))


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_between_any_two_of_our_formats_nothing_changes(tiny_path, tmp_path, quantize):
    wanted, source = params_of(tiny_path, None, quantize), tiny_path
    for i, to in enumerate(("orbax", "safetensors", "safetensors")):
        source = convert(source, tmp_path / str(i), to=to, quantize=quantize if i == 0 else None)
        assert_same(params_of(source), wanted)
    first, second = (tmp_path / name / "model.safetensors" for name in "12")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("config", [tiny.PLAIN, tiny.ROUTED, tiny.GPT2], ids=["plain", "with experts", "gpt2"])
def test_through_our_formats_and_back_the_tensors_are_those_of_the_source(tmp_path, config):
    """transformers itself loads them in tests/parity/test_huggingface.py."""
    source = tiny.write(tmp_path / "source", config)
    between = convert(source, tmp_path / "between", to="orbax")
    found = load_file(convert(between, tmp_path / "theirs", to="huggingface") / "model.safetensors")
    wanted = load_file(source / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_floats_of_any_of_our_formats_are_quantised_while_they_are_read(tmp_path, quantize):
    """Orbax keeps experts as one tensor of three axes, of which rows are experts."""
    source = tiny.write(tmp_path / "source", tiny.ROUTED)
    wanted = params_of(source, None, quantize)
    for to in ("orbax", "safetensors"):
        assert_same(params_of(convert(source, tmp_path / to, to=to), None, quantize), wanted)


@pytest.fixture(scope="module")
def asked(tiny_path):
    with ji.load(tiny_path, quantize="int8", **HOW) as lm:
        return answer(lm)


@pytest.mark.parametrize("to", ["safetensors", "orbax"])
def test_what_is_saved_is_loaded_by_itself_with_the_same_tokens(tiny_path, tmp_path, asked, to):
    source = shutil.copytree(tiny_path, tmp_path / "source")
    with ji.load(source, quantize="int8", **HOW) as lm:
        lm.save(tmp_path / "saved", format=to)
        chat = lm.tokenizer.chat_template
    shutil.rmtree(source)
    with ji.load(tmp_path / "saved", **HOW) as lm:
        assert answer(lm) == asked and lm.tokenizer.chat_template == chat
        assert {str(array.dtype) for array in jax.tree.leaves(lm.params)} == {"int8", "float32"}


def test_a_file_of_floats_is_cast_and_quantised_like_its_source(tiny_path, tmp_path):
    converted = convert(tiny_path, tmp_path / "converted")
    for how in (dict(dtype="bfloat16"), dict(quantize="fp8")):
        assert_same(params_of(converted, **how), params_of(tiny_path, **how))


def test_quantised_weights_are_not_quantised_in_another_way(tiny_path, tmp_path):
    converted = convert(tiny_path, tmp_path / "converted", quantize="int8")
    assert_same(params_of(converted, quantize="w8a8"), params_of(tiny_path, quantize="int8"))
    for ask in (lambda: ji.load(converted, quantize="int4"),
                lambda: convert(converted, tmp_path / "new", quantize="fp8")):
        with pytest.raises(InvalidOption, match="were saved in int8, and what that rounded away is gone"):
            ask()
    with pytest.raises(InvalidOption, match="'huggingface', which holds floats, and the weights are in int8"):
        convert(converted, tmp_path / "new", to="huggingface")


def test_saved_arrays_that_are_not_the_graph_s_are_named(tiny_path, tmp_path):
    converted = convert(tiny_path, tmp_path / "converted", quantize="int8")
    wider = (converted / "config.json").read_text().replace('"intermediate_size": 96', '"intermediate_size": 32')
    (converted / "config.json").write_text(wider)
    with pytest.raises(CheckpointMismatch) as caught:
        params_of(converted)
    assert "wrong shape: blocks.1.down.values has (64, 96), expected (64, 32)" in caught.value.problems


# From elsewhere.


def test_somebody_else_s_orbax_checkpoint_is_loaded_where_its_paths_are_the_names(tiny_path, tmp_path):
    tree: dict = {}
    for name, array in load_file(tiny_path / "model.safetensors").items():
        node, path = tree, name.split(".")
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    ocp.save(tmp_path / "theirs" / "step_7", tree)
    with pytest.raises(ModelNotFound, match=r"no config\.json, which would say .* or give load a graph="):
        ji.load(tmp_path / "theirs")
    checkpoint = open_checkpoint(tiny_path)
    _, graph = origin.model_of(checkpoint, None, None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_path / name, tmp_path / "theirs")
    with ji.load(tmp_path / "theirs", graph=graph, dtype="float32", **HOW) as lm:
        assert_same(lm.params, params_of(tiny_path))
        assert lm(PROMPT, max_tokens=2, ignore_eos=True).text


def gguf(path: Path) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (10, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
              "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8),
              "blk.0.ffn_gate": (6, 8), "blk.0.ffn_up": (6, 8), "blk.0.ffn_down": (8, 6)}
    words = ["<s>", "</s>", "<|im_end|>", "a", "b", "c", "ab", "Ġ", "x", "y"]
    told = {"model": "gpt2", "pre": "gpt-2", "tokens": words, "merges": ["a b"], "bos_token_id": 0, "eos_token_id": 1,
            "token_type": [3, 3, 3, 1, 1, 1, 1, 1, 1, 1], "add_bos_token": True}
    metadata = {**LLAMA, **{f"tokenizer.ggml.{key}": value for key, value in told.items()},
                "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
                "tokenizer.chat_template.tool_use": "{{ tools }}"}
    return write_gguf(path, metadata, {f"{name}.weight": rng.random(shape, np.float32)
                                       for name, shape in shapes.items()})


def test_a_gguf_file_becomes_a_folder_with_its_config_and_its_tokenizer(tmp_path):
    source = gguf(tmp_path / "m.gguf")
    converted = convert(source, tmp_path / "converted")
    before, after = open_checkpoint(source), open_checkpoint(converted)
    assert_same(params_of(converted), params_of(source))
    assert after.config == before.config
    wanted, found = from_gguf(before.gguf), from_directory(converted)
    assert found.encode("ab c<|im_end|>") == wanted.encode("ab c<|im_end|>")
    assert found.chat_templates == wanted.chat_templates and found.named == wanted.named
    assert found.eos_ids == wanted.eos_ids == {1, 2}
    assert origin.eos_of(after, found) == origin.eos_of(before, wanted)


@pytest.mark.smollm2
def test_smollm2_s_tokenizer_is_the_same_out_of_a_folder(smollm2_path, tmp_path):
    checkpoint = open_checkpoint(smollm2_path)
    wanted = from_gguf(checkpoint.gguf)
    wanted.save(tmp_path)
    found = from_directory(tmp_path)
    for text in ("Why is the sky blue?", "def f(x):\n    return x ** 12345", "naïve 東京 🙂<|im_end|>"):
        assert found.encode(text) == wanted.encode(text)
        assert found.decode(found.encode(text)) == wanted.decode(wanted.encode(text))
    messages = [{"role": "user", "content": "Hello"}]
    assert found.render_chat(messages) == wanted.render_chat(messages)


# Whole, or not at all.


@pytest.mark.parametrize("ask, error, message", [
    (lambda source, to: convert(source, to, to="pickle"), InvalidOption, "'pickle'; it must be one of safetensors"),
    (lambda source, to: convert(source, source), InvalidOption, "is there already; give another name"),
    (lambda source, to: convert(source, to, dtype="float16"), InvalidOption, "dtype is 'float16'"),
    (lambda source, to: convert(source, to, to="huggingface", quantize="int8"), InvalidOption, "holds floats"),
    (lambda source, to: verify(source), InvalidOption, "has no checksums"),
])
def test_what_cannot_be_done_is_refused_and_leaves_nothing(tiny_path, tmp_path, ask, error, message):
    with pytest.raises(error, match=message):
        ask(tiny_path, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_source_that_breaks_off_leaves_nothing(tiny_path, tmp_path):
    checkpoint = open_checkpoint(shutil.copytree(tiny_path, tmp_path / "source"))
    _, graph = origin.model_of(checkpoint, None, None)
    params = open_params(graph, checkpoint.tensors, dtype="float32", source="here")
    (tmp_path / "source" / "model.safetensors").touch()
    with pytest.raises(CorruptFile, match=r"model\.safetensors: has changed since it was opened.*tensor 'model\."):
        save_folder(tmp_path / "new", params, spec=graph.spec, checkpoint=checkpoint, tokenizer=None,
                    saved=Saved("float32"))
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(ModelNotFound, match="is gone, and with it the config"):
        save_folder(tmp_path / "new", params, spec=graph.spec, checkpoint=checkpoint, tokenizer=None,
                    saved=Saved("float32"))
    assert not list(tmp_path.iterdir())


FULL = """
import resource, sys
from jaxinfer.errors import SaveFailed
from jaxinfer.runtime.convert import convert

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
for to in ("safetensors", "orbax"):
    try:
        convert(sys.argv[1], sys.argv[2], to=to)
    except SaveFailed as error:
        print(error)
"""


def test_a_full_disk_is_an_error_with_its_name_and_nothing_is_left(tiny_path, tmp_path):
    ran = subprocess.run([sys.executable, "-c", FULL, str(tiny_path), str(tmp_path / "new")], capture_output=True,
                         text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{tmp_path / 'new'}: the disk is full") for line in lines)
    assert all("nothing was saved" in line for line in lines) and not list(tmp_path.iterdir())


# In the page cache.

MAPPED = """
import sys
from pathlib import Path
import jax
import numpy as np
from jaxinfer.frontend.aligned import write_aligned, read_saved
from jaxinfer.frontend.safetensors import open_with_metadata
from jaxinfer.frontend.saved import Saved
from jaxinfer.frontend.weights import load_params, open_params
from jaxinfer.graph import Graph, Leaf

def private():  # KiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:"))

COUNT, SHAPE = 5, (4096, 2048)  # 160 MiB
path = Path(sys.argv[1])
write_aligned(path, {f"w.{i}": np.broadcast_to(np.float32(i), SHAPE) for i in range(COUNT)}, Saved("float32"), "here")
graph = Graph("test", {"w": [Leaf(SHAPE, ("a", "b"), "w")] * COUNT}, (), None, (), None, 1, 1)
jax.block_until_ready(jax.device_put(np.zeros(4)))
before = private()
tensors, saved = read_saved(*open_with_metadata(path), path)
params = load_params(graph, tensors, dtype="float32", source="here", saved=saved)
print(private() - before)
maps = [line.split() for line in open("/proc/self/maps") if line.endswith(str(path) + "\\n")]
spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
print(all(any(start <= w.unsafe_buffer_pointer() < stop for start, stop in spans) for w in params["w"]))
print([float(w[-1, -1]) for w in params["w"]])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory by Linux's /proc")
def test_weights_of_an_aligned_file_lie_in_the_page_cache_and_take_no_memory_of_the_process(tmp_path):
    ran = subprocess.run([sys.executable, "-c", MAPPED, str(tmp_path / "m")], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"})
    assert ran.returncode == 0, ran.stderr
    grown, inside, last = ran.stdout.splitlines()
    assert int(grown) < 5 << 10, f"{int(grown) >> 10} MiB of 160"
    assert inside == "True" and last == "[0.0, 1.0, 2.0, 3.0, 4.0]"


def test_a_model_of_an_aligned_file_runs_on_it(tiny_path, tmp_path):
    converted = convert(tiny_path, tmp_path / "converted")
    opened = open_checkpoint(converted)
    with ji.load(converted, **HOW) as lm, open("/proc/self/maps") as maps:
        file = str(converted / "model.safetensors")
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if line.endswith(f"{file}\n")]
        for array in jax.tree.leaves(lm.params):
            assert any(start <= array.unsafe_buffer_pointer() < stop for start, stop in spans)
    assert {tensor.offset % 64 for tensor in opened.tensors.values()} == {0}


# On the command line.


def test_the_command_line_converts_and_verifies(tiny_path, tmp_path):
    ran = jaxinfer("convert", str(tiny_path), str(tmp_path / "new"), "--quantize", "int8")
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path / 'new'}\n"), ran.stderr
    file = tmp_path / "new" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ran = jaxinfer("verify", str(tmp_path / "new"))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "1 of 23 tensors have other bytes than their checksums say: norm" in ran.stderr
