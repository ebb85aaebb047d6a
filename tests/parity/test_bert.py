"""Encoders say what transformers says, flat and unpadded; and all-MiniLM-L6-v2 what sentence-transformers says."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

import jaxinfer
from jaxinfer.errors import CheckpointMismatch, InvalidOption, UnsupportedModel
from jaxinfer.frontend.architectures import architecture
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.encoders import ENCODERS, HARMLESS, encoder_config
from jaxinfer.frontend.keys import HARMLESS as ALWAYS_HARMLESS
from jaxinfer.frontend.sentence import read_pipeline
from jaxinfer.frontend.tokenizer import from_directory
from jaxinfer.frontend.weights import load_params
from tests.encoding import Bucket, encode_run, logits_run, states_run

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=160, layer_norm_eps=0.01, num_labels=5)
DISTIL = dict(vocab_size=96, dim=48, hidden_dim=80, n_layers=3, n_heads=4, max_position_embeddings=160, num_labels=5)
FAMILIES = {
    "bert": (transformers.BertConfig, SHAPE | dict(type_vocab_size=3, hidden_act="gelu_new")),
    "roberta": (transformers.RobertaConfig, SHAPE | dict(type_vocab_size=2)),
    "xlm-roberta": (transformers.XLMRobertaConfig, SHAPE | dict(pad_token_id=4, type_vocab_size=1)),
    "camembert": (transformers.CamembertConfig, SHAPE),
    "distilbert": (transformers.DistilBertConfig, DISTIL),
    "mpnet": (transformers.MPNetConfig, SHAPE),  # its code knows 32 buckets only, whatever the config says
}
HEADS = {"base": transformers.AutoModel, "sequence": transformers.AutoModelForSequenceClassification,
         "token": transformers.AutoModelForTokenClassification, "masked": transformers.AutoModelForMaskedLM}
BUCKET = Bucket(200, 4, 144)
ROWS = [np.random.default_rng(i).integers(5, 96, size).tolist() for i, size in enumerate((140, 1, 41))]


def make(family: str, head: str) -> transformers.PreTrainedModel:
    """A random model: norms and biases too, so that hidden states and logits are far from flat."""
    kind, keys = FAMILIES[family]
    model = HEADS[head].from_config(kind(**keys), attn_implementation="eager", dtype=torch.float32)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            one_dimensional = weight.ndim == 1
            noise = torch.randn(weight.shape, generator=random)
            norm = one_dimensional and "norm" in name.lower() and name.endswith("weight")
            scale = 0.3 if one_dimensional else 0.6 if "embedding" in name or "relative" in name else (
                (4 if name.startswith("classifier") else 1.8) * weight.shape[-1] ** -0.5)
            weight.copy_(noise * scale + norm)
    return model.eval()


@functools.cache
def checkpoint(family: str, head: str):
    with tempfile.TemporaryDirectory() as directory:  # the tensors stay mapped when it is gone
        model = make(family, head)
        model.save_pretrained(directory)
        opened = open_checkpoint(directory)
    return model, opened.config, opened.tensors


def load(config: dict, tensors):
    encoder = architecture(config).graph()
    return encoder, load_params(encoder, tensors, dtype="float32", source="tiny")


def theirs(model, rows, segments=None):
    """What transformers says of each row by itself."""
    kinds = lambda r: {} if segments is None else {"token_type_ids": torch.tensor([segments[r]])}
    with torch.no_grad():
        return [model(torch.tensor([row]), **kinds(r)) for r, row in enumerate(rows)]


def segments_of(family: str):
    """Two texts in each row, where the family knows segments."""
    if family not in ("bert", "roberta"):
        return None
    return [[int(t >= len(row) // 2) for t in range(len(row))] for row in ROWS]


@pytest.mark.parametrize("head", ["base", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(family, head):
    model, config, tensors = checkpoint(family, head)
    encoder, params = load(config, tensors)
    said = states_run(encoder, params, ROWS, BUCKET, segments=segments_of(family))
    for ours, expected in zip(said, theirs(model.base_model, ROWS, segments_of(family)), strict=True):
        expected = expected.last_hidden_state[0].numpy()
        assert expected.std() > 0.3, "flat states prove nothing"
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, head):
    model, config, tensors = checkpoint(family, head)
    encoder, params = load(config, tensors)
    said = logits_run(encoder, params, ROWS, BUCKET, segments_of(family))
    expected = [output.logits[0].numpy() for output in theirs(model, ROWS, segments_of(family))]
    assert np.concatenate([x.ravel() for x in expected]).std() >= 1, "flat logits prove nothing"
    assert encoder.labels == tuple(f"LABEL_{i}" for i in range(5))
    for ours, wanted in zip(said, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=0)


OTHER = {"gelu": "relu", "gelu_new": "relu", "absolute": "relative_key"}


def flipped(value):
    """Another value of the same kind."""
    match value:
        case bool(): return not value
        case int(): return value * 2 if value > 1 else 1 - value
        case float(): return value * 1.5
        case str(): return OTHER[value]
        case _: return 16


def heeded(family: str) -> list[str]:
    kind, keys = FAMILIES[family]
    harmless = ALWAYS_HARMLESS | HARMLESS | ENCODERS[family].harmless
    return sorted(json.loads(kind(**keys).to_json_string()).keys() - harmless - {"add_cross_attention"})


@pytest.mark.parametrize(("family", "key"), [(family, key) for family in FAMILIES for key in heeded(family)])
def test_a_key_that_alters_the_mathematics_is_heeded(family, key):
    model, config, tensors = checkpoint(family, "base")
    try:
        encoder, params = load(config | {key: flipped(config.get(key))}, tensors)
    except (UnsupportedModel, CheckpointMismatch, InvalidOption):
        return
    said = states_run(encoder, params, ROWS[2:], BUCKET)[0]
    assert abs(said - theirs(model, ROWS[2:])[0].last_hidden_state[0].numpy()).max() > 1e-3


# --- the real model ---

TEXTS = [
    "A man is eating food.", "The new movie is awesome", "x", "", "Ünïcödé, 中文字符 and emoji 🙂 in one línea",
    "def f(x):\n    return x ** 2  # squared", "THE SAME IN CAPITALS", "the same in capitals",
    "word " * 400, "A sentence of medium length, with punctuation; and a number: 3.14159.",
    " ".join(f"item {i}" for i in range(100)),
]


@pytest.fixture(scope="module")
def minilm():
    from jaxinfer.frontend.catalog import resolve

    return resolve("all-minilm-l6-v2")


def by_transformers(directory: Path) -> np.ndarray:
    """Mean over the tokens, normalised, text by text: the pipeline that this model's files describe."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256)).last_hidden_state
                  for text in TEXTS]
        vectors = torch.stack([x[0].mean(0) for x in states])
        return torch.nn.functional.normalize(vectors).numpy()


def by_sentence_transformers(directory: Path) -> np.ndarray:
    package = pytest.importorskip("sentence_transformers")
    return package.SentenceTransformer(str(directory), device="cpu").encode(TEXTS)


@pytest.mark.parametrize("peer", [by_transformers, by_sentence_transformers])
def test_minilm_gives_the_vectors_of(peer, minilm):
    checkpoint, pipeline, tokenizer = open_checkpoint(minilm), read_pipeline(minilm), from_directory(minilm)
    assert (pipeline.pooling, pipeline.normalise, pipeline.max_length) == (("mean",), True, 256)
    encoder = architecture(checkpoint.config).graph()
    params = load_params(encoder, checkpoint.tensors, dtype="float32", source="minilm")
    rows = [tokenizer.encode(text) for text in TEXTS]
    assert rows[3] == [101, 102] and max(map(len, rows)) > 256
    rows = [row if len(row) <= 256 else [*row[:255], row[-1]] for row in rows]
    bucket = Bucket(sum(map(len, rows)) + 7, len(rows) + 1, 256)
    vectors = encode_run(encoder, params, rows, bucket, pipeline.pooling, pipeline.normalise)
    expected = peer(minilm)
    error = abs(vectors - expected).max()
    assert error <= 1e-5
    with jaxinfer.load("all-minilm-l6-v2", dtype="float32") as loaded:
        assert abs(loaded.embed(TEXTS) - expected).max() <= 1e-5
    assert (expected @ expected.T).min() < 0.1, "vectors all alike prove nothing"


def test_the_tokenizer_gives_the_ids_of_transformers(minilm):
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    ours = from_directory(minilm)
    assert [ours.encode(text) for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert encoder_config(open_checkpoint(minilm).config).max_context == 512
