"""SmolLM2, once for all tests that ask it: as transformers reads the GGUF file, and as we do; both in float32."""

import pytest

import jaxinfer as ji


@pytest.fixture(scope="session")
def smollm2_theirs(smollm2_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2_lm(smollm2_path):
    with ji.load(smollm2_path, dtype="float32", max_context=256, max_rows=4) as lm:
        yield lm
