"""transformers loads what we write for it, and holds the weights that it once made, to the bit."""

import pytest

from jaxinfer.runtime.convert import convert
from tests.parity.families import logits, make

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
FAMILIES = "llama3", "mixtral", "qwen3-moe", "phi3", "gemma2", "gpt2"  # each way in which names and tensors differ


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_came_through_our_formats_is_transformers_model(family, tmp_path):
    model = make(family, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs again", to="huggingface")
    found, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs again", attn_implementation="eager", output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    wanted = model.state_dict()
    assert found.dtype == torch.float32 and found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in found.state_dict().items())
    tokens = list(range(40))
    assert torch.equal(logits(found.eval(), tokens), logits(model, tokens))


def test_another_dtype_is_what_transformers_loads_it_in(tmp_path):
    model = make("smollm2", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", dtype="bfloat16", to="huggingface")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert found.dtype == torch.bfloat16
    weight = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(found.state_dict()[weight], model.state_dict()[weight].bfloat16())


def test_an_encoder_that_was_saved_is_sentence_transformers_body(tmp_path):
    import jaxinfer as ji
    from jaxinfer.frontend.catalog import resolve

    source = resolve("all-minilm-l6-v2")
    with ji.load(source, dtype="float32") as encoder:
        encoder.save(tmp_path / "ours", format="huggingface")
    found = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    wanted = transformers.AutoModel.from_pretrained(source)
    weight = "encoder.layer.3.attention.self.key.weight"
    assert torch.equal(found.state_dict()[weight], wanted.state_dict()[weight])
