"""lm-eval gives SmolLM2 the same scores through our server (`local-completions`) as on transformers (`hf`)."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxinfer as ji

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.smollm2]

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Russia": "Moscow", "Germany": "Berlin",
            "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo", "Kenya": "Nairobi", "Cuba": "Havana",
            "Canada": "Ottawa", "Australia": "Canberra"}
LINES = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {lines}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "The capital of {{{{country}}}} is"
"""
CHOICE = LINES + """task: capitals
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SAID = LINES + """task: said
output_type: generate_until
doc_to_target: "{{{{capital}}}}"
generation_kwargs: {{until: [".", ","], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with both tasks, and the countries as lines of JSON; each has two wrong capitals beside its own."""
    folder, names = tmp_path_factory.mktemp("tasks"), list(CAPITALS.values())
    lines = [{"country": country, "capital": f" {capital}", "right": i % 3,
              "choices": [f" {names[(i + 5 * (j - i % 3)) % len(names)]}" for j in range(3)]}
             for i, (country, capital) in enumerate(CAPITALS.items())]
    assert all(line["choices"][line["right"]] == line["capital"] for line in lines)
    (folder / "capitals.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "said.jsonl").write_text("\n".join(map(json.dumps, lines[:4])))
    for name, task in (("capitals", CHOICE), ("said", SAID)):
        (folder / f"{name}.yaml").write_text(task.format(lines=folder / f"{name}.jsonl", cache=folder / "cache"))
    return folder


def evaluate(tasks: Path, model: object, **how: object) -> dict:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=["capitals", "said"], task_manager=manager, bootstrap_iters=0, **how)


def test_the_scores_are_those_of_transformers(tasks, smollm2_lm, smollm2_theirs, smollm2_path, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    tokenizer.save_pretrained(tmp_path)
    theirs = evaluate(tasks, HFLM(smollm2_theirs, tokenizer=tokenizer, batch_size=8, device="cpu"))
    monkeypatch.setattr(smollm2_lm, "warmup", lambda **_: None)  # two of its programs are enough here
    with ji.serve({"smollm2": smollm2_lm}, port=0) as server:
        ours = evaluate(tasks, "local-completions", model_args={
            "model": "smollm2", "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "huggingface",
            "tokenizer": str(tmp_path), "num_concurrent": 2, "batch_size": 4, "max_length": 256, "max_retries": 1})
    assert ours["results"]["capitals"]["acc,none"] == theirs["results"]["capitals"]["acc,none"] > 0.5
    assert ours["results"]["capitals"]["acc_norm,none"] == theirs["results"]["capitals"]["acc_norm,none"]
    told = [sorted(found["samples"]["capitals"], key=lambda sample: sample["doc_id"]) for found in (ours, theirs)]
    likelihoods = [np.array([[float(value) for (value, _) in sample["filtered_resps"]] for sample in samples])
                   for samples in told]
    np.testing.assert_allclose(*likelihoods, atol=2e-3)
    said = [[sample["resps"] for sample in found["samples"]["said"]] for found in (ours, theirs)]
    assert said[0] == said[1]
    assert ours["results"]["said"]["exact_match,none"] == theirs["results"]["said"]["exact_match,none"] > 0.5
