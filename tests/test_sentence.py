"""The modules of a sentence-transformers directory are read, old spelling and new, or refused."""

import json

import pytest

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend.sentence import Pipeline, read_pipeline

MEAN = {"word_embedding_dimension": 384, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


@pytest.fixture
def write(tmp_path):
    """A directory with these modules, this pooling, and these other files."""
    def directory(kinds=("Transformer", "Pooling", "Normalize"), pooling=MEAN, **files):
        modules = [{"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
                   for i, kind in enumerate(kinds)]
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        for name, value in {"modules": modules, **files}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path
    return directory


def test_a_pipeline_is_what_its_files_say(write):
    assert read_pipeline(write()) == Pipeline(("mean",), normalise=True)
    settings = dict(sentence_bert_config={"max_seq_length": 256, "do_lower_case": True},
                    config_sentence_transformers={"prompts": {"query": "query: "}, "default_prompt_name": "query"})
    assert read_pipeline(write(("Transformer", "Pooling"), **settings)) == Pipeline(
        ("mean",), normalise=False, max_length=256, lower=True, prompt="query: ")


@pytest.mark.parametrize(("pooling", "expected"), [
    ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
    ({"pooling_mode": ["mean", "cls"]}, ("cls", "mean")),
    ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, ("cls", "max")),
    ({}, ("mean",)),
])
def test_ways_of_pooling_come_in_the_order_in_which_their_vectors_stand(write, pooling, expected):
    assert read_pipeline(write(pooling=pooling)).pooling == expected


def test_without_modules_the_mean_of_all_tokens_is_taken(tmp_path):
    assert read_pipeline(tmp_path) == Pipeline(("mean",), normalise=False)


def test_what_is_not_known_is_refused(write):
    with pytest.raises(UnsupportedModel, match="modules are Transformer, Pooling, Dense; expected"):
        read_pipeline(write(("Transformer", "Pooling", "Dense")))
    with pytest.raises(UnsupportedModel, match="pools by attention; expected some of cls, max"):
        read_pipeline(write(pooling={"pooling_mode": "attention"}))
    with pytest.raises(UnsupportedModel, match="include_prompt is False"):
        read_pipeline(write(pooling=MEAN | {"include_prompt": False}))
    with pytest.raises(CorruptFile, match="no list of modules"):
        read_pipeline(write(modules=[{"idx": 0}]))
