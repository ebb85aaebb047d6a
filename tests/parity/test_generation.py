"""What may be asked of an answer, on the real model: its tokens and log-probabilities are those of transformers.

Everything is float32, and greedy tokens are compared up to the first step whose two best scores are nearly equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer import events

pytestmark = [pytest.mark.parity, pytest.mark.smollm2]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COUNT = 32
TIE = 1e-3  # two scores that differ by less may change places by rounding
PROMPTS = [
    "The sky is blue because", "Once upon a time there was a", "def fibonacci(n):\n",
    "Photosynthesis is the process by which", "1, 2, 3, 4, 5,", "The president of the United States is",
]
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
LONG = ("The following is a conversation about the history of science. Galileo Galilei was born in Pisa in 1564, and "
        "studied the motion of bodies and the moons of Jupiter. Isaac Newton was born in 1643, and found that the "
        "same force moves an apple and the Moon. Michael Faraday was born in 1791, the son of a blacksmith, and showed "
        "that a moving magnet makes a current. James Clerk Maxwell was born in Edinburgh in 1831, and wrote down the "
        "equations of light. ")
QUESTIONS = ["Question: Who was born in Pisa? Answer:", "Question: What did Faraday show? Answer:",
             "Albert Einstein was born in"]


class Penalties(transformers.LogitsProcessor):
    """OpenAI's: logits[j] -= c[j] * frequency + (c[j] > 0) * presence, where c counts the generated tokens."""

    def __init__(self, prompt: int, presence: float, frequency: float):
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, ids, scores):
        count = torch.bincount(ids[0, self.prompt:], minlength=scores.shape[-1])
        return scores - self.frequency * count - self.presence * (count > 0)


class Rowwise(transformers.LogitsProcessor):
    """Each row of a batch, whose first `padding[r]` tokens are none of its own, by its own processors."""

    def __init__(self, padding: list[int], rows: list[list]):
        self.padding, self.rows = padding, rows

    def __call__(self, ids, scores):
        scores = scores.clone()
        for r, processors in enumerate(self.rows):
            for process in processors:
                scores[r] = process(ids[r:r + 1, self.padding[r]:], scores[r:r + 1])[0]
        return scores


def translated(sampling: ji.Sampling, prompt: int, eos: int) -> list:
    """transformers' processors for our options."""
    s, forbidden = sampling, [token for token, bias in sampling.logit_bias.items() if bias == -np.inf]
    biases = {(token,): float(bias) for token, bias in s.logit_bias.items() if token not in forbidden}
    return [
        *([transformers.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)] if s.repetition_penalty != 1 else []),
        *([Penalties(prompt, s.presence_penalty, s.frequency_penalty)] if s.presence_penalty or s.frequency_penalty
          else []),
        *([transformers.SequenceBiasLogitsProcessor(biases)] if biases else []),
        *([transformers.SuppressTokensLogitsProcessor(forbidden)] if forbidden else []),
        *([transformers.PrefixConstrainedLogitsProcessor(lambda *_: list(s.allowed_tokens or ()), 1)]
          if s.allowed_tokens else []),
        *([transformers.MinNewTokensLengthLogitsProcessor(prompt, s.min_tokens, eos)] if s.min_tokens else []),
    ]


@dataclass(frozen=True)
class Expected:
    """A greedy answer of transformers, and how many of its tokens stand before the first near tie."""

    tokens: list[int]
    sure: int


def greedy(model: Any, asked: list[tuple[list[int], ji.Sampling]], count: int = COUNT) -> list[Expected]:
    """transformers' greedy answers to many prompts, in one batch that is padded on the left."""
    eos = model.generation_config.eos_token_id
    width = max(len(ids) for ids, _ in asked)
    padding = [width - len(ids) for ids, _ in asked]
    rows = [translated(sampling, len(ids), eos) for ids, sampling in asked]
    ids = torch.tensor([[0] * skip + ids for skip, (ids, _) in zip(padding, asked, strict=True)])
    mask = torch.tensor([[0] * skip + [1] * (width - skip) for skip in padding])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=None,
                         pad_token_id=0, logits_processor=transformers.LogitsProcessorList([Rowwise(padding, rows)]),
                         output_scores=True, return_dict_in_generate=True)
    gaps_RT = torch.stack([-scores.topk(2).values.diff()[:, 0] for scores in out.scores], 1)
    found = []
    for tokens, gaps_T, (_, sampling) in zip(out.sequences[:, width:].tolist(), gaps_RT.tolist(), asked, strict=True):
        if eos in tokens and not sampling.ignore_eos:
            tokens = tokens[: tokens.index(eos) + 1]
        found.append(Expected(tokens, next((t for t, gap in enumerate(gaps_T[: len(tokens)]) if gap < TIE),
                                           len(tokens))))
    return found


def same(output: ji.Output, expected: Expected) -> bool:
    """Whether the tokens are those of transformers, as far as those are sure (and as many, if all are)."""
    sure = expected.sure == len(expected.tokens)
    ours = output.tokens if sure else output.tokens[: expected.sure]
    return list(ours) == expected.tokens[: expected.sure]


def cases(encode) -> dict[str, list[tuple[str, ji.Sampling]]]:
    """Prompts with options, each of which alters the answer."""
    def of(prompts, **options):
        return [(prompt, ji.Sampling(max_tokens=COUNT, **options)) for prompt in prompts]

    some, the, comma, dot = PROMPTS[:2], *(encode(text)[0] for text in (" the", ",", "."))
    letters = tuple(range(48, 20000, 3))
    everything = dict(repetition_penalty=1.1, presence_penalty=0.4, frequency_penalty=0.3, min_tokens=COUNT,
                      logit_bias={the: -1.5, comma: 2.0}, allowed_tokens=(*letters, the, comma, dot))
    return {
        "nothing": of([*PROMPTS, CHAT]),
        "repetition_penalty": of(PROMPTS, repetition_penalty=1.3),
        "presence_penalty": of(some, presence_penalty=1.5),
        "frequency_penalty": of(some, frequency_penalty=0.8),
        "negative penalties": of(some, presence_penalty=-0.7, frequency_penalty=-0.2),
        "logit_bias": of(some, logit_bias={the: -3.0, comma: 4.5}),
        "logit_bias -inf": of(some, logit_bias={the: -np.inf, dot: -np.inf}),
        "allowed_tokens": of(some, allowed_tokens=letters),
        "min_tokens": of([CHAT], min_tokens=24),
        "ignore_eos": of([CHAT], ignore_eos=True),
        "everything": of(some, **everything),
    }


@pytest.fixture(scope="module")
def asked(smollm2_lm):
    return cases(lambda text: smollm2_lm.tokenizer.encode(text, add_special=False))


@pytest.fixture(scope="module")
def expected(smollm2_theirs, smollm2_lm, asked) -> dict[str, list[Expected]]:
    flat = [(smollm2_lm.tokenizer.encode(prompt), how) for case in asked.values() for prompt, how in case]
    found = iter(greedy(smollm2_theirs, flat))
    return {name: [next(found) for _ in case] for name, case in asked.items()}


@pytest.fixture(scope="module")
def served(smollm2_lm, asked) -> dict[str, list[ji.Output]]:
    """Our answers, in mixed batches."""
    flat = [pair for case in asked.values() for pair in case]
    found = iter(smollm2_lm.generate([prompt for prompt, _ in flat], [how for _, how in flat]))
    return {name: [next(found) for _ in case] for name, case in asked.items()}


def test_greedy_answers_are_those_of_transformers_whatever_is_asked_of_them(served, expected):
    wrong = [(name, output.text, their.tokens, their.sure) for name, answers in served.items()
             for output, their in zip(answers, expected[name], strict=True) if not same(output, their)]
    assert not wrong
    everyone = [their for case in expected.values() for their in case]
    sure = sum(their.sure for their in everyone) / sum(len(their.tokens) for their in everyone)
    assert sure > 0.9, f"only {sure:.0%} of the tokens stand before a near tie"


def test_every_option_alters_the_answer(asked, expected):
    plain = dict(zip((prompt for prompt, _ in asked["nothing"]), expected["nothing"], strict=True))
    for name in asked.keys() - {"nothing"}:
        for (prompt, _), their in zip(asked[name], expected[name], strict=True):
            assert their.tokens != plain[prompt].tokens, (name, prompt)
    assert len(plain[CHAT].tokens) < 24, "an answer that is long by itself says nothing of min_tokens"


def distributions(model: Any, tokens: list[int]) -> np.ndarray:
    """transformers' log-probabilities [T, V] of what follows each token."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()


def check_logprob(told: ji.request.Logprob, token: int, theirs_V: np.ndarray, count: int) -> float:
    """That `told` says what transformers' distribution says, ties aside; its largest error."""
    assert told.token == token and len(told.top) == count
    above = lambda value: 1 + (theirs_V > value).sum()
    assert above(theirs_V[token] + TIE) <= told.rank <= above(theirs_V[token] - TIE)
    best = np.sort(theirs_V)[::-1][:count]
    tokens, values = (np.array(column) for column in zip(*told.top, strict=True))
    assert len(set(tokens)) == count and (np.diff(values) <= 0).all()
    errors = [told.logprob - theirs_V[token], *(values - best), *(values - theirs_V[tokens])]
    return np.abs(errors).max()


def test_logprobs_are_of_the_models_own_distribution_whatever_the_draw(smollm2_lm, smollm2_theirs):
    draws = [dict(), dict(temperature=1.5, seed=7), dict(repetition_penalty=1.5),
             dict(temperature=1.0, top_p=0.9, logit_bias={28: 6.0}, seed=8)]
    hows = [ji.Sampling(max_tokens=16, logprobs=5, ignore_eos=True, **draw) for draw in draws]
    ranks = []
    for output in smollm2_lm.generate(PROMPTS[: len(hows)], hows):
        prompt = list(output.prompt_tokens)
        theirs_TV = distributions(smollm2_theirs, prompt + list(output.tokens))[len(prompt) - 1:]
        assert output.logprobs is not None and len(output.logprobs) == len(output.tokens)
        for told, token, theirs_V in zip(output.logprobs, output.tokens, theirs_TV, strict=False):
            assert check_logprob(told, token, theirs_V, 5) < 3e-4
            ranks.append(told.rank)
    assert set(ranks[:16]) == {1}, "a greedy token is the likeliest"
    assert max(ranks) > 5


@pytest.fixture
def in_chunks(smollm2_lm, monkeypatch):
    """Prompts are read 32 tokens at a time."""
    monkeypatch.setattr(smollm2_lm._engine.scheduler, "chunk", 32)
    executables = smollm2_lm._engine.executables
    monkeypatch.setattr(executables, "ladder", replace(executables.ladder, chunk=32))


def test_prompt_logprobs_and_scores_are_those_of_one_pass_of_transformers(in_chunks, smollm2_lm, smollm2_theirs):
    texts = [LONG, PROMPTS[0] + " of the way light is scattered."]
    smollm2_lm.generate(texts, max_tokens=4)  # what others have read is of no use to who wants all of a prompt
    outputs = smollm2_lm.generate(texts, max_tokens=4, prompt_logprobs=5, logprobs=5)
    for output, score in zip(outputs, smollm2_lm.score(texts), strict=True):
        prompt = list(output.prompt_tokens)
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        theirs_TV = distributions(smollm2_theirs, prompt + list(output.tokens))
        told = [*output.prompt_logprobs[1:], *output.logprobs]
        following = prompt[1:] + list(output.tokens)
        for one, token, theirs_V in zip(told, following, theirs_TV[:-1], strict=True):
            assert check_logprob(one, token, theirs_V, 5) < 3e-4
        assert list(score.tokens) == prompt
        np.testing.assert_allclose(score.logprobs, [one.logprob for one in told[: len(prompt) - 1]], atol=3e-4)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            loss = smollm2_theirs(ids, labels=ids).loss.item()
        assert score.perplexity == pytest.approx(np.exp(loss), rel=1e-4)


def test_embeddings_are_pooled_from_the_last_hidden_states_of_transformers(in_chunks, smollm2_lm, smollm2_theirs):
    texts = [LONG, *PROMPTS[:2]]  # also read before, by the other tests or by the first of these two
    for pooling in ("mean", "last"):
        ours_ND = smollm2_lm.embed(texts, pooling=pooling)
        for text, ours_D in zip(texts, ours_ND, strict=True):
            with torch.no_grad():
                hidden_TD = smollm2_theirs.base_model(torch.tensor([smollm2_lm.tokenizer.encode(text)])
                                                      ).last_hidden_state[0].numpy()
            theirs_D = hidden_TD.mean(0) if pooling == "mean" else hidden_TD[-1]
            assert np.linalg.norm(ours_D - theirs_D) < 1e-4 * np.linalg.norm(theirs_D)


@pytest.fixture(scope="module")
def conversations(smollm2_lm, smollm2_theirs):
    """Prompts with a long beginning in common, and their answers."""
    prompts = [smollm2_lm.tokenizer.encode(LONG + question) for question in QUESTIONS]
    answers = greedy(smollm2_theirs, [(prompt, ji.Sampling()) for prompt in prompts], 24)
    assert sum(answer.sure for answer in answers) > 0.9 * sum(len(answer.tokens) for answer in answers)
    return prompts, answers


def test_chunks_do_not_change_the_answer(in_chunks, smollm2_lm, conversations):
    prompts, answers = conversations
    steps = smollm2_lm.stats.steps
    outputs = smollm2_lm.generate(prompts, max_tokens=24, reuse=False)
    assert smollm2_lm.stats.steps - steps >= 3 * 4 + 23
    assert all(map(same, outputs, answers)) and not any(output.reused for output in outputs)


def test_what_others_have_read_does_not_change_the_answer(smollm2_lm, conversations):
    prompts, answers = conversations
    smollm2_lm(prompts[0], max_tokens=1)
    outputs = smollm2_lm.generate(prompts, max_tokens=24)
    assert all(map(same, outputs, answers))
    assert min(output.reused for output in outputs) >= 64
    longer = [prompt + answer.tokens[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    again = smollm2_lm.generate(longer, max_tokens=1)
    for output, answer in zip(again, answers, strict=True):
        assert output.reused >= 64 and (answer.sure < 24 or output.tokens[0] == answer.tokens[-1])


def test_forks_do_not_change_the_answer(smollm2_lm, conversations):
    prompts, answers = conversations
    for prompt, answer in zip(prompts, answers, strict=True):
        output = smollm2_lm(prompt, max_tokens=24, n=3, reuse=False)
        assert len(output.samples) == 3 and all(same(sample, answer) for sample in output.samples)
        assert all(sample.reused >= len(prompt) - 1 for sample in output.samples[1:])


def test_after_warmup_nothing_compiles_whatever_is_asked(smollm2_path):
    """In batch-invariant mode, where there is one bucket to compile."""
    with ji.load(smollm2_path, dtype="float32", max_context=64, max_rows=4, batch_invariant=True) as lm:
        lm.warmup()
        seen = []
        listen = lambda event, *_, **__: seen.append(event) if "backend_compile" in event else None
        jax.monitoring.register_event_duration_secs_listener(listen)  # XLA itself, not only what we know of
        hows = [dict(), dict(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, seed=3, n=3), dict(logprobs=5),
                dict(repetition_penalty=1.3, logit_bias={28: 1.0}, min_tokens=4), dict(temperature=1.0, logprobs=20),
                dict(presence_penalty=0.5, frequency_penalty=0.5, allowed_tokens=tuple(range(100, 900)), logprobs=0)]
        with events.observe(lambda e: seen.append(e) if isinstance(e, events.Compiling | events.Missed) else None):
            outputs = lm.generate(PROMPTS, [ji.Sampling(max_tokens=6, **how) for how in hows])
            lm(LONG[:200], max_tokens=3)
        assert seen == []
        assert sum(len(sample.tokens) for output in outputs for sample in output.samples or (output,)) > 30
