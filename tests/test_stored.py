"""A stored program is found by whoever would compile the same one, in any process, and by nobody else."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from typer.testing import CliRunner

import jaxinfer as ji
from jaxinfer import compiler, events, kernels
from jaxinfer.cli import app
from jaxinfer.compiler import Bucket, Executables, Key, fingerprint, stored
from jaxinfer.compiler.encoders import EncoderBucket, Encoders
from jaxinfer.compiler.fingerprint import Unknown
from jaxinfer.compiler.functions import FunctionKey, Functions, LeafLike
from jaxinfer.errors import CorruptFile, InvalidOption
from jaxinfer.frontend.architectures import architecture
from jaxinfer.runtime import ahead
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.ahead import compile_ahead
from jaxinfer.scheduler import PageGroup
from tests import test_text_encoder, tiny
from tests.running import IN_HASTE, eventually, seen_events
from tests.test_tiers import THREE, tight

CPU = jax.devices("cpu")[0]
LOAD = dict(max_context=64, max_rows=2, batch_invariant=True)  # one bucket: little to compile
ASKED = [dict(max_tokens=6, ignore_eos=True), dict(max_tokens=6, ignore_eos=True, temperature=0.9, seed=3, top_k=20)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that this test uses, as users do."""
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAXINFER_CACHE_GB", "1")
    return tmp_path / "cache" / "programs"


# --- the key: everything that can change a program, each by itself ---


def device(**changed):
    """A device as XLA describes one."""
    said = dict(platform="gpu", id=0, device_kind="NVIDIA H200", compute_capability="9.0", version="cuda 13000")
    said |= changed
    return SimpleNamespace(**said, client=SimpleNamespace(platform_version=said.pop("version")))


def key(program=(), platform="gpu", place=None, forced=None, of=None):
    return stored.key(program, platform, place or at(of or device()), forced or {})


def at(*devices, axes=(), mesh=None):
    return SimpleNamespace(device=devices[0], devices=devices, axes=dict(axes), mesh=mesh)


SURROUNDINGS = {
    "our source": lambda patch: patch.setattr(fingerprint, "package_source", lambda: "other"),
    "XLA's flags": lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
    "libtpu's flags": lambda patch: patch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_x=1"),
    "jax": lambda patch: patch.setattr(jax, "__version__", "0"),
    "jaxlib": lambda patch: patch.setattr(jaxlib.version, "__version__", "0"),
    "numpy": lambda patch: patch.setattr(np, "__version__", "0"),
    "Python": lambda patch: patch.setattr(sys.implementation, "cache_tag", "cpython-27"),
    "the driver": lambda patch: patch.setattr(stored, "_driver", lambda: "580.1"),
    "the libraries": lambda patch: patch.setattr(stored, "_libraries", lambda: ("nvidia-cudnn-cu13 9",)),
    "a kernel of the user's": lambda patch: patch.setitem(kernels.attend.fast, "mine", (("gpu",), elsewhere)),
}
SAID = {
    "the platform": dict(platform="tpu"), "an implementation that is forced": dict(forced={"attend": "by_page"}),
    "the kind of device": dict(of=device(device_kind="NVIDIA H100")), "which device": dict(of=device(id=1)),
    "what it can": dict(of=device(compute_capability="9.0a")), "its runtime": dict(of=device(version="cuda 13010")),
    "how many devices": dict(place=at(device(), device(id=1))),
    "the mesh": dict(place=at(device(), mesh=jax.sharding.Mesh(np.array([CPU]), "x"))),
    "what is cut": dict(place=at(device(), axes={"heads": "model"})),
    "the program": dict(program=(1,)),
}


def elsewhere(x):
    return x


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_the_key_changes_with(what, monkeypatch):
    before = key()
    assert key() == before
    SURROUNDINGS[what](monkeypatch)
    assert key() != before


@pytest.mark.parametrize("what", SAID)
def test_the_key_says(what):
    assert key(**SAID[what]) != key()


def test_the_key_changes_with_the_order_of_kernels():
    before, fast = key(), dict(kernels.attend.fast)
    assert len(fast) > 1
    try:
        kernels.attend.fast.clear()
        kernels.attend.fast.update(reversed(fast.items()))
        assert key() != before
    finally:
        kernels.attend.fast.clear()
        kernels.attend.fast.update(fast)
    assert key() == before


def test_the_key_of_a_cpu_changes_with_its_features_and_cores(monkeypatch):
    of = device(platform="cpu", device_kind="cpu")
    before = key(of=of)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "cpu_features", lambda: "avx9")
        assert key(of=of) != before
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: range(999), raising=False)
        assert key(of=of) != before
    assert key(of=of) == before


def test_the_key_changes_with_jaxs_options_but_not_with_where_it_keeps_its_cache():
    before = key()
    was = jax.config.jax_softmax_custom_jvp, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 123.0)
        assert key() == before
        jax.config.update("jax_softmax_custom_jvp", not was[0])
        assert key() != before
    finally:
        jax.config.update("jax_softmax_custom_jvp", was[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", was[1])


def executables(config=None, dtype="float32", quantize=None, pages=4, max_rows=2, max_context=64, width=1, place=None):
    model = architecture({**tiny.PLAIN, **(config or {})}).graph()
    ladder = compiler.invariant_ladder(2, 64)
    with kernels.tracing("cpu"):
        groups = tuple(PageGroup(g.name, planning.PAGE_SIZE, pages, g.window) for g in model.groups)
        state = planning.abstract_state(model, groups, jnp.dtype(dtype))
    return Executables(model, ladder, params=planning.abstract_params(model, jnp.dtype(dtype), quantize), state=state,
                       max_rows=max_rows, max_context=max_context, table_width={g.name: width for g in groups},
                       device=place or CPU)


def named(programs, key=None):
    name = programs._stored_as(key or KEYS[0])
    programs.close()
    return name


MODELS = {
    "the config": dict(config={"rms_norm_eps": 1e-6}), "the graph": dict(config={"model_type": "olmo2"}),
    "the dtype": dict(dtype="bfloat16"), "quantised weights": dict(quantize="int8"), "the pages": dict(pages=5),
    "the rows": dict(max_rows=3), "the context": dict(max_context=65), "the page table": dict(width=2),
    "the vocabulary": dict(config={"vocab_size": 384}), "one more layer": dict(config={"num_hidden_layers": 3}),
}
KEYS = [Key("forward", Bucket(1, 2, 2, 2)), Key("forward", Bucket(1, 2, 2, 1)), Key("forward", Bucket(2, 2, 2, 2)),
        Key("forward", Bucket(1, 2, 2, 2, 8)), Key("forward", Bucket(1, 3, 3, 3)), Key("score", Bucket(1, 2, 2, 2)),
        Key("greedy", 2), Key("sample", 2), Key("copy"), Key("zeros"), Key("history")]


@pytest.mark.parametrize("what", MODELS)
def test_a_language_models_programs_differ_with(what, cache):
    assert named(executables()) == named(executables()) != named(executables(**MODELS[what])) != None  # noqa: E711


def test_every_program_of_a_model_has_a_name_of_its_own(cache):
    assert len({named(executables(), key) for key in KEYS}) == len(KEYS)


def test_a_model_whose_graph_calls_other_code_is_another_one(cache):
    programs = executables()
    before = programs._stored_as(KEYS[0])
    for part in ("embed", "head", "final"):
        programs.graph = replace(architecture(tiny.PLAIN).graph(), **{part: elsewhere})
        assert programs._stored_as(KEYS[0]) not in (before, None), part
    programs.graph = replace(programs.graph, head=eval("lambda params, x_RD: x_RD", {"__name__": "a_notebook"}))
    with seen_events(events.NotStored) as seen:
        assert programs._stored_as(KEYS[0]) is None
    assert "a_notebook, which has no source file" in seen[0].why
    programs.close()


def test_a_users_logits_function_is_not_stored():
    programs = executables()
    with pytest.raises(Unknown, match="logits function"):
        programs.traced(Key("logits", 2, elsewhere))
    programs.close()


def encoders(**changed):
    from jaxinfer.graph import Encoder

    said = dict(hidden=elsewhere, pooling=("mean",), unit=True, shape=(4, 4)) | changed
    encoder = Encoder("e", {}, said["hidden"], 4, 8, 16)
    params = {"w": jax.ShapeDtypeStruct(said["shape"], jnp.float32)}
    return Encoders(encoder, params, said["pooling"], said["unit"], CPU)


def another(x):
    return x + 1


@pytest.mark.parametrize("changed", [dict(hidden=another), dict(pooling=("cls",)), dict(unit=False),
                                     dict(shape=(4, 5))])
def test_an_encoders_programs_differ(changed, cache):
    bucket = EncoderBucket(4, 16)
    assert named(encoders(), bucket) == named(encoders(), bucket) != named(encoders(**changed), bucket)
    assert named(encoders(), bucket) != named(encoders(), EncoderBucket(4, 32))


def functions(call=elsewhere, shape=(3,), params=2, dtype="f4", batch=0):
    leaf = LeafLike("x", shape, np.dtype(dtype), batch=batch)
    return Functions(call, np.zeros(params), (leaf,), jax.tree.structure(((0,), {})), 0, CPU)


@pytest.mark.parametrize("changed", [dict(call=another), dict(shape=(4,)), dict(params=3), dict(dtype="i4"),
                                     dict(batch=1)])
def test_an_endpoints_programs_differ(changed, cache):
    one = FunctionKey(2)
    assert named(functions(), one) == named(functions(), one) != named(functions(**changed), one)
    assert named(functions(), one) != named(functions(), FunctionKey(3))


# --- there and back ---


FIRST = """
import json, sys
import jaxinfer as ji
from pathlib import Path
from tests.test_stored import ASKED, LOAD
with ji.load(sys.argv[1], **LOAD) as lm:
    tokens = [lm("Once upon a time", **how).tokens for how in ASKED]
    kernels = {e.name: e.kernels for e in lm.ledger}
    origins = [e.origin for e in lm.ledger]
xla = [file.name for file in Path(sys.argv[2]).rglob("*-cache")]
print(json.dumps({"tokens": tokens, "kernels": kernels, "origins": origins, "xla": xla}))
"""


@pytest.fixture(scope="module")
def filled(tiny_path, tmp_path_factory):
    """What a process with an empty cache said, and the cache that it left."""
    cache = tmp_path_factory.mktemp("filled")
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | {
        "JAXINFER_CACHE": str(cache), "JAXINFER_CACHE_GB": "1", "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", FIRST, tiny_path, cache / "xla"], env=env, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), cache


@pytest.fixture
def used(filled, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(filled[1]))
    monkeypatch.setenv("JAXINFER_CACHE_GB", "1")
    return filled


@pytest.fixture
def work():
    """What JAX traced, lowered and compiled in the test: the names of its own measurements, and of the function."""
    seen = []
    listen = lambda event, seconds, **what: seen.append((event.rsplit("/", 1)[1], what.get("fun_name")))
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_second_process_traces_and_compiles_nothing_and_says_the_same(used, tiny_path, work):
    first, _ = used
    assert set(first["origins"]) == {"compiled"}
    assert not [name for name in first["xla"] if "forward" in name or "sample" in name], "stored once, not twice"
    jnp.ones(3) + 1
    work.clear()
    with ji.load(tiny_path, **LOAD) as lm:
        tokens = [list(lm("Once upon a time", **how).tokens) for how in ASKED]
        assert {e.name: e.kernels for e in lm.ledger} == first["kernels"]
        assert {e.origin for e in lm.ledger} == {"disk"}
        startup = lm.startup
    assert tokens == first["tokens"]
    assert all(startup[name].origin == "disk" and startup[name].bytes > 1000 for name in first["kernels"])
    for name in ("config", "tokenizer", "weights read", "weights transferred", "pages", "first token"):
        assert startup[name].ended >= startup[name].began >= 0 and name in str(startup)
    size = (tiny_path / "model.safetensors").stat().st_size
    assert 0.9 * size < startup["weights read"].bytes <= size <= 1.1 * startup["weights transferred"].bytes
    assert startup["first token"].ended > startup["config"].ended and "warm-up" not in startup.phases
    planned = ("jaxpr_trace_duration", "<lambda>")
    assert not set(work) - {planned}, "something was traced or compiled beside the layout of a page"
    assert work.count(planned) <= 2


def test_a_loaded_program_takes_its_state_for_its_own(used, tiny_path):
    with ji.load(tiny_path, **LOAD) as lm:
        programs, params = lm._engine.executables, lm._engine.weights[1]
        (bucket,) = programs.ladder.buckets
        forward, state = programs.get(Key("forward", bucket)), programs.empty("state")
        run = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), programs._run(bucket))
        new, _ = forward(params, state, programs.empty("last_S"), run)
        assert programs.ledger[str(Key("forward", bucket))].origin == "disk"
        assert all(page.is_deleted() for page in jax.tree.leaves(state)), "its memory is the new state's"
        assert not any(page.is_deleted() for page in jax.tree.leaves((new, params)))


EVERY_KIND = """
import json, sys
import jax, numpy as np
import jaxinfer as ji
from tests.test_stored import LOAD, twice

plain, deep, bert, budget = sys.argv[1:]
said = {}
def note(name, model, answer):
    said[name] = answer, sorted({entry.origin for entry in model.ledger if entry.hits})
with ji.load(plain, mesh={"model": 2}, **LOAD) as lm:
    note("mesh", lm, list(lm([5, 7, 9], max_tokens=6, ignore_eos=True).tokens))
    assert len(lm.placements[0].devices) == 2
with ji.load(deep, device_memory=int(budget), **LOAD) as lm:
    note("streamed", lm, list(lm([5, 7, 9], max_tokens=6, ignore_eos=True).tokens))
    assert lm.tiers.streamed and any("block" in entry.name for entry in lm.ledger)
with ji.load(bert) as encoder:
    note("encoder", encoder, encoder.embed("w1 w2").tolist())
with ji.endpoint(twice, example=np.zeros(2, np.float32), ladders={"B": (2,)}, device=jax.devices()[3]) as f:
    note("endpoint", f, f([1, 2]).tolist())
print(json.dumps(said))
"""


def test_programs_of_several_devices_of_layers_that_stream_and_of_stateless_models_are_loaded_too(tiny_path, tmp_path):
    deep, bert = tiny.write(tmp_path / "deep", THREE), test_text_encoder.write(tmp_path / "bert")
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | {
        "JAXINFER_CACHE": str(tmp_path / "cache"), "JAXINFER_CACHE_GB": "1", "PYTHONPATH": os.getcwd(),
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4", **IN_HASTE}
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", EVERY_KIND, tiny_path, deep, bert, str(tight(THREE, **LOAD))],
                              env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = runs
    assert len(first) == 4
    for name in first:
        assert first[name][1] == ["compiled"] and second[name] == [first[name][0], ["disk"]], name


@pytest.mark.parametrize("harm", ["cut", "junk", "writable"])
def test_a_program_that_cannot_be_trusted_is_compiled_again(harm, cache, work):
    ask = lambda: endpoint_of(twice)
    assert ask() == ("compiled", [2.0, 4.0])
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if harm == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif harm == "junk":
        stored.store().put(file.stem, {"kernels": {}, "bytes": 0}, b"\x80\x04N.")  # a sound file, and no program
    else:
        file.chmod(0o666)
    with seen_events(events.NotStored) as seen:
        assert ask() == ("compiled", [2.0, 4.0])
    assert [event.name for event in seen] == ["apply[B=2]"] and file.name[:64] in seen[0].why
    assert ask() == ("disk", [2.0, 4.0]), "a good one has taken its place"


def test_where_nothing_can_be_written_nothing_is_stored_and_all_goes_on(cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with seen_events(events.NotStored) as seen:
        assert endpoint_of(twice) == ("compiled", [2.0, 4.0])
    assert len(seen) == 2 and str(cache) in seen[0].why, "neither read nor written"


@pytest.fixture
def in_jaxs_cache(cache, tmp_path, monkeypatch):
    """JAX's own cache, a new one, has the program of `twice`."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]

    def use(*values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(str(tmp_path / "xla"), 0.0)
    with monkeypatch.context() as patch:
        patch.setenv("JAXINFER_CACHE_GB", "0")
        assert [endpoint_of(twice)[0] for _ in range(2)] == ["compiled", "disk"]
    yield
    use(*before)


def test_what_jaxs_own_cache_has_is_stored_too(in_jaxs_cache, cache):
    assert endpoint_of(twice) == ("compiled", [2.0, 4.0]) and len(list(cache.iterdir())) == 1
    assert endpoint_of(twice) == ("disk", [2.0, 4.0])


def test_what_can_only_be_taken_from_jaxs_own_cache_is_not_stored(in_jaxs_cache, cache, monkeypatch):
    monkeypatch.setattr(compiler.cache, "apart", nullcontext)
    with seen_events(events.NotStored) as seen:
        assert endpoint_of(twice) == ("disk", [2.0, 4.0]) and not cache.exists()
    assert "JAX's own cache" in seen[0].why


def test_a_limit_of_zero_stores_nothing(cache, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE_GB", "0")
    assert endpoint_of(twice)[1] == [2.0, 4.0] and not cache.exists()
    for wrong in ("-1", "much", "nan"):
        monkeypatch.setenv("JAXINFER_CACHE_GB", wrong)
        with pytest.raises(InvalidOption, match="JAXINFER_CACHE_GB"):
            stored.store()


def twice(x):
    return 2 * x


def calls_lapack(x):
    return x + jnp.linalg.svd(jnp.ones((2, 2)) + x.sum(), compute_uv=False).sum() * 0


def calls_back(x):
    return jax.pure_callback(lambda v: np.asarray(v), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def endpoint_of(call):
    with ji.endpoint(call, example=np.zeros(2, np.float32), ladders={"B": (2,)}) as f:
        said = f([1, 2]).tolist()
        (entry,) = f.ledger
        return entry.origin, said


@pytest.mark.parametrize("call, why", [(calls_lapack, "lapack"), (calls_back, "callback")])
def test_a_program_that_calls_other_code_by_its_address_is_not_stored(call, why, cache):
    with seen_events(events.NotStored) as seen:
        endpoint_of(call)
    assert why in seen[0].why and not cache.exists()


# --- ahead of time, and from the command line ---


def test_what_was_compiled_ahead_is_loaded_whatever_is_asked(used, tiny_path):
    made = compile_ahead(str(tiny_path), **LOAD)
    assert {entry.origin for entry in made} <= {"compiled", "disk"} and len(made) > len(used[0]["kernels"])
    with ji.load(tiny_path, **LOAD) as lm:
        lm._engine.executables.fetch_all().result()
        assert eventually(lambda: len([e for e in lm.ledger if e.origin == "disk"]) >= len(used[0]["kernels"]))
        lm("Once", temperature=0.5, seed=1, repetition_penalty=1.2, logprobs=1, max_tokens=2)
        lm.warmup()
        assert {entry.origin for entry in lm.ledger} == {"disk"} and "warm-up" in lm.startup.phases


@pytest.mark.parametrize("changed, error, message", [
    ({}, InvalidOption, "XLA's CUDA plugin is not here"),
    ({"kind": "NVIDIA Abacus"}, InvalidOption, "NVIDIA Abacus is not known; XLA can be told of NVIDIA H100"),
    ({"installed": {"jax": "0"}}, InvalidOption, "machine: jax there and here are not the same"),
    ({"machine": ["a CPU's features", 2]}, CorruptFile, "is no description of a machine with a GPU"),
])
def test_a_gpu_that_is_not_here_must_be_described_by_a_machine_that_could_load_it(changed, error, message, cache,
                                                                                  tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "cuda_device", lambda hardware: None)
    told = json.loads(jaxinfer("machine").stdout)
    assert told == stored.describe(CPU)
    told |= {"kind": "NVIDIA H100 80GB HBM3", "machine": ["cuda 13000", "9.0", "580.1", ["nvidia-cublas 13"]]}
    told["installed"] |= changed.get("installed", {})
    (tmp_path / "h100.json").write_text(json.dumps({**told, **changed, "installed": told["installed"]}))
    with pytest.raises(error, match=message):
        compile_ahead(str(tiny_path), machine=tmp_path / "h100.json", memory="1GiB")


@pytest.mark.parametrize("options, message", [
    (dict(machine="nowhere.json", memory="1GiB"), "there is no file nowhere.json"),
    (dict(machine="m.json", topology="v5e:1x1", memory="1GiB"), "another target must not"),
    (dict(machine="m.json"), "machine: memory must be given"),
    (dict(topology="h100"), "memory must be given"),
    (dict(topology="x", memory="1GiB", device="cpu"), "device and another target must not"),
    (dict(topology="nothing:9", memory="1GiB"), "'nothing:9'; it must be a TPU slice")])
def test_a_chip_that_is_not_here_must_be_described(options, message, cache, tiny_path):
    with pytest.raises(InvalidOption, match=message):
        compile_ahead(str(tiny_path), **options)


def jaxinfer(*args):
    return CliRunner().invoke(app, ["cache", *map(str, args)])


def test_the_command_line_lists_carries_and_removes_programs(cache, tmp_path, monkeypatch):
    endpoint_of(twice)
    listed = jaxinfer("list").stdout
    assert "apply[B=2]" in listed and f"1 programs in {cache}" in listed
    assert "wrote 1 programs" in jaxinfer("export", tmp_path / "a.tar").stdout
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "other"))
    assert "took 1 programs" in jaxinfer("import", tmp_path / "a.tar").stdout
    assert endpoint_of(twice) == ("disk", [2.0, 4.0])
    assert "removed 1 programs" in jaxinfer("prune", 0).stdout and "0 programs" in jaxinfer("list").stdout
    for args in (("import", tmp_path / "none.tar"), ("export", tmp_path / "no" / "a.tar")):
        assert isinstance(jaxinfer(*args).exception, InvalidOption)
    monkeypatch.setenv("JAXINFER_CACHE_GB", "0")
    assert "is 0" in str(jaxinfer("list").exception)
