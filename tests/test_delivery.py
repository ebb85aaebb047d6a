"""From tokens to text: what is shown, what is held back, and what comes with it."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.request import Sampling, Sequence
from jaxinfer.runtime.delivery import Sample
from tests import tiny
from tests.running import all_free, at_rest, eventually, hooked

pytestmark = pytest.mark.usefixtures("in_haste")

EOS = 1


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **tiny.ONE_BUCKET) as lm:
        yield lm


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "lm" in request.fixturenames:
        lm = request.getfixturevalue("lm")
        assert eventually(lambda: at_rest(lm)), "something runs on"


# Stop strings.


@dataclass
class Shown:
    """What a Sample has shown of a text that came in parts."""

    sample: Sample
    parts: list[str] = field(default_factory=list)
    stopped: bool = False

    def add(self, text, final=False):
        if not self.stopped:
            self.sample.tokens.append(7)
            show, self.stopped = self.sample.add(text, final)
            self.parts.append(show)


def sample_for(stop, **options):
    return Sample(Sequence(0, [7], 1, Sampling(stop=stop, **options)), 0, None)


def cut(text, stops):
    """Where a text ends that ends with the first stop string to be complete."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(found)[1] if found else len(text)


LETTERS = st.text("ab", max_size=12)


@given(parts=st.lists(LETTERS, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@example(parts=["a", "a", "b"], stops=["ab"])
@example(parts=["aab", "ab"], stops=["aabaa", "b"])
def test_a_stop_string_is_found_across_any_borders_and_never_leaks(parts, stops):
    shown, whole = Shown(sample_for(stops)), ""
    for part in parts:
        before = whole
        whole += part
        shown.add(part)
        if shown.stopped:
            break
        said = "".join(shown.parts)
        assert whole.startswith(said) and not any(stop in whole for stop in stops)
        held = whole[len(said):]
        assert held == "" or any(stop.startswith(held) for stop in stops), "held back without need"
        assert not any(stop.startswith(whole[i:]) for i in range(len(said)) for stop in stops), "shown too early"
    else:
        shown.add("", final=True)
        assert "".join(shown.parts) == whole and not shown.stopped
        return
    assert "".join(shown.parts) == whole[: cut(whole, stops)] and not any(stop in before for stop in stops)
    by_letter = Shown(sample_for(stops))
    for letter in whole:
        by_letter.add(letter)
    assert "".join(by_letter.parts) == "".join(shown.parts), "it matters how the text is cut"


def test_no_stop_string_counts_before_min_tokens():
    shown = Shown(sample_for(["b"], min_tokens=2))
    for part in ("ab", "ab", "ab"):
        shown.add(part)
    assert "".join(shown.parts) == "ababa" and shown.stopped


@pytest.fixture(scope="module")
def answers(lm):
    """Answers whose text random stop strings are cut from: three samples of each prompt."""
    ask = dict(max_tokens=40, ignore_eos=True, temperature=1.0, n=3)
    return {p: (dict(ask, seed=s), lm(p, seed=s, **ask)) for s, p in enumerate(("Once", "w1 w2", "é"), 5)}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), prompt=st.sampled_from(("Once", "w1 w2", "é")))
def test_stop_strings_cut_from_the_answers_end_every_sample_where_they_first_occur(lm, answers, data, prompt):
    ask, whole = answers[prompt]
    texts, stops = [s.text for s in whole.samples], []
    for _ in range(data.draw(st.integers(1, 3))):
        text = data.draw(st.sampled_from(texts))
        at = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[at:at + data.draw(st.integers(1, 6))])
    pieces = list(lm.submit(prompt, stop=stops, **ask))
    for i, (text, sample) in enumerate(zip(texts, pieces[-1].output.samples or (pieces[-1].output,), strict=True)):
        end = cut(text, stops)
        own = [p for p in pieces if p.index == i]
        assert sample.text == "".join(p.text for p in own) == text[:end]
        assert sample.finish_reason == own[-1].finish_reason == ("stop" if end < len(text) else "length")
        assert sample.tokens == sum((p.tokens for p in own), ()) == whole.samples[i].tokens[: len(sample.tokens)]
        assert lm.tokenizer.decode(sample.tokens).startswith(text[:end])
        assert len(sample.tokens) == 40 or end < len(text), "it ended early for nothing"


def test_a_stop_string_ends_the_drawing_too(lm):
    whole = lm("Once", max_tokens=200, ignore_eos=True)
    with hooked(lm, lambda key: None):
        before = lm.stats.steps
        stopped = lm("Once", max_tokens=200, ignore_eos=True, stop=whole.text[2:5])
    assert stopped.text == whole.text[: whole.text.index(whole.text[2:5])] and len(stopped.tokens) < 10
    assert eventually(lambda: all_free(lm)) and lm.stats.steps - before < 100, "it drew on for nobody"


# Ends.


def test_the_models_own_end_is_left_out_of_the_text_and_can_be_ignored(lm):
    eos = dict(logit_bias={EOS: 1e9})
    ended = lm("Once", max_tokens=5, **eos)
    assert (ended.tokens, ended.text, ended.finish_reason) == ((EOS,), "", "stop")
    ignored = lm("Once", max_tokens=5, ignore_eos=True, **eos)
    assert (ignored.tokens, ignored.text, ignored.finish_reason) == ((EOS,) * 5, "", "length")


@pytest.mark.parametrize("least", [1, 3, 5])
def test_no_stop_token_is_drawn_before_min_tokens(lm, least):
    drawn = lm("Once", max_tokens=9, min_tokens=least, logit_bias={EOS: 1e9})
    assert len(drawn.tokens) == least + 1 and drawn.tokens[-1] == EOS and EOS not in drawn.tokens[:-1]
    own = lm("Once", max_tokens=9, min_tokens=least, logit_bias={76: 1e9}, stop_tokens=[76])
    assert len(own.tokens) == least + 1 and own.tokens[-1] == 76 and 76 not in own.tokens[:-1]


def test_echo_begins_with_the_prompt_as_it_was_given(lm):
    plain = lm("Once é", max_tokens=6)
    assert lm("Once é", max_tokens=6, echo=True).text == "Once é" + plain.text
    assert lm(lm.tokenizer.encode("Once é"), max_tokens=6, echo=True).text == "Once é" + plain.text
    only = lm("Once", max_tokens=0, echo=True)
    assert (only.text, only.tokens, only.finish_reason) == ("Once", (), "length")
    both = lm("Once", max_tokens=4, echo=True, n=2, temperature=1.0, seed=1).samples
    assert all(s.text.startswith("Once") for s in both) and both[0].text != both[1].text


def test_times_are_in_order(lm):
    timings = lm("Once", max_tokens=8, ignore_eos=True).timings
    assert 0 <= timings.queued <= timings.first_token <= timings.total and timings.tokens == 8


# Log-probabilities.


def test_a_request_is_timed_for_who_listens_and_for_nobody_else(lm, monkeypatch):
    closed, close = [], lm._delivery._close
    monkeypatch.setattr(lm._delivery, "_close", lambda ticket, reason: (closed.append(ticket), close(ticket, reason)))
    lm("w1 w2", max_tokens=4, ignore_eos=True)
    ended: list[events.Event] = []
    with events.observe(ended.append):
        output = lm([7] * 80, max_tokens=4, ignore_eos=True, reuse=False)
    unseen, seen = closed
    assert not unseen.samples[0].drawn and not unseen.chunks and unseen.detokenised == 0
    assert len(seen.samples[0].drawn) == 4 and sum(tokens for *_, tokens in seen.chunks) == 80
    (event,) = (event for event in ended if isinstance(event, events.RequestEnded))
    marks = event.marks
    assert (event.reason, event.prompt_tokens, event.tokens, event.reused) == ("length", 80, 4, 0)
    assert marks.submitted <= marks.began <= marks.chunks[0][0] <= marks.chunks[-1][1] <= marks.drawn[0][0]
    assert marks.drawn[0][-1] <= marks.ended and marks.drawn[0][0] - marks.submitted == output.timings.first_token


def test_each_token_comes_with_its_logprob_and_the_likeliest(lm):
    greedy = lm("Once", max_tokens=8, logprobs=3)
    for told, token in zip(greedy.logprobs, greedy.tokens, strict=True):
        assert told.token == token == told.top[0][0] and told.rank == 1 and told.logprob == told.top[0][1] < 0
        assert len(told.top) == 3 and [p for _, p in told.top] == sorted((p for _, p in told.top), reverse=True)
    assert lm("Once", max_tokens=8).logprobs is None
    assert [told.top for told in lm("Once", max_tokens=2, logprobs=0).logprobs] == [(), ()]
    drawn = lm("Once", max_tokens=20, logprobs=20, temperature=1.5, seed=1).logprobs
    assert any(told.rank > 1 for told in drawn)
    for told in drawn:
        if told.rank <= 20:
            assert told.top[told.rank - 1] == (told.token, told.logprob)


def test_logprobs_are_the_models_own_whatever_is_done_before_the_draw(lm):
    edited = lm("Once", max_tokens=1, logprobs=20, allowed_tokens=[11], temperature=0.3, seed=1).logprobs[0]
    plain = lm("Once", max_tokens=1, logprobs=20).logprobs[0]
    assert edited.token == 11 and edited.top == plain.top
    assert edited.logprob <= plain.logprob


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
def test_a_score_is_the_prompts_logprobs(lm, length):
    tokens = np.random.default_rng(2).integers(4, 320, length).tolist()
    (score,) = lm.score([tokens])
    output = lm(tokens, max_tokens=2, prompt_logprobs=2)
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == length
    told = output.prompt_logprobs[1:]
    assert score.tokens == tuple(tokens) and score.logprobs == tuple(t.logprob for t in told)
    assert [t.token for t in told] == tokens[1:] and all(len(t.top) == 2 for t in told)
    assert output.tokens == lm(tokens, max_tokens=2).tokens


def test_a_score_is_what_the_tokens_cost_when_they_are_drawn(lm):
    drawn = lm("Once", max_tokens=20, logprobs=0, ignore_eos=True, temperature=1.0, seed=4)
    (score,) = lm.score([[*drawn.prompt_tokens, *drawn.tokens]])
    np.testing.assert_allclose(score.logprobs[-20:], [t.logprob for t in drawn.logprobs], atol=2e-5)
    assert score.perplexity == pytest.approx(np.exp(-np.mean(score.logprobs)))


# Embeddings.


def test_an_embedding_is_pooled_over_chunks_as_over_one(lm):
    """Of a prompt of three chunks: the mean of what the prefixes' last vectors are."""
    tokens = np.random.default_rng(3).integers(4, 320, 40).tolist()
    prefixes = [tokens[: i + 1] for i in range(40)]
    last_ND, mean_ND = lm.embed(prefixes, pooling="last"), lm.embed(prefixes)
    assert last_ND.shape == mean_ND.shape == (40, 64) and last_ND.dtype == np.float32
    means_ND = np.cumsum(last_ND, 0) / np.arange(1, 41)[:, None]
    np.testing.assert_allclose(mean_ND, means_ND, atol=1e-4)
    assert np.abs(last_ND).max() > 0.1
    assert lm.embed([]).shape[0] == 0


def test_a_prompt_that_is_read_again_is_pooled_and_scored_once(lm):
    tokens = np.random.default_rng(3).integers(4, 320, 40).tolist()
    expected, score = lm.embed([tokens]), lm.score([tokens])
    for kind, ask, wanted in (("embed", lm.embed, expected), ("score", lm.score, score)):
        calls = []

        def fails_once(key, kind=kind, calls=calls):
            if key.kind != kind:
                return None
            calls.append(key)
            if len(calls) != 2:
                return None

            def broken(*_):
                raise RuntimeError("the device is on fire")

            return broken

        with hooked(lm, fails_once):
            found = ask([tokens])
        assert len(calls) > 2, "nothing failed"
        assert np.array_equal(found, wanted) if kind == "embed" else found == wanted
