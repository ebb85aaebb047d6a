"""An encoder's promises on a tiny random BERT: padding is inert, neighbours and the bucket change only rounding."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.frontend.encoders import encoder_config
from jaxinfer.graph import Leaf
from jaxinfer.graphs import bert
from jaxinfer.testing import SEEDS
from tests.encoding import Bucket, logits_run, states_run

pytestmark = pytest.mark.usefixtures("strict")
SHAPE = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
             max_position_embeddings=20)
CONFIGS = {
    "bert": SHAPE | dict(model_type="bert", architectures=["BertForSequenceClassification"], num_labels=5),
    "bert of tokens": SHAPE | dict(model_type="bert", architectures=["BertForTokenClassification"]),
    "mpnet": SHAPE | dict(model_type="mpnet", relative_attention_num_buckets=8,
                          architectures=["MPNetForSequenceClassification"]),
}
BUCKET, ALONE = Bucket(40, 5, 16), Bucket(16, 1, 16)
TEXTS = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=16), min_size=1, max_size=5).filter(
    lambda rows: sum(map(len, rows)) <= BUCKET.tokens)


@cache
def model(name: str):
    encoder, rng = bert.build(encoder_config(CONFIGS[name])), np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * (1.4 * leaf.shape[-1] ** -0.5), jnp.float32)
    return encoder, jax.tree.map(draw, encoder.spec, is_leaf=lambda x: isinstance(x, Leaf))


@pytest.mark.parametrize("name", CONFIGS)
@given(rows=TEXTS, junk=st.integers(0, 49))
def test_a_row_reads_the_same_alone_and_among_others(name, rows, junk):
    encoder, params = model(name)
    together, other = (states_run(encoder, params, rows, BUCKET, filler) for filler in (0, junk))
    logits = logits_run(encoder, params, rows, BUCKET)
    for r, row in enumerate(rows):
        np.testing.assert_array_equal(together[r], other[r], err_msg="padding is not inert")
        np.testing.assert_allclose(together[r], states_run(encoder, params, [row], ALONE)[0], atol=2e-5)
        np.testing.assert_allclose(logits[r], logits_run(encoder, params, [row], ALONE)[0], atol=2e-5)


@given(seed=SEEDS)
def test_positions_and_segments_are_seen(seed):
    encoder, params = model("bert")
    row = np.random.default_rng(seed).integers(0, 50, 6).tolist()
    read = lambda tokens, segments: states_run(encoder, params, [tokens], ALONE, segments=[segments])[0]
    plain = read(row, [0] * 6)
    np.testing.assert_array_equal(plain, states_run(encoder, params, [row], ALONE)[0])
    assert abs(plain - read(row, [0, 0, 0, 1, 1, 1])).max() > 1e-2
    assert abs(plain - read(row[::-1], [0] * 6)[::-1]).max() > 1e-2 or row == row[::-1]
