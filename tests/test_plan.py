"""`ji.plan`: what it says a model holds is what `load` holds, and more of anything never needs or takes less."""

import json
from dataclasses import fields
from functools import cache
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from bench.support.shapes import LLAMA_1B, LLAMA_8B
from jaxinfer.compiler.hardware import HARDWARE, Work, described
from jaxinfer.compiler.probe import Probed
from jaxinfer.errors import InvalidOption, ModelNotFound, UnsupportedModel
from jaxinfer.frontend.architectures import architecture
from jaxinfer.graphs import decoder
from jaxinfer.runtime.plan import Traffic
from tests import tiny

SHORT = Traffic(32, 16)
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 512}
PLAIN = {**tiny.PLAIN, **WIDE}
MIXTRAL = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192}


@cache
def planned(config: str = json.dumps(LLAMA_8B), **options) -> "ji.plan":
    mesh = options.pop("mesh", None)
    return ji.plan(json.loads(config), device=options.pop("device", "h200"), compile=False,
                   mesh=dict([mesh]) if mesh else None, **options)


@pytest.mark.parametrize(("config", "options"), [
    (tiny.WINDOWED, {}), (tiny.PLAIN, {"dtype": "bfloat16"}), (tiny.PLAIN, {"quantize": "int8"}),
    (tiny.PLAIN, {"quantize": "int4", "kv_cache_dtype": "int8"}), (tiny.PLAIN, {"max_rows": 2, "max_context": 100})],
    ids=["windowed", "bfloat16", "int8", "int4", "small"])
def test_weights_and_pages_are_those_that_a_loaded_model_holds(config, options, tmp_path):
    options = {"max_rows": 3, "max_context": 256, "memory": "1GiB", **options}
    path = tiny.write(tmp_path, config)
    with ji.load(path, **options) as lm:
        nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        weights, state = nbytes(lm.params), lm._engine.executables.state
        pages, counts = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)), {
            name: layers[0].shape[0] for name, layers in state.items()}
    found = ji.plan(path, traffic=SHORT, compile=False, device="h200", **options)
    assert (found.weights, found.page_count) == (weights, counts)
    assert found.pages == pages, "the layout on a GPU is that of a CPU"
    assert found.free == found.budget - found.weights - found.pages - found.temporaries


def test_a_plan_for_this_machine_tries_it_and_takes_the_memory_that_load_would(tiny_path):
    found = ji.plan(tiny_path, traffic=SHORT, max_rows=1, max_context=64)
    with ji.load(tiny_path, max_rows=1, max_context=64) as lm:
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(lm._engine.executables.state))
    assert found.device == "cpu" and found.pages == held and 0 < found.temporaries < 2**24
    assert all(step.seconds > 0 for step in found.steps) and "measured here" in str(found)


ROWS, CONTEXTS = st.integers(1, 300), st.integers(700, 8192)
FEW = settings.default.max_examples // 12  # each plans a model or two


@settings(max_examples=FEW)
@given(rows=ROWS, more=st.integers(0, 100), context=CONTEXTS, longer=st.integers(0, 4000))
def test_more_rows_and_longer_contexts_never_need_or_take_less(rows, more, context, longer):
    longer = min(8192, context + longer)
    little, large = planned(max_rows=rows, max_context=context), planned(max_rows=rows + more, max_context=longer)
    assert little.weights == large.weights and little.needed <= large.needed
    full = {p.max_rows: next(n for size, n in p.batches if size == p.max_context) for p in (little, large)}
    assert full[rows] >= full[rows + more], "a longer context let more rows fit"
    by_rows = sorted((step.rows, step.seconds) for p in (little, large) for step in p.steps if "decode" in step.name)
    assert [seconds for _, seconds in by_rows] == sorted(seconds for _, seconds in by_rows)


@settings(max_examples=FEW)
@given(rows=st.integers(1, 64), context=st.integers(700, 8192))
def test_the_largest_batch_fits_and_one_more_does_not(rows, context):
    budget = 40 << 30
    most = next(n for size, n in planned(max_context=context, memory=budget).batches if size == context)
    assert planned(max_rows=min(most, 4096), max_context=context, memory=budget).rows >= most
    assert planned(max_rows=min(most + 1, 4096), max_context=context, memory=budget).rows < most + 1
    longest = dict(planned(max_rows=rows, memory=budget).contexts)[rows]
    assert longest == 8192 or planned(max_rows=rows, max_context=longest + 64, memory=budget).rows < rows


@settings(max_examples=FEW)
@given(tokens=st.integers(1, 512), answer=st.integers(1, 512), price=st.floats(0.1, 10))
def test_cost_follows_from_tokens_and_a_concurrency_from_the_rate_that_it_gives(tokens, answer, price):
    at = ji.plan(LLAMA_1B, device="h200", compile=False, max_rows=8, price=price,
                 traffic={"prompt_tokens": tokens, "answer_tokens": answer, "concurrency": 8}).service
    assert at.cost_per_million == pytest.approx(price / 3600 / at.tokens_per_second * 1e6)
    assert at.tokens_per_second == pytest.approx(at.requests_per_second * answer) and at.rows == 8
    for share in (0.5, 2.0):
        asked = Traffic(tokens, answer, requests_per_second=share * at.requests_per_second)
        got = ji.plan(LLAMA_1B, device="h200", compile=False, max_rows=8, traffic=asked).service
        assert got.keeps_up == (share < 1) and got.rows <= 8 and got.cost_per_million is None
        assert got.requests_per_second == pytest.approx(at.requests_per_second * min(share, 1))


def test_a_device_is_at_least_as_slow_as_its_weights_and_keys():
    """Of an 8B's decode step the bytes are those of DESIGN's floor: all weights but the embedding, and the KV."""
    step = next(s for s in planned(max_rows=64, traffic=Traffic(448, 128)).steps if s.rows == 64)
    weights = planned().weights - 2 * 128256 * 4096
    floor = (weights + 64 * 512 * 2 * 8 * 128 * 2 * 32) / HARDWARE["h200"].bandwidth
    assert floor < step.memory < 1.1 * floor and step.seconds > step.memory


def test_experts_that_nobody_asks_are_not_read():
    one, many = (next(s for s in ji.plan(MIXTRAL, device="h200", compile=False, max_rows=rows).steps if s.rows == rows)
                 for rows in (1, 64))
    bandwidth = HARDWARE["h200"].bandwidth
    experts = 2 * 3 * 4096 * 14336 * 2  # bytes of one, in both layers
    assert one.memory < 8 * experts / bandwidth < many.memory  # a GPU's smallest bucket is of eight rows


def test_a_mesh_cuts_what_each_device_holds_and_pays_for_sums():
    alone, cut = planned(), planned(mesh=("model", 4))
    assert cut.devices == 4 and "heads by model" in cut.placement
    assert cut.weights < 0.26 * alone.weights and cut.page_count == alone.page_count and cut.pages * 4 == alone.pages
    assert cut.steps[0].seconds > cut.steps[0].memory + 64 * HARDWARE["h200"].link_start
    data = planned(mesh=("data", 2), price=1.0)
    assert data.devices == 2 and data.weights == alone.weights
    assert data.service.tokens_per_second == pytest.approx(2 * alone.service.tokens_per_second)


def test_what_does_not_fit_says_so_and_each_suggestion_would():
    found = planned(memory="12GiB", max_rows=4)
    assert not found.fits and found.service is None and found.free < 0 and "no: one context" in str(found)
    assert [text.partition("=")[0] for text in found.suggestions] == ["memory", "quantize"]
    tight = planned(memory=found.weights + (200 << 20), max_rows=4)
    assert [text.partition("=")[0] for text in tight.suggestions] == ["memory", "quantize", "max_context"]
    for plan in (found, tight):
        for text in plan.suggestions:
            name, _, value = text.partition(":")[0].partition("=")
            value = int(value) if value.isdecimal() else value.strip("'")
            assert planned(**{"memory": plan.budget, "max_rows": 4, name: value}, traffic=SHORT).fits, text


def test_a_model_may_be_given_as_a_config_in_any_form(tmp_path):
    config = architecture(tiny.PLAIN).config
    (tmp_path / "config.json").write_text(json.dumps(tiny.PLAIN))
    forms = [tiny.PLAIN, tmp_path, tmp_path / "config.json", config, decoder.build(config)]
    plans = [ji.plan(form, device="h100", dtype="bfloat16", max_context=512, traffic=SHORT, compile=False)
             for form in forms]
    assert len({(p.weights, p.pages, p.needed, p.service) for p in plans}) == 1
    assert ji.plan(tmp_path, device="h100", traffic=SHORT, compile=False).dtype == "float32", "config.json says so"


@pytest.mark.parametrize("options, message", [
    ({"topology": "v9:2x2"}, "v5e:2x2"), ({"topology": "v5e:2x2", "device": "h200"}, "both given"),
    ({"device": "h900"}, "present here"), ({"traffic": {"prompt": 3}}, "prompt_tokens"), ({"traffic": 3}, "a dict"),
    ({"traffic": {"answer_tokens": 0}}, "answer_tokens=0"), ({"traffic": {"requests_per_second": 0}}, "> 0"),
    ({"traffic": {"requests_per_second": 1, "concurrency": 1}}, "follows"), ({"price": -1}, "price"),
    ({"traffic": {"prompt_tokens": 5000}}, "max_context is 4096"), ({"max_rows": 0}, "max_rows"),
    ({"quantize": "int3"}, "quantize"), ({"max_context": 9000}, "9000"), ({"mesh": {"rows": 2}}, "axis"),
    ({"device": "h200", "mesh": {"model": 0}}, "model=0")], ids=str)
def test_what_has_no_meaning_is_refused_at_the_door(options, message):
    with pytest.raises(InvalidOption, match=message):
        ji.plan(LLAMA_8B, **options)


def test_what_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match="encoder"):
        ji.plan({"model_type": "bert", "vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4,
                 "num_hidden_layers": 2, "intermediate_size": 256}, device="h200")
    with pytest.raises(UnsupportedModel, match="language models"):
        ji.plan("model.onnx")
    with pytest.raises(ModelNotFound):
        ji.plan(tmp_path)
    with pytest.raises(InvalidOption, match="int"):
        ji.plan(3)


def test_a_plan_is_text_a_table_and_a_picture(tmp_path):
    found = planned(price=2.0)
    text, page = str(found), found._repr_html_()
    for word in ("weights", "16.1 GB", "tokens/s", "cost of 1 M tokens", "decode, 1 row", "4,300 GB/s", "an upper"):
        assert word in text and word in page
    picture = ElementTree.fromstring(found.save(tmp_path / "plan.svg").read_text())
    assert len(picture) > 20 and "<svg" in page


def test_a_device_is_known_by_its_name_and_by_jaxs():
    assert described("NVIDIA H200") is described("h200") and described("cpu") is None
    for device in HARDWARE.values():
        assert device.memory > 1e10 and device.bandwidth > 5e11 and {"bfloat16", "float32"} <= set(device.rates)
        assert device.source


def test_an_op_on_a_device_without_figures_is_tried_once_for_each_shape():
    here = Probed("cpu", "cpu", "cpu", 1 << 30, 1e12, {"float32": 1e15, "int8": 1e15}, 1e12, "",
                  device=jax.devices()[0])
    shape = (None, "float32", 4, 256, 128)
    work = Work("matmul", "float32", 2 * 4 * 256 * 128, 4 * 256 * 128, shape=shape)
    first = here.seconds(work)
    assert first.all == pytest.approx(here.found["matmul", *shape]) and first.beside > 0
    here.found["matmul", *shape] = 1.0
    assert here.seconds(work).all == pytest.approx(1.0)
    decode = Work("attend", "float32", 1, 1, shape=(2, 1, 100, 4, 2, 16, "float32", None))
    assert here.seconds(decode).all > 0 and len(here.found) == 2


def test_every_field_of_traffic_counts():
    base = dict(prompt_tokens=128, answer_tokens=64)
    changed = {"prompt_tokens": 256, "answer_tokens": 128, "concurrency": 1, "requests_per_second": 1.0}
    assert set(changed) == {field.name for field in fields(Traffic)}
    serve = lambda **traffic: planned(traffic=Traffic(**traffic)).service
    for name, value in changed.items():
        assert serve(**{**base, name: value}) != serve(**base), name


@pytest.mark.tpu
@pytest.mark.parametrize("topology, mesh", [("v5e:2x2", None), ("v5p:2x2x1", {"model": 1})])
def test_a_tpu_slice_that_is_not_here_is_planned_by_its_compiler(topology, mesh):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxinfer[tpu]'")
    found = ji.plan(PLAIN, topology=topology, mesh=mesh, max_rows=1, max_context=512, traffic=SHORT, price=1.0)
    assert found.devices == (4 if topology == "v5e:2x2" else 1) and found.fits and "libtpu" in str(found)
    assert ("heads replicated: 2 key-value heads" in found.placement) == (topology == "v5e:2x2")
    assert 0 < found.temporaries < 2**24
    by_hand = ji.plan(PLAIN, topology=topology, mesh=mesh, max_rows=1, max_context=512, traffic=SHORT, compile=False)
    assert by_hand.weights == found.weights and "an upper estimate" in str(by_hand)
    for asked, unasked in zip(found.steps, by_hand.steps, strict=True):
        assert asked.compiler is not None and unasked.compiler is None
        assert asked.roofline == unasked.roofline <= asked.seconds < 100 * asked.roofline
    with pytest.raises(InvalidOption, match="asks for 8 devices"):
        ji.plan(PLAIN, topology="v5e:2x2", mesh={"model": 8})
    with pytest.raises(InvalidOption, match="no such slice"):
        ji.plan(PLAIN, topology="v5e:9x7")
    assert jnp.zeros(1).device.platform == "cpu"


def test_the_command_prints_the_plan_and_writes_its_picture(tmp_path, monkeypatch, capsys):
    from jaxinfer import cli

    (tmp_path / "config.json").write_text(json.dumps(tiny.PLAIN))
    arguments = ["plan", str(tmp_path / "config.json"), "--device", "h100", "--arithmetic", "--prompt-tokens", "32",
                 "--answer-tokens", "16", "--max-context", "256", "--price", "2.5", "--mesh", "data=2,model=2"]
    monkeypatch.setattr("sys.argv", ["jaxinfer", *arguments, "--picture", str(tmp_path / "plan.svg")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().out
    assert not left.value.code and "4 x h100" in said and "cost of 1 M tokens" in said and "32 + 16 tokens" in said
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    monkeypatch.setattr("sys.argv", ["jaxinfer", *arguments[:-1], "model=two"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "model='two'" in capsys.readouterr().err
