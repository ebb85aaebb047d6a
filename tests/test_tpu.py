"""Everything compiles for TPUs that are not there: libtpu, a topology description, and abstract shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from jaxinfer import kernels
from jaxinfer.compiler import Executables, Key
from jaxinfer.compiler.buckets import decode, mixed, prompt
from jaxinfer.compiler.encoders import Encoders, encoder_ladder
from jaxinfer.compiler.hardware import compiling_for, tpu_topology
from jaxinfer.compiler.stored import store
from jaxinfer.frontend.architectures import architecture
from jaxinfer.graph import Run
from jaxinfer.kernels import OPS
from jaxinfer.kernels.attention_tpu import Interleaved
from jaxinfer.kernels.quantised import FP8, INT4, INT8, blank
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.ahead import _for_device
from tests import tiny
from tests.elsewhere import compiled, programs

pytestmark = pytest.mark.tpu
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 512}  # as Pallas wants it
GRAPHS = {
    "plain": {**tiny.PLAIN, **WIDE},
    "windowed": {**tiny.WINDOWED, **WIDE},
    "routed": {**tiny.ROUTED, **WIDE},
    "gemma2": {**tiny.PLAIN, **WIDE, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"],
               "sliding_window": 512, "query_pre_attn_scalar": 128, "attn_logit_softcapping": 50.0,
               "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 320, "n_embd": 256, "n_head": 2, "n_layer": 2, "n_positions": 1024},
}
BERT = {"model_type": "bert", "vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": 256}
SMOLLM2 = {**tiny.PLAIN, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
           "num_key_value_heads": 3, "head_dim": 64}
BANDWIDTH = {"v5e:1x1": 819e9, "v5p:2x2x1": 2765e9, "v6e:1x1": 1640e9}  # of a chip's HBM, bytes/s


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxinfer[tpu]'")


@pytest.fixture(scope="module")
def v5e(libtpu):
    return tpu_topology("v5e:1x1")[0]


@pytest.fixture(scope="module", params=BANDWIDTH)
def chip(libtpu, request):
    return tpu_topology(request.param)[0]


def seconds(program) -> float:
    """By the compiler's own estimate: a custom call that it cannot estimate counts as -1 s, and a kernel as nothing."""
    return program.cost_analysis()["optimal_seconds"] % 1


def bandwidth(chip: jax.Device) -> float:
    kind = {"TPU v5 lite": "v5e:1x1", "TPU v5": "v5p:2x2x1", "TPU v6 lite": "v6e:1x1"}[chip.device_kind]
    return BANDWIDTH[kind]


# --- graphs ---


@pytest.mark.parametrize("name", GRAPHS)
def test_every_decoder_compiles_for_every_chip_and_costs_what_was_planned(chip, name):
    executables = programs(GRAPHS[name], chip)
    weights, state = planning.held(executables.params), planning.held(executables.state)
    program, chosen = compiled(executables, Key("forward", mixed(8, 128)))
    memory = program.memory_analysis()
    assert chosen["attend"] == "ragged" and chosen.get("routed_ffn", "grouped") == "grouped"
    assert memory.alias_size_in_bytes == state, "the pages are not donated, or not as large as planned"
    assert weights + state < memory.argument_size_in_bytes < 1.02 * (weights + state)
    assert memory.temp_size_in_bytes < 2**22, "pages or weights are copied"
    read = weights if name != "routed" else 0  # its experts are read by a kernel
    assert read / bandwidth(chip) < seconds(program) < 20 * (weights + state) / bandwidth(chip)
    executables.close()


def test_an_encoder_compiles_for_every_chip(chip):
    encoder, dtype = architecture(BERT).graph(), jnp.dtype(jnp.bfloat16)
    programs = Encoders(encoder, planning.abstract_params(encoder, dtype), ("mean",), True, chip)
    program = programs.lower(encoder_ladder(128)[128][1]).compile()
    weights, memory = planning.nbytes(encoder.spec, dtype), program.memory_analysis()
    assert weights < memory.argument_size_in_bytes < 1.1 * weights and memory.temp_size_in_bytes < 2**24
    assert 0 < seconds(program) < 1e-3
    programs.close()


def test_whatever_a_step_is_followed_by_compiles_for_a_v5e(v5e):
    executables = programs(GRAPHS["plain"], v5e)
    for key in (Key("sample", 8), Key("greedy", 8), Key("edited", 8), Key("logprobs", 8), Key("copy"), Key("history"),
                Key("steps", decode(8, 8)), Key("score", prompt(128)), Key("embed", prompt(128))):
        program, _ = compiled(executables, key)
        assert program.memory_analysis().temp_size_in_bytes < 2**24, key
    executables.close()


@pytest.mark.parametrize("config", [tiny.PLAIN, tiny.ROUTED, SMOLLM2], ids=["plain", "routed", "smollm2"])
def test_narrow_heads_are_left_to_xla(v5e, config):
    executables = programs(config, v5e)
    for bucket in (decode(8), prompt(128)):
        program, chosen = compiled(executables, Key("forward", bucket))
        memory = program.memory_analysis()
        assert chosen["attend"] == "visits"
        assert memory.alias_size_in_bytes > 0, "the pages are not donated"
        assert memory.temp_size_in_bytes < 2**28
    executables.close()


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4", "fp8"])
def test_a_quantised_decoder_compiles_for_a_v5e(v5e, scheme):
    executables = programs(tiny.PLAIN, v5e, scheme)
    program, chosen = compiled(executables, Key("forward", decode(8)))
    weights = planning.nbytes(executables.graph.spec, jnp.bfloat16, scheme)
    assert program.memory_analysis().argument_size_in_bytes > weights
    assert chosen["matmul_int8"] == ("w8a8" if scheme == "w8a8" else "w8a16") and "matmul" not in chosen
    executables.close()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_decoder_over_pages_in_eight_bits_compiles_for_a_v5e(v5e, kv_cache_dtype):
    executables = programs(GRAPHS["plain"], v5e, kv_cache_dtype=kv_cache_dtype)
    program, chosen = compiled(executables, Key("forward", decode(8)))
    memory, state = program.memory_analysis(), planning.held(executables.state)
    assert chosen["attend"] == "visits", "JAX's kernel is for other pages"
    assert memory.alias_size_in_bytes >= state and memory.temp_size_in_bytes < state / 2, "pages are copied"
    executables.close()


@pytest.mark.parametrize("name", ["plain", "routed"])
def test_a_decoder_compiles_for_chips_that_share_it(libtpu, name):
    mesh = Mesh(np.array(tpu_topology("v5e:2x2")).reshape(2, 2)[0], ("model",))
    executables = programs(GRAPHS[name], mesh)
    program, chosen = compiled(executables, Key("forward", mixed(8, 128)))
    memory, hlo = program.memory_analysis(), program.as_text()
    weights, state = planning.held(executables.params), planning.held(executables.state)  # of each chip
    assert chosen["attend"] == "ragged" and chosen.get("routed_ffn", "grouped") == "grouped"
    assert executables.place.shards("heads") == executables.place.shards("vocab") == 2
    assert memory.alias_size_in_bytes == state and memory.temp_size_in_bytes < 2**22
    assert weights + state < memory.argument_size_in_bytes < 1.02 * (weights + state)
    assert "all-reduce" in hlo and 0 < seconds(program) < 1e-3
    executables.close()


# --- ops ---

T, R, D, N, K, H, V, E, A = 16, 8, 256, 4, 2, 128, 512, 4, 2


def S(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


ints, halves = partial(S, dtype="int32"), partial(S, dtype="bfloat16")
RUN = Run(ints(T), ints(R + 1), ints(R), ints(R), {"g": ints(R, 4)}, T, 0)
PAGES = Interleaved(halves(32, 64, 2 * K, H))
Q, KV = S(T, N, H), S(T, K, H)
small = lambda format, *stack: blank(format, (*stack, 2 * D, D), jnp.dtype("bfloat16"))
CALLS = {  # op -> its arrays, and what is no array
    "attend": ((Q, KV, KV, PAGES, RUN), {"group": "g", "scale": 0.1}),
    "attend_rows": ((Q, Q, Q, RUN), {"scale": 0.1}),
    "copy": ((PAGES, ints(8), ints(8)), {}),
    "gated": ((S(T, D), halves(2 * D, D)), {"activation": jax.nn.silu}),
    "layer_norm": ((S(T, D), S(D), S(D)), {"eps": 1e-5}),
    "logprobs": ((S(R, V), ints(R)), {}),
    "matmul": ((S(T, D), halves(2 * D, D)), {}),
    "matmul_fp8": ((S(T, D), small(FP8)), {}),
    "matmul_int4": ((S(T, D), small(INT4)), {}),
    "matmul_int8": ((S(T, D), small(INT8)), {}),
    "project": ((S(T, D), halves(2 * D, D)), {}),
    "rms_norm": ((S(T, D), S(D)), {"eps": 1e-5}),
    "rope": ((Q, S(T, H), S(T, H)), {}),
    **{f"routed_ffn {format.name}": (
        (S(T, D), ints(T, A), S(T, A), small(format, E), blank(format, (E, D, D), jnp.dtype("bfloat16"))),
        {"activation": jax.nn.silu}) for format in (INT8, INT4, FP8)},
    "routed_ffn": ((S(T, D), ints(T, A), S(T, A), halves(E, 2 * D, D), halves(E, D, D)), {"activation": jax.nn.silu}),
    "sum_by_row": ((S(T, D), ints(T), S(R, T, dtype="bool")), {}),
    "truncate": ((S(R, V), ints(R), S(R)), {}),
    "write": ((PAGES, KV, KV, RUN), {"group": "g"}),
}


def test_no_op_is_forgotten():
    ours = {name for name, op in OPS.items() if op.reference.__module__.startswith("jaxinfer.kernels.")}
    assert ours == {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_of_an_op_compiles_for_every_chip(chip, name):
    (arrays, options), op = CALLS[name], OPS[name.split()[0]]
    here = jax.tree.map(lambda x: S(*x.shape, dtype=x.dtype).update(sharding=SingleDeviceSharding(chip)), arrays)
    nbytes = planning.held(arrays)
    for how in filter(lambda how: op.takes(how, *arrays, **options), op.available("tpu")):
        with kernels.tracing("tpu", kind=chip.device_kind), compiling_for(chip, None):
            program = jax.jit(partial(op, how=how, **options)).lower(*here).compile()
        memory = program.memory_analysis()
        assert memory.argument_size_in_bytes >= nbytes / 2, how  # what is not read is left out
        assert memory.temp_size_in_bytes < 2**24 and 0 <= seconds(program) < 1e-3, how


# --- what is stored ---


def test_a_program_is_stored_under_the_name_that_the_chip_will_ask_for(libtpu, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    monkeypatch.setenv("JAXINFER_CACHE_GB", "1")
    path = str(tiny.write(tmp_path / "tiny", tiny.PLAIN))
    ahead = _for_device(path, tpu_topology("v5e:1x1")[0], None, memory="1GiB", max_rows=8, max_context=128)
    asking = Executables(ahead.graph, ahead.ladder, params=ahead.params, state=ahead.state, max_rows=8,
                         max_context=128, table_width=ahead.table_width, device=tpu_topology("v5e:1x1")[0])
    asked = [executables._stored_as(Key("copy")) for executables in (ahead, asking)]
    ahead.compile_all(Key("copy"))
    ahead.close()
    asking.close()
    assert asked[0] == asked[1] and [item.name for item in store().items()] == asked[:1]
