"""An encoder's config is understood whole or refused whole."""

import pytest

from jaxinfer.errors import InvalidOption, UnsupportedModel
from jaxinfer.frontend.architectures import architecture
from jaxinfer.frontend.encoders import ENCODERS, encoder_config
from jaxinfer.graph import Encoder

BERT = dict(model_type="bert", vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64)
NAMED = BERT | dict(architectures=["BertForSequenceClassification"])


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_family_builds_an_encoder_that_reads_as_far_as_its_positions_go(kind):
    layers = ENCODERS[kind].spelling.get("num_hidden_layers", "num_hidden_layers")
    encoder = architecture({"model_type": kind, "max_position_embeddings": 64, layers: 2}).graph()
    assert isinstance(encoder, Encoder) and len(encoder.spec["blocks"]) == 2 and encoder.head is None
    assert encoder.max_context == (62 if ENCODERS[kind].padded else 64)
    assert architecture({"model_type": kind}, max_context=9).graph().max_context == 9


def test_all_problems_of_a_config_are_in_one_error():
    bad = NAMED | dict(hidden_size=50, hidden_act="mish", position_embedding_type="relative_key", is_decoder=True,
                       id2label={"0": "no", "2": "yes"}, qk_clip=3, layer_norm_eps=-1)
    with pytest.raises(UnsupportedModel) as caught:
        encoder_config(bad, source="tiny/config.json")
    heading, *problems = str(caught.value).splitlines()
    assert heading == "tiny/config.json: 7 problems, nothing was loaded:"
    assert [problem.split(":")[0].strip() for problem in problems] == [
        "hidden_act", "id2label", "is_decoder", "layer_norm_eps", "num_attention_heads", "position_embedding_type",
        "qk_clip"]


def test_a_head_has_the_labels_of_the_config_in_the_order_of_their_numbers():
    labels = {"1": "positive", "0": "negative"}
    assert architecture(NAMED | dict(id2label=labels)).graph().labels == ("negative", "positive")
    assert architecture(NAMED | dict(num_labels=1)).graph().labels == ("LABEL_0",)
    token = architecture(BERT | dict(architectures=["BertForTokenClassification"])).graph()
    assert token.head_per_token and "dense" not in token.spec


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(UnsupportedModel, match="gives one name to two classes"):
        encoder_config(NAMED | dict(id2label={"0": "x", "1": "x"}))


def test_a_head_that_is_not_known_is_refused():
    with pytest.raises(UnsupportedModel, match="BertForQuestionAnswering' is not supported; expected one that ends"):
        encoder_config(BERT | dict(architectures=["BertForQuestionAnswering"]))


@pytest.mark.parametrize("context", [0, 65])
def test_a_context_beyond_the_positions_is_refused(context):
    with pytest.raises(InvalidOption, match="from 1 to this model's 64 tokens"):
        architecture(BERT, max_context=context)
