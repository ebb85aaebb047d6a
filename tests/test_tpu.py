"""The step compiles for a TPU that is not there: libtpu, a topology description, and abstract shapes."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxinfer import kernels
from jaxinfer.compiler import Executables, Key, default_ladder
from jaxinfer.compiler.buckets import decode, mixed, prompt
from jaxinfer.compiler.encoders import Encoders, encoder_ladder
from jaxinfer.frontend.architectures import architecture
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime import memory as planning
from tests import tiny

pytestmark = pytest.mark.tpu
SMOLLM2 = {**tiny.PLAIN, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
           "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 30}


WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 512}  # as Pallas wants it
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 256, "n_head": 2, "n_layer": 2, "n_positions": 1024}
BANDWIDTH = {"v5e:1x1": 819e9, "v5p:2x2x1": 2765e9, "v6e:1x1": 1640e9}  # of a chip's HBM, bytes/s


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxinfer[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_enable_compilation_cache", False)  # it would look for a client of this platform
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def chip(topology: str) -> jax.Device:
    from jax.experimental import topologies

    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices[0]


@pytest.fixture(scope="module")
def v5e(libtpu):
    return chip("v5e:1x1")


def programs(config: dict, device: jax.Device, quantize: str | None = None,
             kv_cache_dtype: str | None = None) -> Executables:
    graph, dtype = architecture(config, max_context=1024).graph(), jnp.dtype(jnp.bfloat16)
    size = dict(dtype=dtype, max_context=1024, max_rows=8, chunk=512, budget=16 << 30, why="HBM")
    with kernels.tracing("tpu"):
        groups = planning.page_groups(graph, quantize=quantize, kv_cache_dtype=kv_cache_dtype, **size)
        state = planning.abstract_state(graph, groups, dtype, kv_cache_dtype)
    return Executables(
        graph, default_ladder(8, 1024, chunks=1), params=planning.abstract_params(graph, dtype, quantize), max_rows=8,
        max_context=1024, device=device, state=state, table_width={g.name: 16 for g in groups},
        forced=FORCED.get(quantize),
    )


def compiled(executables: Executables, device: jax.Device, key: Key):
    """The program, and the implementations it took. Pallas asks the mesh which TPU it is for."""
    with kernels.tracing("tpu", executables.forced) as traced, jax.set_mesh(Mesh(np.array([device]), ("x",))):
        return executables.lower(key).compile(), traced.chosen


@pytest.mark.parametrize("topology", BANDWIDTH)
def test_wide_heads_run_in_the_ragged_kernel_and_what_a_step_costs_is_as_planned(libtpu, topology):
    device = chip(topology)
    executables = programs({**tiny.PLAIN, **WIDE}, device)
    weights, state = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
                      for tree in (executables.params, executables.state))
    program, chosen = compiled(executables, device, Key("forward", mixed(8, 128)))
    memory = program.memory_analysis()
    assert chosen["attend"] == "ragged"
    assert memory.alias_size_in_bytes == state, "the pages are not donated, or not as large as planned"
    assert weights + state < memory.argument_size_in_bytes < 1.01 * (weights + state)
    assert memory.temp_size_in_bytes < 2**22, "pages or weights are copied"
    # The compiler's own estimate: a custom call that it cannot estimate counts as -1 s, and the kernel as nothing.
    seconds = program.cost_analysis()["optimal_seconds"] % 1
    assert weights / BANDWIDTH[topology] < seconds < 20 * (weights + state) / BANDWIDTH[topology]
    executables.close()


@pytest.mark.parametrize("config", [tiny.PLAIN, {**tiny.WINDOWED, **WIDE}, tiny.ROUTED, SMOLLM2],
                         ids=["plain", "windowed", "routed", "smollm2"])
def test_prompt_decode_and_sample_steps_compile_for_a_v5e(v5e, config):
    executables = programs(config, v5e)
    decoding = Key("forward", decode(8))
    keys = (decoding, Key("forward", prompt(128)), Key("forward", mixed(8, 128)), Key("sample", 8))
    if config is tiny.PLAIN:  # what every step may be followed by, and what prompts may be read for
        keys += (Key("greedy", 8), Key("edited", 8), Key("logprobs", 8), Key("copy"), Key("history"),
                 Key("steps", decode(8, 8)), Key("score", prompt(128)), Key("embed", prompt(128)))
    made = {key: compiled(executables, v5e, key) for key in keys}
    for key, (program, _) in made.items():
        assert program.memory_analysis().temp_size_in_bytes < 2**30, key
    program, chosen = made[decoding]
    memory = program.memory_analysis()
    assert chosen["attend"] == ("ragged" if config.get("head_dim") == 128 else "visits")
    assert program.cost_analysis()["flops"] > 0
    assert memory.argument_size_in_bytes > planning.nbytes(executables.graph.spec, jnp.bfloat16)
    assert memory.alias_size_in_bytes > 0, "the pages are not donated"
    executables.close()


def test_gpt2_compiles_for_a_v5e(v5e):
    executables = programs(GPT2, v5e)
    program, chosen = compiled(executables, v5e, Key("forward", decode(8)))
    assert chosen["attend"] == "ragged" and program.memory_analysis().temp_size_in_bytes < 2**22
    executables.close()


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4", "fp8"])
def test_a_quantised_decoder_compiles_for_a_v5e(v5e, scheme):
    executables = programs(tiny.PLAIN, v5e, scheme)
    program, chosen = compiled(executables, v5e, Key("forward", decode(8)))
    weights = planning.nbytes(executables.graph.spec, jnp.bfloat16, scheme)
    assert program.memory_analysis().argument_size_in_bytes > weights
    assert chosen["matmul_int8"] == ("w8a8" if scheme == "w8a8" else "w8a16") and "matmul" not in chosen
    executables.close()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_decoder_over_pages_in_eight_bits_compiles_for_a_v5e(v5e, kv_cache_dtype):
    executables = programs({**tiny.PLAIN, **WIDE}, v5e, kv_cache_dtype=kv_cache_dtype)
    program, chosen = compiled(executables, v5e, Key("forward", decode(8)))
    memory, state = program.memory_analysis(), planning.held(executables.state)
    assert chosen["attend"] == "visits", "JAX's kernel is for other pages"
    assert memory.alias_size_in_bytes >= state and memory.temp_size_in_bytes < state / 2, "pages are copied"
    executables.close()


def test_an_encoder_compiles_for_a_v5e(v5e):
    config = {"model_type": "bert", "vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4,
              "num_hidden_layers": 2, "intermediate_size": 256}
    encoder, dtype = architecture(config).graph(), jnp.dtype(jnp.bfloat16)
    programs = Encoders(encoder, planning.abstract_params(encoder, dtype), ("mean",), True, v5e)
    for bucket in encoder_ladder(128)[128][:2]:
        program = programs.lower(bucket).compile()
        assert program.cost_analysis()["flops"] > 0
        assert program.memory_analysis().argument_size_in_bytes > planning.nbytes(encoder.spec, dtype)
    programs.close()
