"""Steps compile for a GPU that is not there, and copy nothing large: XLA's CUDA plugin, the description of an H100, and
abstract shapes. Nothing is autotuned then, but what is fused, aliased and kept in memory is what a GPU would run."""

import json
import re
from functools import partial
from math import prod

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from bench import tune
from jaxinfer.compiler import Executables, Key, stored
from jaxinfer.compiler.buckets import Bucket, decode, prompt
from jaxinfer.compiler.hardware import HARDWARE, compiling_for, cuda_device
from jaxinfer.kernels import quantised, routed_ffn, tracing
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.ahead import _for_device, _gpu_of
from tests import tiny
from tests.elsewhere import compiled, programs

pytestmark = pytest.mark.gpu
# Weights and pages that are much larger than what a step of a few tokens makes.
CONFIG = {**tiny.PLAIN, "hidden_size": 4096, "intermediate_size": 8192, "vocab_size": 32000,
          "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
MIXED = Bucket(32, 8, 32)  # rows of any lengths
OURS = {"attend": "triton", "matmul": "few", "gated": "few"}
INT8 = {"attend": "triton", "matmul_int8": "few", "gated": "few"}
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", re.MULTILINE)
SAME = "parameter", "bitcast", "get-tuple-element"  # of an array that there is


@pytest.fixture(scope="module")
def h100():
    pytest.importorskip("jax_plugins.xla_cuda13", reason="XLA's CUDA plugin is not there: make test-gpu brings it")
    return cuda_device(HARDWARE["h100"])


def made(hlo: str) -> dict[str, int]:
    """The elements of each array that a program writes to memory, by what writes it: what happens within a fusion stays
    there."""
    fused = set(re.findall(r"fusion\(.*calls=%([\w.-]+)", hlo))
    computations = re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?^}", hlo, re.MULTILINE | re.DOTALL)
    bodies = re.split(r"^(?:ENTRY )?%[\w.-]+ \(", hlo, flags=re.MULTILINE)[1:]
    return {match[0].strip(): prod(map(int, match[1].split(",")))
            for name, body in zip(computations, bodies, strict=True) if name not in fused
            for match in INSTRUCTION.finditer(body) if match[2] not in SAME}


def test_what_a_program_makes_is_read_from_its_text():
    text = """HloModule step

%fused_computation (param_0: f32[64,8]) -> f32[8,64] {
  %param_0 = f32[64,8]{1,0} parameter(0)
  ROOT %transpose.1 = f32[8,64]{1,0} transpose(%param_0), dimensions={1,0}
}

ENTRY %main.2 (w: f32[64,8]) -> f32[8,64] {
  %w = f32[64,8]{1,0} parameter(0)
  %copy.3 = f32[64,8]{1,0} copy(%w)
  ROOT %fusion.1 = f32[8,64]{1,0} fusion(%copy.3), kind=kLoop, calls=%fused_computation, metadata={}
}
"""
    assert [(name.split()[-1], size) for name, size in made(text).items()] == [("copy(", 512), ("fusion(", 512)]


@pytest.mark.parametrize(("how", "kernels", "buckets"), [
    ({}, OURS, (decode(8), MIXED, prompt(64))),
    ({"kv_cache_dtype": "int8"}, OURS, (decode(8), MIXED)),
    ({"quantize": "int8"}, INT8, (decode(8), MIXED)),
    ({"quantize": "int4"}, {"matmul_int4": "few", "gated": "few"}, (decode(8),)),
    ({"quantize": "fp8"}, {"matmul_fp8": "w8a8", "gated": "rounded"}, (decode(8),)),
], ids=["bfloat16", "pages in int8", "weights in int8", "weights in int4", "weights in fp8"])
def test_no_step_copies_weights_or_pages(h100, how, kernels, buckets):
    executables = programs(CONFIG, h100, **how)
    weights = [x for x in jax.tree.leaves(executables.params) if x.ndim == 2 and x.dtype != "float16"]  # and not scales
    pages = [x for x in jax.tree.leaves(executables.state) if x.ndim == 4]
    nbytes = lambda arrays: [x.size * x.dtype.itemsize for x in arrays]
    for bucket in buckets:
        program, chosen = compiled(executables, Key("forward", bucket))
        memory = program.memory_analysis()
        assert chosen.items() >= kernels.items(), bucket
        assert memory.alias_size_in_bytes == sum(nbytes(jax.tree.leaves(executables.state))), "pages are not donated"
        assert memory.temp_size_in_bytes < min(nbytes(weights + pages)), f"{bucket}: there is room for a copy"
        smallest = min(x.size for x in weights + pages)
        assert not {text: size for text, size in made(program.as_text()).items() if size >= smallest}, bucket
    executables.close()


def test_no_more_than_one_layer_of_int4_is_unpacked_for_a_prompt(h100):
    temporaries = []
    for layers in (2, 4):
        executables = programs({**CONFIG, "num_hidden_layers": layers}, h100, quantize="int4")
        program, _ = compiled(executables, Key("forward", prompt(512)))
        temporaries.append(program.memory_analysis().temp_size_in_bytes)
        with tracing("gpu", kind=h100.device_kind):
            assert temporaries[-1] < planning.temporaries(executables.graph, 512, 8, "int4")
        executables.close()
    layer = 2 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 8192)
    assert temporaries[1] - temporaries[0] < layer / 4


@pytest.mark.parametrize("tokens", [8, 2048])
@pytest.mark.parametrize("format", [None, quantised.INT8, quantised.INT4, quantised.FP8],
                         ids=lambda format: format and format.name)
def test_no_expert_is_copied_or_widened_in_memory(h100, format, tokens):
    E, A, D, F = 8, 2, 4096, 14336  # Mixtral's
    of = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    stack = lambda *shape: quantised.blank(format, shape, "bfloat16") if format else of(*shape, dtype="bfloat16")
    args = (of(tokens, D, dtype="float32"), of(tokens, A, dtype="int32"), of(tokens, A, dtype="float32"),
            stack(E, 2 * F, D), stack(E, D, F))
    here = jax.tree.map(lambda x: x.update(sharding=SingleDeviceSharding(h100)), args)
    with tracing("gpu", kind=h100.device_kind) as trace, compiling_for(h100, None):
        program = jax.jit(partial(routed_ffn, activation=jax.nn.silu)).lower(*here).compile()
    assert trace.chosen["routed_ffn"] == "triton"
    made_by_tokens = 4 * tokens * A * (F + 2 * D)
    assert program.memory_analysis().temp_size_in_bytes < made_by_tokens + 2**20


@pytest.mark.parametrize("name", ["few_int8/1/16", "few_int4_gated/1/16", "routed_down/1/128"])
def test_what_is_tuned_compiles_into_a_program_for_each_candidate(h100, name):
    kernel = next(kernel for kernel in tune.kernels() if kernel.name == name)
    call = kernel.calls[0]
    here = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(h100))
    args = jax.tree.map(here, jax.eval_shape(call.make))
    texts = set()
    for blocks in (kernel.default, kernel.candidates[0]):
        with compiling_for(h100, None):
            program = tune.compiled(name, blocks, call, args, h100.device_kind)
        assert program, f"{blocks} do not fit"
        texts.add(program.as_text())
    assert len(texts) == 2, "the kernel does not ask for what is tried"


def test_a_program_is_stored_under_the_name_that_the_gpu_will_ask_for(h100, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAXINFER_CACHE_GB", "1")
    theirs = "cuda 13000", "9.0", "580.1", ("nvidia-cublas 13",)
    told = stored.describe(jax.devices("cpu")[0]) | {"kind": h100.device_kind, "machine": theirs}
    (tmp_path / "h100.json").write_text(json.dumps(told))
    device, machine = _gpu_of(tmp_path / "h100.json")
    path = str(tiny.write(tmp_path / "tiny", tiny.PLAIN))
    ahead = _for_device(path, device, machine, memory="1GiB", max_rows=8, max_context=128)
    monkeypatch.setattr(stored, "machine_of", lambda device: theirs)
    asking = Executables(ahead.graph, ahead.ladder, params=ahead.params, state=ahead.state, max_rows=8,
                         max_context=128, table_width=ahead.table_width, device=h100)
    keys = Key("copy"), Key("forward", ahead.ladder.holding(decode(8))[0])
    ahead.compile_all(*keys)
    ahead.close()
    asking.close()
    assert {asking._stored_as(key) for key in keys} == {item.name for item in stored.store().items()}
    assert ahead.ledger[str(keys[1])].bytes and ahead.ledger[str(keys[1])].kernels["attend"] == "triton"
