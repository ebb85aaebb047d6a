"""Profiles say what was going on, in formats that other tools read."""

import gzip
import hashlib
import io
import json
import tempfile
import threading
import zipfile

import jax.numpy as jnp
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from jaxinfer import events
from jaxinfer.errors import Rejected
from jaxinfer.runtime.registry import Registry
from jaxinfer.serving import flame, pprof, profiling, sampling
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.site import Site
from tests.watching import admin_of

pytestmark = pytest.mark.usefixtures("in_haste")


def profile_message():
    """google/pprof's proto/profile.proto, as far as stacks go."""
    file = descriptor_pb2.FileDescriptorProto(name="profile.proto", package="perftools", syntax="proto3")
    whole = {"int64": 3, "uint64": 4, "string": 9, "message": 11}
    for name, fields in {
        "ValueType": [("type", 1, "int64", 0), ("unit", 2, "int64", 0)],
        "Sample": [("location_id", 1, "uint64", 1), ("value", 2, "int64", 1)],
        "Line": [("function_id", 1, "uint64", 0), ("line", 2, "int64", 0)],
        "Location": [("id", 1, "uint64", 0), ("line", 4, "Line", 1)],
        "Function": [("id", 1, "uint64", 0), ("name", 2, "int64", 0), ("filename", 4, "int64", 0)],
        "Profile": [("sample_type", 1, "ValueType", 1), ("sample", 2, "Sample", 1), ("location", 4, "Location", 1),
                    ("function", 5, "Function", 1), ("string_table", 6, "string", 1), ("time_nanos", 9, "int64", 0),
                    ("duration_nanos", 10, "int64", 0), ("period_type", 11, "ValueType", 0),
                    ("period", 12, "int64", 0)],
    }.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            made = message.field.add(name=field, number=number, label=3 if repeated else 1,
                                     type=whole.get(kind, whole["message"]))
            if kind not in whole:
                made.type_name = f".perftools.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("perftools.Profile"))


PROFILE = profile_message()


def decoded(body: bytes) -> tuple[dict[tuple, tuple], list[tuple[str, str]]]:
    """Stacks of (function, file, line), the caller first, with their values; and what the values are."""
    told = PROFILE.FromString(gzip.decompress(body))
    text = told.string_table
    functions = {f.id: (text[f.name], text[f.filename]) for f in told.function}
    lines = {place.id: [(*functions[line.function_id], line.line) for line in place.line] for place in told.location}
    stacks = {}
    for sample in told.sample:
        stack = tuple(frame for id in reversed(sample.location_id) for frame in reversed(lines[id]))
        stacks[stack] = tuple(sample.value)
    return stacks, [(text[t.type], text[t.unit]) for t in told.sample_type]


FRAMES = st.tuples(st.text(max_size=8), st.text(max_size=8), st.integers(0, 2**31))


STACKS = st.lists(FRAMES, min_size=1, max_size=5).map(tuple)


@given(st.dictionaries(STACKS, st.tuples(st.integers(0, 2**62)), max_size=6))
def test_what_is_encoded_is_decoded(stacks):
    body = pprof.encode(stacks, [("cpu", "nanoseconds")], began_ns=5, duration_ns=6, period_ns=7)
    assert decoded(body) == (stacks, [("cpu", "nanoseconds")])
    told = PROFILE.FromString(gzip.decompress(body))
    assert (told.time_nanos, told.duration_nanos, told.period, told.string_table[0]) == (5, 6, 7, "")


@pytest.fixture
def burning():
    """A thread that computes, and one that waits."""
    stop = threading.Event()

    def burn():
        while not stop.is_set():
            hashlib.sha256(b"x" * 100_000).digest()
            sum(range(1000))

    threads = [threading.Thread(target=burn, name="burner"), threading.Thread(target=stop.wait, name="idler")]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


@pytest.fixture
def client():
    site = Site(Registry(), Settings())
    with TestClient(admin_of(site, profiling.part(site)), raise_server_exceptions=False) as client:
        client.site = site
        yield client


def test_a_profile_shows_who_computes_and_not_who_waits(client, burning):
    reply = client.get("/debug/pprof/profile?seconds=0.5")
    assert reply.status_code == 200 and 'filename="profile.pb.gz"' in reply.headers["content-disposition"]
    stacks, types = decoded(reply.content)
    assert types == [("samples", "count"), ("cpu", "nanoseconds")]
    spent = {}
    for stack, (_, nanoseconds) in stacks.items():
        spent[stack[0][0]] = spent.get(stack[0][0], 0) + nanoseconds
    assert spent["burner"] > 0.05e9 and spent.get("idler", 0) < 0.01e9
    assert any("burn" in frame[0] for stack in stacks if stack[0][0] == "burner" for frame in stack)


def test_where_the_system_does_not_say_who_computes_what_is_seen_counts(burning, monkeypatch):
    monkeypatch.setattr(sampling, "_computed", lambda: None)
    found = sampling.profile(0.2)
    assert {"burner", "idler"} <= {stack[0][0] for stack in found.nanoseconds}


def test_a_flame_graph_is_one_page_of_nested_times(client, burning):
    reply = client.get("/debug/flame?seconds=0.3")
    page = reply.text
    before, data = page.split("const data = ", 1)
    data, after = data.split(";\n", 1)
    assert reply.headers["content-type"].startswith("text/html") and "http" not in before + after
    data = json.loads(data)

    def check(node):
        assert sum(child["v"] for child in node["c"]) <= node["v"]
        for child in node["c"]:
            check(child)

    check(data["root"])
    assert "burner" in [child["n"] for child in data["root"]["c"]]


def test_names_cannot_break_out_of_the_page():
    page = flame.page({(("</script><script>alert(1)", "f", 1),): 1}, 1)
    assert "<script>alert" not in page and page.count("</script>") == 1
    assert "&lt;script&gt;" in flame.framed(page)


def test_the_heap_is_what_the_device_holds(client):
    held = jnp.ones(1 << 20, jnp.float32)
    stacks, types = decoded(client.get("/debug/pprof/heap").content)
    at = types.index(("space", "bytes"))
    assert max(values[at] for values in stacks.values()) >= held.nbytes


def test_an_xla_trace_is_a_zip_that_perfetto_opens(client, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stop = threading.Event()

    def work():
        while not stop.wait(0.01):
            (jnp.ones((64, 64)) @ jnp.ones((64, 64))).block_until_ready()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        reply = client.get("/debug/xla?seconds=0.3")
    finally:
        stop.set()
        thread.join()
    assert 'filename="xla_trace.zip"' in reply.headers["content-disposition"] and not [*tmp_path.iterdir()]
    archive = zipfile.ZipFile(io.BytesIO(reply.content))
    (name,) = (name for name in archive.namelist() if name.endswith("perfetto_trace.json.gz"))
    told = json.loads(gzip.decompress(archive.read(name)))
    assert any(event.get("ph") == "X" for event in told["traceEvents"])


@pytest.mark.parametrize("said", ["0", "-1", "nan", "inf", "301", "soon", ""])
def test_nonsense_is_refused(client, said):
    assert client.get(f"/debug/pprof/profile?seconds={said}").status_code in (400, 500)  # 400 behind the guard
    assert profiling._busy.acquire(blocking=False)
    profiling._busy.release()


def test_one_profile_at_a_time():
    with profiling.alone(), pytest.raises(Rejected), profiling.alone():
        pass
    with profiling.alone():
        pass


def test_stages_are_told_the_slowest_first(client):
    record = client.site.record
    for _ in range(9):
        record(events.Timed("serialise", 0.001))
    record(events.Stepped("m", 1, 1, 1, {"plan": 0.5, "execute": 2.0}))
    told = client.get("/debug/stages", headers={"accept": "application/json"}).json()
    assert [row["stage"] for row in told] == ["execute", "plan", "serialise"]
    assert told[2] == {"stage": "serialise", "count": 9, "seconds": pytest.approx(0.009), "p50": 0.001, "p90": 0.001,
                       "p99": 0.001, "share": pytest.approx(0.009 / 2.509)}
    assert "<td>execute</td>" in client.get("/debug/stages").text
    assert str(profiling.Stages(record)).splitlines()[1].split()[:2] == ["execute", "1"]
