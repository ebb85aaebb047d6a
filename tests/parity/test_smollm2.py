"""The real model: SmolLM2's greedy continuation equals that of transformers' own GGUF reader, in float32."""

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.smollm2]
torch = pytest.importorskip("torch")
PROMPTS = [
    "The sky is blue because", "Once upon a time there was a", "The capital of France is", "def fibonacci(n):\n",
    "Water boils at a temperature of", "In 1969, Neil Armstrong", "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to", "1, 2, 3, 4, 5,", "Привет! Как",
]


@pytest.fixture(scope="module")
def continuations(smollm2_theirs, smollm2_path):
    """64 greedy tokens after each prompt, and the smallest gap between the two best logits, by transformers."""
    import transformers

    model = smollm2_theirs
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=64, output_logits=True,
                         return_dict_in_generate=True, pad_token_id=0)
    best = torch.stack(out.logits, 1).topk(2).values
    found = []
    for prompt, tokens, best_T2 in zip(prompts, out.sequences[:, width:].tolist(), best, strict=True):
        eos = model.generation_config.eos_token_id
        count = tokens.index(eos) + 1 if eos in tokens else 64
        found.append((prompt, tokens[:count], (best_T2[:count, 0] - best_T2[:count, 1]).min().item()))
    return found


def test_greedy_continuations_equal_those_of_transformers(continuations, smollm2_lm):
    assert [smollm2_lm.tokenizer.encode(prompt) for prompt in PROMPTS] == [ids for ids, *_ in continuations]
    assert min(gap for *_, gap in continuations) > 1e-4, "the two best logits are too close to tell an error"
    together = smollm2_lm.generate(PROMPTS, max_tokens=64)
    for output, (_, tokens, _) in zip(together, continuations, strict=True):
        assert list(output.tokens) == tokens
    assert sum(len(output.tokens) for output in together) > 400
