"""What embeddings are made of: the hidden states of every token are transformers' `last_hidden_state`."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.frontend.architectures import architecture
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.weights import load_params
from tests.parity.families import MAX_CONTEXT, make
from tests.parity.harness import Rows

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
PROMPTS = [np.random.default_rng(i).integers(0, 96, size).tolist() for i, size in enumerate((93, 7, 41))]
CHUNKS = (16, 5, 11)


@functools.cache
def models(family: str):
    with tempfile.TemporaryDirectory() as directory:  # the tensors stay mapped when it is gone
        theirs = make(family, Path(directory))
        opened = open_checkpoint(directory)
    graph = architecture(opened.config, max_context=MAX_CONTEXT).graph()
    return theirs, graph, load_params(graph, opened.tensors, dtype="float32", source="tiny")


# A norm before, after and on both sides of a layer's halves; a window; positions that are added.
@pytest.mark.parametrize("family", ["llama3", "olmo2", "gemma2", "gpt2"])
def test_hidden_states_are_those_of_transformers_whole_and_in_chunks(family):
    theirs, graph, params = models(family)
    whole = Rows(graph, params, len(PROMPTS), MAX_CONTEXT).hidden(PROMPTS)
    rows, parts, left, step = Rows(graph, params, len(PROMPTS), MAX_CONTEXT), [[] for _ in PROMPTS], PROMPTS, 0
    while any(left):
        sizes = [CHUNKS[(step + r) % len(CHUNKS)] for r in range(len(left))]
        read = rows.hidden([row[:size] for row, size in zip(left, sizes, strict=True)])
        parts = [[*part, new_TD] for part, new_TD in zip(parts, read, strict=True)]
        left, step = [row[size:] for row, size in zip(left, sizes, strict=True)], step + 1
    for prompt, whole_TD, chunks in zip(PROMPTS, whole, parts, strict=True):
        with torch.no_grad():
            expected_TD = theirs.base_model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        assert expected_TD.std() > 0.3, "flat states prove nothing"
        np.testing.assert_allclose(whole_TD, expected_TD, atol=1e-4, rtol=0)
        np.testing.assert_allclose(np.concatenate(chunks), expected_TD, atol=1e-4, rtol=0)
