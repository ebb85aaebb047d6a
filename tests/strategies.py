"""Rules and histories at random, for the property tests of what samples and edits; `jaxinfer.testing` has the rest."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st


class Rules(NamedTuple):
    """How one row draws; see `kernels.sampling.Draws`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


def sampling_rules(vocab: int) -> st.SearchStrategy[Rules]:
    """Each filter off, sharp or loose, in any company."""
    return st.builds(
        Rules,
        temperature=st.sampled_from((0.0, 0.25, 1.0, 3.0)),
        top_k=st.one_of(st.just(0), st.integers(1, vocab + 3)),
        top_p=st.one_of(st.just(1.0), st.floats(2**-7, 1.0, width=32)),
        min_p=st.one_of(st.just(0.0), st.floats(2**-10, 1.0, width=32)),
    )


class EditRules(NamedTuple):
    """How one row's logits are edited; see `kernels.edits.Edits`. `biases` tokens are biased, and about a part
    `allowed` of all tokens is allowed."""

    repetition: float
    presence: float
    frequency: float
    biases: int
    allowed: float
    length: int
    prompt: int


@st.composite
def edit_rules(draw, most_biases: int, context: int) -> EditRules:
    """Each edit off, weak or strong, in any company, after a history that may be empty or full."""
    length = draw(st.integers(0, context))
    return EditRules(
        repetition=draw(st.sampled_from((1.0, 0.5, 1.25, 2.0))),
        presence=draw(st.sampled_from((0.0, -2.0, 0.5, 2.0))),
        frequency=draw(st.sampled_from((0.0, -1.5, 0.125, 2.0))),
        biases=draw(st.one_of(st.just(0), st.integers(1, most_biases))),
        allowed=draw(st.sampled_from((1.0, 0.5, 0.05))),
        length=length,
        prompt=draw(st.integers(0, length)),
    )
