"""Models larger than their budget: the same tokens, never more bytes than were given, and layers that come while
others compute."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer.compiler import Key, default_ladder, invariant_ladder
from jaxinfer.compiler.buckets import decode
from jaxinfer.errors import InvalidOption, OutOfMemory, StepFailed, UnsupportedModel
from jaxinfer.frontend.architectures import architecture
from jaxinfer.graph import Block, Graph, Leaf
from jaxinfer.kernels import tracing
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.record import Record, Spill
from jaxinfer.runtime.ring import Ring
from jaxinfer.runtime.tiers import STAGES, Tiers, plan_tiers, streaming
from tests import tiny
from tests.likely import PROMPTS
from tests.running import IN_HASTE, all_free, eventually

pytestmark = pytest.mark.usefixtures("in_haste")

DEEP = {**tiny.PLAIN, "hidden_size": 256, "intermediate_size": 1024, "num_key_value_heads": 1,
        "num_hidden_layers": 12}  # of few pages
LONE = dict(max_context=64, max_rows=1, batch_invariant=True)
HOW = tiny.ONE_BUCKET
TOKENS = dict(max_tokens=12, ignore_eos=True)


def needs(config: dict, *, dtype="float32", quantize=None, kv_cache_dtype=None, max_context, max_rows,
          batch_invariant=False):
    """What plan_tiers takes for a config that is loaded so: its graph, the shapes of its weights, what it needs, and
    the tokens of the largest step."""
    graph = architecture(config, max_context=max_context).graph()
    ladder = (invariant_ladder if batch_invariant else partial(default_ladder, chunks=1))(max_rows, max_context)
    with tracing("cpu"):
        need = planning.needs(graph, dtype=jnp.dtype(dtype), quantize=quantize, chunk=ladder.chunk,
                              max_context=max_context, max_rows=max_rows, kv_cache_dtype=kv_cache_dtype)
    return graph, planning.abstract_params(graph, jnp.dtype(dtype), quantize), need, ladder.budget


def tight(config: dict, **how) -> int:
    """The smallest budget for a model, and no byte more."""
    return sum(streaming(*needs(config, **how)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The path of a config's checkpoint, written once."""
    @cache
    def path(text: str) -> Path:
        return tiny.write(tmp_path_factory.mktemp("tiers"), json.loads(text))

    return lambda config: path(json.dumps(config))


# --- the same tokens ---

THREE = {**tiny.PLAIN, "num_hidden_layers": 3}
WIDER = {**THREE, "hidden_size": 128, "intermediate_size": 1024}
MODELS = {
    "windowed": (tiny.WINDOWED, {}),
    "routed": ({**tiny.ROUTED, "num_hidden_layers": 3}, {}),
    "gpt2": ({**tiny.GPT2, "n_layer": 3}, {}),
    "int4": (WIDER, {"quantize": "int4"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_model_gives_the_same_tokens(written, name):
    config, options = MODELS[name]
    path, how = written(config), {**HOW, **options}
    with ji.load(path, **how) as lm:
        expected = [output.tokens for output in lm.generate(PROMPTS, **TOKENS)]
    with ji.load(path, **how, device_memory=tight(config, **how)) as lm:
        assert lm.tiers.on_disk == lm.tiers.streamed == (0, 1, 2), "a layer stayed"
        assert [output.tokens for output in lm.generate(PROMPTS, **TOKENS)] == expected
        assert lm.nbytes <= tight(config, **how) and lm._ring.peak <= lm.tiers.device and all_free(lm)


def test_steps_of_every_shape_and_what_reads_a_prompt_for_its_own_sake_are_streamed(written):
    def found(lm):
        outputs = lm.generate([[3, 5, 7], [9]], [ji.Sampling(max_tokens=n, ignore_eos=True) for n in (6, 12)])
        return [output.tokens for output in outputs], lm.score([[3, 5, 7]])[0].perplexity, lm.embed([[3, 5]])

    path, how = written(WIDER), dict(max_context=64, max_rows=2)
    two_rows = tight(WIDER, **how) + needs(WIDER, **how)[2].row
    with ji.load(path, **HOW) as lm:
        tokens, perplexity, vector = found(lm)
    with ji.load(path, **how, device_memory=two_rows) as lm:
        assert lm.tiers.streamed == (0, 1, 2), "a layer stayed"
        programs = lm._engine.executables
        decodes = [part for rows in (1, 2) for part in programs.parts(Key("forward", decode(rows)))]
        programs.compile_all(*decodes, Key("greedy", 1), Key("greedy", 2))
        streamed = found(lm)
        used = {entry.name.split("[")[1] for entry in lm.ledger if entry.hits and "T=" in entry.name}
    assert {"T=32,R=1]", "T=2,R=2]", "T=1,R=1]"} <= used
    assert streamed[0] == tokens
    np.testing.assert_allclose(streamed[1], perplexity, rtol=1e-4)
    np.testing.assert_allclose(streamed[2], vector, atol=1e-4)


@pytest.fixture(scope="module")
def deep(written):
    """A model of twelve layers in float32, 40 MB, and what it answers unstreamed."""
    path = written(DEEP)
    with ji.load(path, **LONE) as lm:
        return path, lm(PROMPTS[0], **TOKENS).tokens


def test_a_model_four_times_larger_than_its_budget_runs(deep):
    path, expected = deep
    budget = tight(DEEP, **LONE)
    assert planning.nbytes(needs(DEEP, **LONE)[0].spec, jnp.float32) >= 4 * budget
    with ji.load(path, **LONE, device_memory=budget) as lm:
        assert lm(PROMPTS[0], **TOKENS).tokens == expected
        assert lm.nbytes <= budget and lm._ring.peak <= lm.tiers.device
        assert lm.tiers.layers == 12 == len(lm.tiers.streamed) and lm.tiers.disk == lm.tiers.swept


@settings(max_examples=settings.default.max_examples // 4)
@given(st.data())
def test_any_budgets_give_the_same_tokens_and_are_kept(deep, data):
    path, expected = deep
    _, params, need, _ = needs(DEEP, **LONE)
    least = tight(DEEP, **LONE)
    device = data.draw(st.integers(least, need.least - 1), "device_memory")
    host = data.draw(st.integers(1, need.weights), "host_memory")
    with ji.load(path, **LONE, device_memory=device, host_memory=host) as lm:
        tiers = lm.tiers
        assert lm(PROMPTS[0], **TOKENS).tokens == expected
        assert lm.nbytes <= device and lm._ring.peak <= tiers.device and tiers.host <= host
        held = planning.held(params)
        assert held <= tiers.device + tiers.host + tiers.disk <= held + tiers.slots * tiers.largest


# --- a ring, without a model ---


def layered(sizes: list[int]) -> Graph:
    """A graph whose layers have one weight each, of such a size."""
    spec = {"blocks": [{"w": Leaf((size,), (None,), f"layer.{i}")} for i, size in enumerate(sizes)]}
    blocks = tuple(Block("block", "all", lambda *_: None) for _ in sizes)
    return Graph("layered", spec, (), lambda *_: None, blocks, lambda *_: None, 1, 1)


class Apart(Ring):
    """As for a device with a memory of its own, which a CPU has not: what is put there is a copy."""

    def _to_device(self, weights):
        return super()._to_device(jax.tree.map(np.array, weights))


@given(st.data())
def test_a_ring_gives_every_layer_in_any_order_of_broken_sweeps(data):
    """Read from the disk or held on the host, copied or lying where the device computes."""
    sizes = data.draw(st.lists(st.integers(1, 3000), min_size=3, max_size=9), "sizes")
    passing = data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=2), "streamed")
    on_disk = data.draw(st.sets(st.sampled_from(sorted(passing))), "on disk")
    aliased, slots = data.draw(st.booleans(), "aliased"), data.draw(st.integers(2, 3), "slots")
    graph, device = layered(sizes), jax.devices()[0]
    shapes = [{"w": jax.ShapeDtypeStruct((size,), np.float32)} for size in sizes]
    records = {i: Record.of(shapes[i]) for i in sorted(passing)}
    stays = sum(4 * size for i, size in enumerate(sizes) if i not in passing)
    largest = max(record.size for record in records.values())
    tiers = Tiers(stays + slots * largest, 0, 0, len(sizes), slots, 0 if aliased else STAGES, tuple(records),
                  tuple(sorted(on_disk)), records)
    ring = (Ring if aliased else Apart)(graph, tiers, device, aliased)
    try:
        fill = lambda leaf, i: np.full(leaf.shape, i + 0.5, np.float32)
        put = lambda i, layer: jax.tree.map(lambda leaf: ring.put(leaf, fill(leaf, i)), layer)
        ring.start({}, [put(i, layer) for i, layer in enumerate(graph.spec["blocks"])])
        add = jax.jit(lambda x, w: x + w.sum())
        for _ in range(data.draw(st.integers(1, 4), "sweeps")):
            until = data.draw(st.integers(1, len(sizes)), "until")
            x = jnp.float32(0)
            for i in range(until):
                weights = ring.take(i)
                x = add(x, weights["w"])
                if i < until - 1 or until == len(sizes):
                    ring.give(i, x)
            np.testing.assert_allclose(x, sum((i + 0.5) * size for i, size in enumerate(sizes[:until])), rtol=1e-5)
        assert ring.peak <= tiers.device
    finally:
        ring.close()


def test_layers_that_share_a_weight_are_not_streamed():
    graph = layered([4, 4, 4])
    graph.spec["blocks"][2] = graph.spec["blocks"][0]
    records = {i: Record.of({"w": jax.ShapeDtypeStruct((4,), np.float32)}) for i in range(3)}
    with pytest.raises(UnsupportedModel, match=r"layer 2 has the weight layer\.0 of an earlier one"):
        Ring(graph, Tiers(0, 0, 0, 3, 2, 0, (0, 1, 2), (), records), jax.devices()[0], True)


# --- what is planned ---


@given(layers=st.integers(3, 40), share=st.floats(0, 1), host=st.floats(0, 1), aliased=st.booleans())
def test_a_plan_adds_up_and_uses_what_it_is_given(layers, share, host, aliased):
    graph, params, need, tokens = needs({**DEEP, "num_hidden_layers": layers}, **LONE)
    least, largest = streaming(graph, params, need, tokens), Record.of(params["blocks"][0]).size
    budget = sum(least) + int(share * (need.least - 1 - sum(least)))
    room = int(host * need.weights) + STAGES * largest
    tiers, groups = plan_tiers(graph, params, need, max_rows=1, tokens=tokens, device_memory=budget, host_memory=room,
                               aliased=aliased)
    pages = sum(need.page[group.name] * group.pages for group in groups)
    assert tiers.device + least.temporaries + pages <= budget and tiers.host <= room
    assert set(tiers.on_disk) <= set(tiers.streamed) == set(tiers.records)
    gaps = np.diff([-1, *tiers.streamed])
    assert gaps.max() - gaps.min() <= 1, "layers that stay are to lie evenly between those that come"
    if tiers.slots == 3:
        assert budget - tiers.device - least.temporaries - pages < largest, "one more layer could have stayed"


# --- what is refused ---


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"device_memory": "lots"}, InvalidOption, "device_memory is 'lots'"),
    ({"device_memory": "1GiB", "host_memory": 0}, InvalidOption, "host_memory is 0"),
    ({"host_memory": "1GiB"}, InvalidOption, "give device_memory as well"),
    ({"device_memory": "1GiB", "memory": "1GiB"}, InvalidOption, "device_memory and memory are given"),
    ({"device_memory": "1GiB", "mesh": {"model": 1}}, InvalidOption, "device_memory and mesh are given"),
])
def test_options_that_make_no_sense_are_refused(tiny_path, options, error, message):
    with pytest.raises(error, match=message):
        ji.load(tiny_path, **options)


def test_a_budget_too_small_for_the_ring_is_refused_with_the_numbers_and_one_that_fits(written):
    with pytest.raises(OutOfMemory, match=r"MiB for 2 layers at a time.*nothing was loaded") as refused:
        ji.load(written(DEEP), **LONE, device_memory=tight(DEEP, **LONE) - 1)
    enough = str(refused.value).split("device_memory='")[1].split("'")[0]
    plan_tiers(*needs(DEEP, **LONE)[:3], tokens=needs(DEEP, **LONE)[3], max_rows=1, host_memory=0, aliased=True,
               device_memory=planning.parse_bytes(enough))


@pytest.mark.parametrize("share", [0.6, 0.5, 0.25])
def test_what_does_not_fit_is_refused_with_three_ways_that_do(written, share):
    """Each of them, tried."""
    how = dict(max_context=1024, max_rows=8)
    budget = int(share * needs(DEEP, **how)[2].least)
    with pytest.raises(OutOfMemory, match=r"weights.*temporaries.*pages of one context.*nothing was loaded") as refused:
        ji.load(written(DEEP), **how, memory=budget)
    largest, *others = str(refused.value).split("would fit with ")[1].split("; or with ")
    assert len(others) == 3 and needs(DEEP, **how)[2].least <= planning.parse_bytes(eval(f"dict({largest})")["memory"])
    for options in (eval(f"dict({text})") for text in others):
        asked = {**how, **options}
        streamed, pages = asked.pop("device_memory", None), asked.pop("kv_cache_dtype", None)
        graph, params, need, tokens = needs(DEEP, **asked, kv_cache_dtype=pages)
        assert (sum(streaming(graph, params, need, tokens)) if streamed else need.least) <= budget


def test_a_host_too_small_for_the_buffers_of_a_disk_is_refused():
    graph, params, need, tokens = needs(DEEP, **LONE)
    with pytest.raises(OutOfMemory, match=r"pass through 2 buffers.*host_memory is 1 MiB"):
        plan_tiers(graph, params, need, max_rows=1, tokens=tokens, device_memory=tight(DEEP, **LONE), host_memory=2**20,
                   aliased=False)


def test_streamed_weights_are_neither_had_nor_swapped(streamed):
    with pytest.raises(InvalidOption, match="the weights are streamed"):
        streamed.swap({})
    with pytest.raises(InvalidOption, match="the weights are streamed"):
        _ = streamed.params


# --- what goes wrong ---


@pytest.fixture
def streamed(deep):
    with ji.load(deep[0], **LONE, device_memory=tight(DEEP, **LONE)) as lm:
        yield lm


def test_a_step_that_breaks_off_in_the_middle_of_a_sweep_is_repeated(deep, streamed):
    ring, broken = streamed._ring, []

    def give(i, x_TD, before=ring.give):
        if i == 5 and not broken:
            broken.append(i)
            raise RuntimeError("a cosmic ray")
        before(i, x_TD)

    ring.give = give
    assert streamed(PROMPTS[0], **TOKENS).tokens == deep[1] and broken and all_free(streamed)


def test_a_file_that_ends_early_fails_the_requests_and_not_the_model(deep, streamed):
    spill = streamed._ring._spill
    assert streamed(PROMPTS[0], **TOKENS).tokens == deep[1]
    whole = os.pread(spill.file.fileno(), spill.nbytes, 0)
    os.ftruncate(spill.file.fileno(), spill.nbytes // 2)
    with pytest.raises(StepFailed, match=r"the file of streamed weights in .* ends within record"):
        streamed(PROMPTS[0], reuse=False, **TOKENS)
    os.pwrite(spill.file.fileno(), whole, 0)
    assert streamed(PROMPTS[0], reuse=False, **TOKENS).tokens == deep[1]


def test_a_full_disk_is_said_before_and_while_weights_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    record = Record.of([jax.ShapeDtypeStruct((2**58,), np.float32)])
    with pytest.raises(OutOfMemory, match=r"weights are to lie in .* are free; give host_memory"):
        Spill({0: record})
    spill = Spill({0: Record.of([jax.ShapeDtypeStruct((8,), np.float32)])})
    spill.file.close()
    with open("/dev/full", "r+b", buffering=0) as spill.file, pytest.raises(OutOfMemory, match="are to lie in"):
        spill.write(0, 0, np.zeros(8, np.float32))


def test_nothing_is_left_behind(deep, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    before = {thread.name for thread in threading.enumerate()}
    with ji.load(deep[0], **LONE, device_memory=tight(DEEP, **LONE)) as lm:
        answer = lm.submit(PROMPTS[0], max_tokens=50, ignore_eos=True)
        assert eventually(lambda: len(lm.timeline) > 3)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()], "the file has a name"
        lm.close()  # in the middle of a sweep
        assert answer.exception() is not None
    assert {thread.name for thread in threading.enumerate()} <= before


# --- what it takes ---


def test_a_timeline_shows_layers_that_come_while_others_compute(streamed, tmp_path):
    start = time.perf_counter()
    streamed(PROMPTS[0], **TOKENS)
    line = streamed.timeline.since(start)
    read, computed = ([span for span in line if span.what == what] for what in ("read", "compute"))
    assert {(before.layer + 1) % 12 == after.layer for before, after in itertools.pairwise(computed)} == {True}
    assert {span.nbytes for span in read} == {streamed.tiers.largest} and line.rate("read") > 0
    assert 0 < line.overlap <= 1
    for before, after in itertools.pairwise(computed):
        assert before.end <= after.start, "two layers cannot compute at a time"
    line.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len([event for event in events if event["ph"] == "X"]) == len(line)
    assert "<svg" in line._repr_html_() and "overlap" in repr(line)


RESIDENT = """
import gc, sys
import jaxinfer as ji
small, large, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
def resident(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
def answer(path):
    with ji.load(path, max_context=64, max_rows=1, batch_invariant=True, device_memory=budget) as lm:
        lm("abc", max_tokens=4, ignore_eos=True)
for _ in range(3):  # what was compiled and given back is there for the next
    answer(small)
    gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident("VmRSS")
answer(large)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures resident memory by Linux's /proc")
def test_resident_memory_does_not_grow_with_the_model(deep, written):
    """Everything that is the same for any model has been loaded and compiled for the small one."""
    large = {**DEEP, "num_hidden_layers": 72}
    budget = tight(large, **LONE)
    command = [sys.executable, "-c", RESIDENT, deep[0], written(large), str(budget)]
    env = {**os.environ, **IN_HASTE, "MALLOC_ARENA_MAX": "1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    weights, slack = planning.nbytes(needs(large, **LONE)[0].spec, jnp.float32), 10**8  # XLA compiles
    assert int(ran.stdout) < budget + slack < weights / 2
