"""The step compiles for a TPU that is not there: libtpu, a topology description, and abstract shapes."""

import os

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.compiler import Executables, Key, default_ladder
from jaxinfer.compiler.buckets import decode, mixed, prompt
from jaxinfer.compiler.encoders import Encoders, encoder_ladder
from jaxinfer.frontend.architectures import architecture
from jaxinfer.kernels import tracing
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime import memory as planning
from tests import tiny

pytestmark = pytest.mark.tpu
SMOLLM2 = {**tiny.PLAIN, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
           "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 30}


@pytest.fixture(scope="module")
def v5e():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxinfer[tpu]'")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_enable_compilation_cache", False)  # it would look for a client of this platform
    one = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    yield one.devices[0]
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("config", [tiny.PLAIN, tiny.WINDOWED, tiny.ROUTED, SMOLLM2],
                         ids=["plain", "windowed", "routed", "smollm2"])
def test_prompt_decode_and_sample_steps_compile_for_a_v5e(v5e, config):
    graph, dtype = architecture(config, max_context=1024).graph(), jnp.dtype(jnp.bfloat16)
    size = dict(dtype=dtype, max_context=1024, max_rows=8, chunk=512, budget=16 << 30, why="HBM")
    groups = planning.page_groups(graph, **size)
    executables = Executables(
        graph, default_ladder(8, 1024, chunks=1),
        params=planning.abstract_params(graph, dtype), max_rows=8, max_context=1024, device=v5e,
        state=planning.abstract_state(graph, groups, dtype), table_width={g.name: 16 for g in groups},
    )
    decoding = Key("forward", decode(8))
    keys = (decoding, Key("forward", prompt(128)), Key("forward", mixed(8, 128)), Key("sample", 8))
    if config is tiny.PLAIN:  # what every step may be followed by, and what prompts may be read for
        keys += (Key("greedy", 8), Key("edited", 8), Key("logprobs", 8), Key("copy"), Key("history"),
                 Key("steps", decode(8, 8)), Key("score", prompt(128)), Key("embed", prompt(128)))
    compiled = {key: executables.lower(key).compile() for key in keys}
    for key, program in compiled.items():
        assert program.memory_analysis().temp_size_in_bytes < 2**30, key
    memory = compiled[decoding].memory_analysis()
    assert compiled[decoding].cost_analysis()["flops"] > 0
    assert memory.argument_size_in_bytes > planning.nbytes(graph.spec, dtype)
    assert memory.alias_size_in_bytes > 0, "the pages are not donated"
    executables.close()


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4", "fp8"])
def test_a_quantised_decoder_compiles_for_a_v5e(v5e, scheme):
    graph, dtype = architecture(tiny.PLAIN, max_context=256).graph(), jnp.dtype(jnp.bfloat16)
    size = dict(dtype=dtype, max_context=256, max_rows=8, chunk=128, budget=16 << 30, why="HBM")
    groups = planning.page_groups(graph, quantize=scheme, **size)
    executables = Executables(
        graph, default_ladder(8, 256, chunks=1), params=planning.abstract_params(graph, dtype, scheme), max_rows=8,
        max_context=256, device=v5e, state=planning.abstract_state(graph, groups, dtype),
        table_width={g.name: 4 for g in groups}, platform="tpu",
    )
    with tracing("tpu", FORCED.get(scheme)) as trace:
        program = executables.lower(Key("forward", decode(8))).compile()
    assert program.memory_analysis().argument_size_in_bytes > planning.nbytes(graph.spec, dtype, scheme)
    assert trace.chosen["matmul_int8"] == ("w8a8" if scheme == "w8a8" else "w8a16") and "matmul" not in trace.chosen
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
