"""An encoder behind its queue: whatever the company, the length and the order, each text has the vector and the classes
that it has alone; and an ONNX file is an endpoint like any other."""

import asyncio
import json
import threading

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers, processors

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.compiler.encoders import encoder_ladder
from jaxinfer.errors import Closed, InvalidOption, InvalidRequest
from jaxinfer.frontend.architectures import architecture
from jaxinfer.graph import Leaf
from jaxinfer.runtime.memory import held
from tests.encoding import Bucket, encode_run, logits_run
from tests.running import retries, seen_events

pytestmark = pytest.mark.usefixtures("in_haste")

CONFIG = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 40, "hidden_size": 32,
          "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64,
          "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
          "id2label": {"0": "good", "1": "bad", "2": "odd"}}
WORDS = [f"w{i}" for i in range(34)]


def write(folder):
    """A tiny random BERT with a classification head and a tokenizer of whole words."""
    folder.mkdir(exist_ok=True)
    rng, tensors = np.random.default_rng(0), {}
    leaves = jax.tree.leaves(architecture(CONFIG).graph().spec, is_leaf=lambda x: isinstance(x, Leaf))
    for leaf in leaves:
        names = leaf.alternatives[0]
        for name, part in zip(names, np.split(rng.normal(size=leaf.shape), len(names)), strict=True):
            tensors[name] = (part / (1 if len(leaf.shape) == 1 else 4)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    vocab = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encoder(path):
    with ji.load(path) as encoder:
        yield encoder


def by_hand(encoder, text):
    """The vector and the logits of one text, without a queue."""
    pair = text if isinstance(text, tuple) else (text,)
    ids, segments = [1], [0]
    for i, part in enumerate(pair):
        ids += [*[4 + WORDS.index(word) if word in WORDS else 3 for word in part.split()][:62], 2]
        segments += [i] * (len(ids) - len(segments))
    bucket = Bucket(64, 1, 64)
    return (encode_run(encoder.graph, encoder.params, [ids], bucket, unit=False)[0] if len(pair) == 1 else None,
            logits_run(encoder.graph, encoder.params, [ids], bucket, [segments])[0])


TEXTS = st.lists(st.sampled_from([*WORDS, "what"]), max_size=70).map(" ".join)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=1, max_size=30))
def test_every_text_is_encoded_as_it_would_be_alone(encoder, texts):
    found = encoder.embed(texts)
    for text, vector, classes in zip(texts, found, encoder.classify(texts), strict=True):
        expected, logits = by_hand(encoder, text)
        np.testing.assert_allclose(vector, expected, atol=1e-5)
        weights = np.exp(logits - logits.max())
        told = [classes[label] for label in encoder.graph.labels]
        np.testing.assert_allclose(told, weights / weights.sum(), atol=1e-5)
        assert list(classes.values()) == sorted(classes.values(), reverse=True)


def test_every_way_to_ask_says_the_same_and_pairs_are_classified(encoder):
    vector, logits = by_hand(encoder, "w1 w2")
    for found in (encoder("w1 w2"), encoder.submit("w1 w2").result(20), asyncio.run(encoder.asubmit("w1 w2"))):
        np.testing.assert_allclose(found.vector, vector, atol=1e-5)
        np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    pair = by_hand(encoder, ("w1 w2", "w3"))[1]
    np.testing.assert_allclose(encoder(("w1 w2", "w3")).logits, pair, atol=1e-5)
    assert np.abs(pair - by_hand(encoder, "w1 w2")[1]).max() > 1e-3, "the second text changed nothing"
    assert encoder.embed([]).shape == (0, 32) and encoder.embed("w1").shape == (1, 32)


def test_a_miss_runs_on_a_larger_bucket_while_its_own_is_compiled(path):
    with ji.load(path) as encoder, seen_events(events.Missed) as missed:
        expected = by_hand(encoder, "w1 w2")[0]
        go, programs, longest = threading.Event(), encoder._programs, max(encoder._work.ladder)
        programs.compile_all(encoder._work.ladder[longest][-1])
        lower, programs.lower = programs.lower, lambda key: go.wait(20) and lower(key)
        try:
            reply = encoder.submit("w1 w2")
            np.testing.assert_allclose(reply.result(10).vector, expected, atol=1e-5)
            assert [m.ran_on for m in missed] == [str(encoder._work.ladder[longest][-1])]
            assert reply.bytes_copied == 8 * 4, "two words between two special tokens: ids and segments"
        finally:
            go.set()


def test_after_warmup_nothing_compiles(encoder):
    encoder.warmup()
    assert len(encoder.ledger) <= 16
    seen = []
    with events.observe(seen.append):
        encoder.embed(["w1 " * n for n in range(0, 60, 3)])
    assert not [e for e in seen if isinstance(e, events.Compiling | events.Missed)]


@given(longest=st.integers(1, 1024), data=st.data())
def test_a_ladder_holds_every_batch(longest, data):
    ladder = encoder_ladder(longest)
    assert max(ladder) == longest and sum(map(len, ladder.values())) <= 15
    length = data.draw(st.integers(1, longest))
    rung = next(n for n in ladder if n >= length)
    assert rung < 2 * length or rung == min(ladder)
    for bucket in ladder[rung]:
        assert bucket.rows * (rung // 2) <= bucket.tokens or bucket.rows == 1


def test_weights_are_swapped_and_every_reply_names_its_version(encoder):
    old, before = encoder.params, encoder("w1").vector
    try:
        assert encoder.swap(jax.tree.map(lambda leaf: leaf * 1.5, old)) == 2
        reply = encoder.submit("w1")
        assert not np.allclose(reply.result(20).vector, before) and reply.version == 2
    finally:
        encoder.swap(old)
    np.testing.assert_array_equal(encoder("w1").vector, before)


def with_head(path, folder, labels, **config):
    """The same checkpoint with the first `labels` of its classes, or all."""
    for file in path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor[:labels] if name.startswith("classifier") else tensor for name, tensor in tensors.items()},
              folder / "model.safetensors")
    named = {str(i): CONFIG["id2label"][str(i)] for i in range(labels)}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "id2label": named, **config}))
    return ji.load(folder)


@pytest.mark.parametrize("labels, config", [(1, {}), (3, {"problem_type": "multi_label_classification"})])
def test_labels_that_exclude_nothing_are_likely_each_by_itself(path, tmp_path, labels, config):
    with with_head(path, tmp_path, labels, **config) as encoder:
        logits, (classes,) = encoder("w1 w2").logits, encoder.classify("w1 w2")
        np.testing.assert_allclose([classes[label] for label in encoder.graph.labels], 1 / (1 + np.exp(-logits)),
                                   rtol=1e-5)


def test_numbers_are_no_classes(path, tmp_path):
    with with_head(path, tmp_path, 1, problem_type="regression") as encoder:
        assert encoder("w1").logits.shape == (1,)
        with pytest.raises(InvalidRequest, match="gives numbers"):
            encoder.classify("w1")


def test_a_batch_of_the_shortest_texts_finds_its_bucket(path):
    with ji.load(path, max_context=48) as encoder, retries() as retried:
        assert min(encoder._work.ladder) == 3
        assert encoder.embed([""] * 200).shape == (200, 32) and not retried


def test_what_to_inspect_of_an_encoder_is_said(encoder):
    with pytest.raises(InvalidRequest, match=r"inspect got a TextEncoder.*give it a function of its graph"):
        ji.inspect(encoder, "a")


def test_quantised_it_says_nearly_the_same_in_fewer_bytes(encoder, path):
    texts = ["w1 w2 w3", "w7", "w5 w5 w1 w30"]
    with ji.load(path, quantize="w8a8") as small:
        cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
                   for a, b in zip(small.embed(texts), encoder.embed(texts), strict=True)]
        assert 0.99 < min(cosines) < 1
        assert held(small.params) < 0.45 * held(encoder.params), "positions, norms and biases are what is left"
        assert {entry.kernels["matmul_int8"] for entry in small.ledger if entry.hits} == {"w8a8"}
        before = small.embed(texts)
        small.swap(encoder.params)
        np.testing.assert_array_equal(small.embed(texts), before)


def test_an_encoder_that_was_saved_says_the_same(encoder, path, tmp_path):
    with ji.load(path, quantize="int8") as small:
        expected = small.embed("w1 w2")
        small.save(tmp_path / "small")
    with pytest.raises(Closed):
        small.save(tmp_path / "closed")
    with ji.load(tmp_path / "small") as again:
        np.testing.assert_array_equal(again.embed("w1 w2"), expected)
        assert again.graph.labels == encoder.graph.labels
    encoder.save(tmp_path / "theirs", format="huggingface")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "theirs"))
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_what_is_no_text_is_refused(encoder, path):
    for wrong, message in ((None, "texts are a NoneType"), (["\ud800"], "text is no Unicode")):
        with pytest.raises(InvalidRequest, match=message):
            encoder.embed(wrong)
    for wrong, message in ((7, "text is a int"), (("a", "b", "c"), "text is a tuple"),
                           (("w1 " * 50, "w2 " * 50), "the pair has 103 tokens; at most 64 fit")):
        with pytest.raises(InvalidRequest, match=message):
            encoder(wrong)
    for option in (dict(batch_invariant=True), dict(max_rows=2), dict(memory="1GiB"),
                   dict(prefix_host_memory="1MiB"), dict(kernels={"attend_rows": "blocks"})):
        with pytest.raises(InvalidOption, match=f"{next(iter(option))} cannot be given for an encoder"):
            ji.load(path, **option)


def test_a_body_has_no_classes(path, tmp_path):
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["BertModel"]}))
    # A body leaves the classifier of the checkpoint unread, which would be a surplus tensor.
    tensors = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("classifier")}
    save_file(tensors, tmp_path / "model.safetensors")
    with ji.load(tmp_path) as body:
        assert body("w1").logits is None
        with pytest.raises(InvalidRequest, match="has no head; classify is for models that classify texts"):
            body.classify("w1")
