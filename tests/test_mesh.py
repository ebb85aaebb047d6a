"""Many devices: the same tokens as on one, every device with its piece, nothing moved that need not be.

The tests marked `eight` want eight devices; elsewhere this file runs itself again with eight virtual ones.
"""

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.compiler import Executables, Key, default_ladder
from jaxinfer.compiler.buckets import decode
from jaxinfer.compiler.placement import Placement, interleaved, over_leaves, spread
from jaxinfer.errors import Closed, InvalidOption
from jaxinfer.frontend.architectures import architecture
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.files import File
from jaxinfer.frontend.folder import FORMATS
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Leaf, Run
from jaxinfer.kernels import tracing
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.convert import convert
from tests import tiny
from tests.running import IN_HASTE, all_free, eventually

EIGHT = len(jax.devices()) >= 8
eight = pytest.mark.skipif(not EIGHT, reason="runs inside test_on_eight_devices")
GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
ROUTED = {**tiny.ROUTED, "moe_intermediate_size": 256}  # two of what int4 packs together
EXPERTS = {key: tiny.ROUTED[key] for key in ("model_type", "architectures", "num_experts", "num_experts_per_tok",
                                              "moe_intermediate_size")}
WIDE = {**tiny.PLAIN, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": False}
PROMPTS = ["The sky is blue because", "Once upon a time", "x", [(3 + 7 * i) % 320 for i in range(90)]]
HOW = dict(max_tokens=12, ignore_eos=True)
PENALISED = dict(temperature=0.9, seed=5, repetition_penalty=1.3, logprobs=1, **HOW)
load = partial(ji.load, max_context=128, max_rows=2, batch_invariant=True)  # one bucket: little to compile


@pytest.mark.skipif(EIGHT, reason="they are here")
def test_on_eight_devices():
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
           **IN_HASTE}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


@eight
@pytest.mark.parametrize("mesh", [{"model": 2}, {"data": 2}], ids=str)
def test_pages_leave_a_mesh_and_come_back(mesh, tiny_path):
    prompts = [np.random.default_rng(i).integers(4, 320, 100).tolist() for i in range(4)]  # the device holds two pages
    with load(tiny_path, max_rows=1, mesh=mesh, prefix_host_memory="4MiB") as lm:
        lowers = [shard.engine.scheduler.tree.lower for shard in lm._front.shards]
        for shard in lm._front.shards:
            shard.engine.executables.compile_all(*shard.engine.executables.moving)
        first = [lm(prompt, **HOW) for prompt in prompts]
        for lower in lowers:
            lower.costs.token = 1.0
        again = [lm(prompt, **HOW) for prompt in prompts]
        assert [output.tokens for output in again] == [output.tokens for output in first]
        assert [output.reused for output in again] == [64] * 4
        assert lm.prefix_tiers.host.hits == sum(lower.returned for lower in lowers) > 0
        assert lm.prefix_tiers.host.pages == sum(lower.sizes["host"]["full"] for lower in lowers) == 128


# --- what cannot be had ---


@pytest.mark.parametrize("mesh, message", [
    ({"rows": 2}, r"axis 'rows'; its axes are 'data' and 'model'"),
    ({"model": 0}, r"model=0; a size must be an integer >= 1"),
    ({"data": "2"}, r"data='2'; a size must be an integer >= 1"),
    (4, r"mesh is 4; it must be a dict of sizes"),
    ({"data": 8, "model": 64}, r"data=8 x model=64 = 512 devices; there are \d+ of kind cpu"),
])
def test_a_mesh_that_cannot_be_had_is_refused(tiny_path, mesh, message):
    with pytest.raises(InvalidOption, match=message):
        ji.load(tiny_path, mesh=mesh)


def test_a_mesh_takes_devices_by_their_kind(tiny_path):
    with pytest.raises(InvalidOption, match="it must be a kind of device"):
        ji.load(tiny_path, mesh={"model": 1}, device="cpu:0")


# --- what is read ---


@eight
@pytest.mark.parametrize("config, quantize", [(tiny.PLAIN, None), (tiny.PLAIN, "int8"), (tiny.ROUTED, None),
                                               (tiny.ROUTED, "int8"), (ROUTED, "int4")],
                         ids=["plain", "int8", "with experts", "with experts in int8", "with experts in int4"])
@pytest.mark.parametrize("form", ["as it was", *FORMATS])
def test_every_device_s_piece_is_read_alone_and_the_weights_are_those_of_one_device(
        tmp_path, monkeypatch, form, config, quantize):
    if form == "huggingface" and quantize is not None:
        pytest.skip("it holds floats")
    source = tiny.write(tmp_path / "model", config)
    if form != "as it was":
        source = convert(source, tmp_path / form, to=form, quantize=quantize)
    checkpoint = open_checkpoint(source)
    graph, counts, read = architecture(checkpoint.config).graph(), [], File.read

    def counted(self, tensor, pieces):
        pieces = list(pieces)
        counts.extend(len(out) for _, out in pieces)
        read(self, tensor, pieces)

    monkeypatch.setattr(File, "read", counted)
    how = dict(dtype="float32", source="here", quantize=quantize, saved=checkpoint.saved)
    place = on(2, graph, quantize)
    found = load_params(graph, checkpoint.tensors, put=place.put, **how)
    if form != "orbax":  # where a weight that is cut into columns is quantised, its rows are read whole, and once too
        scales = [checkpoint.tensors[name.replace(".values", ".scale")] for name, tensor in checkpoint.tensors.items()
                  if name.endswith("gate_up.values") and len(tensor.shape) == 3]
        twice = sum(scale.nbytes for scale in scales if len(scale.shape) == 2)  # of a stack in int8: rows to their end
        assert sum(counts) == sum(tensor.nbytes for tensor in checkpoint.tensors.values()) + twice
        pieces = 1 if config is ROUTED and form == "as it was" else 2  # the largest of that one are cut into columns
        assert max(counts) <= max(tensor.nbytes for tensor in checkpoint.tensors.values()) / pieces
    wanted = load_params(graph, checkpoint.tensors, **how)
    for x, y in zip(jax.tree.leaves(over_leaves(place.restore, graph.spec, found)), jax.tree.leaves(wanted),
                    strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- where things lie ---


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_shard_has_its_piece_of_every_part(shards):
    parts = (16, 8, 8)
    rows = np.concatenate([np.full(size, part) * 100 + np.arange(size) for part, size in enumerate(parts)])
    for s, piece in enumerate(np.split(rows[interleaved(parts, shards)], shards)):
        wanted = [np.split(rows[rows // 100 == part], shards)[s] for part in range(3)]
        np.testing.assert_array_equal(piece, np.concatenate(wanted))


def on(count: int, graph, quantize: str | None = None) -> Placement:
    return spread(graph, Mesh(np.array(jax.devices()[:count]), ("model",)), quantize)


def executables(graph, place: Placement) -> Executables:
    dtype = jnp.dtype("float32")
    groups = planning.page_groups(graph, dtype=dtype, max_context=128, max_rows=4, chunk=128, budget=1 << 28,
                                  why="", place=place)
    return Executables(graph, default_ladder(4, 128, chunks=1), params=planning.abstract_params(graph, dtype),
                       max_rows=4, max_context=128, device=place, state=planning.abstract_state(graph, groups, dtype),
                       table_width={g.name: 2 for g in groups})


def random_params(graph):
    rng = np.random.default_rng(0)
    draw = lambda leaf: (rng.normal(size=leaf.shape) / leaf.shape[-1] ** 0.5 * 2).astype(np.float32)
    return jax.tree.map(draw, graph.spec, is_leaf=lambda x: isinstance(x, Leaf))


def logits(graph, place: Placement, params) -> np.ndarray:
    """Of two decode rows, after a first token each."""
    found = executables(graph, place)
    step, state = found.get(Key("forward", decode(4))), found.empty("state")
    tables = {g.name: np.array([[0, 0], [1, 1], [0, 0], [0, 0]], np.int32) for g in graph.groups}
    for length in (1, 2):
        run = Run(np.array([5, 7, 0, 0], np.int32) + length, np.array([0, 1, 2, 2, 2], np.int32),
                  np.array([length, length, 0, 0], np.int32), np.arange(4, dtype=np.int32), tables, 1, 4)
        state, logits_RV = step(over_leaves(place.put, graph.spec, params), state, np.zeros(4, np.int32), run)
    found.close()
    return np.asarray(logits_RV)[:2]


@eight
@pytest.mark.parametrize("config", [tiny.WINDOWED, GPT2, tiny.ROUTED], ids=["biased", "gpt2", "with experts"])
def test_logits_are_those_of_one_device(config):
    graph = architecture(config, max_context=128).graph()
    params, one = random_params(graph), Placement(jax.devices()[0])
    expected, place = logits(graph, one, params), on(2, graph)
    assert dict(place.axes) == dict.fromkeys(("heads", "ffn", "vocab"), "model"), place
    np.testing.assert_allclose(logits(graph, place, params), expected, atol=1e-4)
    stored = over_leaves(place.put, graph.spec, params)
    jax.tree.map(np.testing.assert_array_equal, over_leaves(place.restore, graph.spec, stored), params)


def collectives(found: Executables, key: Key) -> Counter:
    """What the optimised program of `key` exchanges: the operation and its result's type."""
    with tracing("cpu", {}, found.place.mesh, found.place.axes):
        text = found.lower(key).compile().as_text()
    kinds = "all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter"
    return Counter(f"{kind} {shape}" for shape, kind in re.findall(rf"= (\w+\[[\d,]*\])\S* ({kinds})", text))


@eight
@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["plain", "with experts"])
def test_a_decode_step_has_two_sums_per_layer_and_gathers_neither_weights_nor_pages(experts):
    graph = architecture({**WIDE, **experts}, max_context=128).graph()
    found = executables(graph, on(8, graph))
    sums = {f"all-reduce f32[4,{WIDE['hidden_size']}]": 2 * len(graph.blocks) + 1}  # and one for the embedding
    assert collectives(found, Key("forward", decode(4))) == sums
    drawing = {**sums, f"all-gather f32[4,{graph.vocab}]": 1}  # whoever draws wants the logits, and no more
    assert collectives(found, Key("steps", decode(4, 8))) == drawing
    found.close()


# --- the engine ---


def answers(lm):
    tokens = [output.tokens for output in lm.generate(PROMPTS, **HOW)]
    return tokens, lm("x", temperature=0.9, seed=3, top_p=0.9, **HOW).tokens


@pytest.fixture(scope="module")
def alone(tiny_path):
    """What one device answers, and its weights."""
    with load(tiny_path) as lm:
        yield answers(lm), lm.params, lm("x", **PENALISED).tokens


@eight
@pytest.mark.parametrize("mesh", [{"model": 2}, {"model": 4}, {"data": 2}, {"data": 2, "model": 2}], ids=str)
def test_the_tokens_are_those_of_one_device(tiny_path, alone, mesh):
    with load(tiny_path, mesh=mesh) as lm:
        assert answers(lm) == alone[0]
        assert eventually(lambda: all_free(lm))
        jax.tree.map(np.testing.assert_array_equal, lm.params, alone[1])


@eight
@pytest.mark.parametrize("how", [{}, {"quantize": "int8"}, {"quantize": "int4"}], ids=["float32", "int8", "int4"])
def test_so_are_they_where_experts_are_shared(tmp_path, how):
    path = tiny.write(tmp_path, ROUTED)
    with load(path, **how) as one, load(path, mesh={"model": 2}, **how) as lm:
        assert answers(lm) == answers(one)
        jax.tree.map(np.testing.assert_array_equal, lm.params, one.params)
        layer = lm._stored["blocks"][1]
        numbers = [x.values if how else x for x in (layer["gate_up"], layer["down"])]
        shares = {shard.data.size * 2 == x.size for x in numbers for shard in x.addressable_shards}
        assert shares == {True}, "a device has more than its half of the experts"


def test_experts_that_int4_packs_across_a_cut_are_whole_on_each_device():
    """192 columns are packed 64 together: three of these have no half, and 192 columns have."""
    graph = architecture({**tiny.ROUTED, "moe_intermediate_size": 192}, max_context=128).graph()
    pair = AbstractMesh((2,), ("model",), axis_types=(AxisType.Auto,))
    assert "3 times 64 columns, which int4 packs" in spread(graph, pair, "int4").replicated["ffn"]
    assert not spread(graph, pair, "int8").replicated and not spread(graph, pair).replicated


@eight
def test_so_are_they_over_pages_in_int8(tiny_path):
    small = partial(load, tiny_path, kv_cache_dtype="int8")
    with small() as one, small(mesh={"model": 2}) as lm:
        assert answers(lm) == answers(one)
        (page,) = {(x.shape[1], shard.data.shape[1]) for x in jax.tree.leaves(lm._engine.state)
                   for shard in x.addressable_shards}
        assert page == (2, 1), "a device has the numbers or the scales of a head that is not its own"


@eight
def test_so_are_they_where_each_step_has_its_own_bucket(tiny_path, alone):
    with load(tiny_path, mesh={"model": 2}, batch_invariant=False) as lm:
        assert lm(PROMPTS[0], **HOW).tokens == alone[0][0][0]
        assert lm("x", **PENALISED).tokens == alone[2]


@eight
def test_an_axis_that_does_not_divide_is_replicated_and_reported(tiny_path):
    seen = []
    with events.observe(seen.append), load(tiny_path, mesh={"model": 4}) as lm:
        (place,) = lm.placements
    (told,) = (event for event in seen if isinstance(event, events.Replicated))
    assert told == events.Replicated("heads", "2 key-value heads cannot be divided by model=4")
    assert dict(place.axes) == {"ffn": "model", "vocab": "model"} and place.replicated == {"heads": told.why}
    assert "heads replicated: 2 key-value heads" in str(place)


@eight
def test_a_device_holds_its_share_of_weights_and_pages(tiny_path):
    held = {}
    for mesh in ({"model": 1}, {"model": 2}):
        with load(tiny_path, mesh=mesh, memory="64MiB") as lm:
            sizes = [{shard.device: shard.data.nbytes for shard in x.addressable_shards}
                     for x in jax.tree.leaves((lm._stored, lm._engine.state))]
            held[mesh["model"]] = max(sum(size.get(d, 0) for size in sizes) for d in jax.devices())
    assert held[2] < 0.51 * held[1]


@eight
@pytest.mark.parametrize("mesh", [{"model": 2}, {"data": 2}], ids=str)
def test_weights_are_swapped_on_all_devices(tiny_path, alone, mesh):
    with load(tiny_path, mesh=mesh) as lm:
        other = jax.tree.map(lambda x: x[::-1] * 1.01 if x.ndim == 1 else x, lm.params)
        assert lm.swap(other) == 2
        changed = lm.generate(PROMPTS, **HOW)
        assert {output.version for output in changed} == {2} and [o.tokens for o in changed] != alone[0][0]
        assert lm.swap(alone[1]) == 3
        assert answers(lm) == alone[0]


@pytest.fixture
def pair(tiny_path):
    with load(tiny_path, mesh={"data": 2}) as lm:
        yield lm


@eight
def test_shards_share_the_requests(pair):
    outputs = pair.generate(["x"] * 8, **HOW)
    assert len({output.tokens for output in outputs}) == 1
    steps = [shard.engine.scheduler.steps for shard in pair._front.shards]
    assert min(steps) >= 12 and pair.stats.steps == sum(steps), steps
    assert {entry.name[-6:] for entry in pair.ledger} == {"data=0", "data=1"}


@eight
def test_a_prompt_goes_where_its_beginning_was_read(pair):
    long = [(3 + 7 * i) % 320 for i in range(90)]
    for i in range(4):
        assert (pair([*long, i], max_tokens=2).reused > 0) == (i > 0)
        pair("x", max_tokens=1)


@eight
def test_requests_of_any_shard_are_cancelled_drained_and_closed(tiny_path):
    lm = load(tiny_path, mesh={"data": 2})
    running = [lm.submit("x", max_tokens=100, ignore_eos=True) for _ in range(4)]
    for answer in running:
        next(iter(answer))
        answer.cancel()
    assert eventually(lambda: lm.stats.running == lm.stats.waiting == 0)
    assert eventually(lambda: lm.stats.pages_free + lm.stats.pages_kept == lm.stats.pages)
    late = [lm.submit("x", **HOW) for _ in range(6)]
    drainer = threading.Thread(target=lm.drain)
    drainer.start()
    assert [len(answer.result(60).tokens) for answer in late] == [12] * 6
    drainer.join(60)
    with pytest.raises(Closed):
        lm("x")
    lm.close()
