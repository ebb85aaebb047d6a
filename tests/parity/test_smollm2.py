"""The real model: SmolLM2's greedy continuation equals that of transformers' own GGUF reader, in float32."""

import pytest

import jaxinfer as ji

pytestmark = [pytest.mark.parity, pytest.mark.smollm2]
torch = pytest.importorskip("torch")
PROMPTS = [
    "The sky is blue because", "Once upon a time there was a", "The capital of France is", "def fibonacci(n):\n",
    "Water boils at a temperature of", "In 1969, Neil Armstrong", "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to", "1, 2, 3, 4, 5,", "Привет! Как",
]


@pytest.fixture(scope="module")
def continuations(smollm2_path):
    """64 greedy tokens after each prompt, and the smallest gap between the two best logits, by transformers."""
    import transformers

    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64,
                             min_new_tokens=64, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
        best = torch.stack(out.logits).topk(2).values
        gap = (best[..., 0] - best[..., 1]).min().item()
        found.append((ids[0].tolist(), out.sequences[0, ids.shape[1]:].tolist(), gap))
    return found


def test_greedy_continuations_equal_those_of_transformers(continuations, smollm2_path):
    with ji.load(smollm2_path, dtype="float32", max_context=256, max_rows=8) as lm:
        assert [lm.tokenizer.encode(prompt) for prompt in PROMPTS] == [ids for ids, *_ in continuations]
        assert min(gap for *_, gap in continuations) > 1e-4, "the two best logits are too close to tell an error"
        together = lm.generate(PROMPTS, max_tokens=64)
        for output, (_, tokens, _) in zip(together, continuations, strict=True):
            stop = min((i + 1 for i, t in enumerate(tokens) if t in lm.tokenizer.eos_ids), default=64)
            assert list(output.tokens) == tokens[:stop]
            assert len(output.tokens) > 8
