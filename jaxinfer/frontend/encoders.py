"""A Hugging Face config of a BERT-like encoder becomes the Config of `graphs/bert.py`, or is refused with every reason.

A new family that fits is one entry in `ENCODERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.errors import InvalidOption
from jaxinfer.frontend.keys import Keys, short
from jaxinfer.graphs.bert import Config, Head, Names

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
PROBLEMS = {"single_label_classification": "one", "multi_label_classification": "any", "regression": "number"}
BODIES = ("Model", "ForMaskedLM", "ForPreTraining")  # what is read of these is the body


@dataclass(frozen=True)
class Family:
    """What sets one family of encoders apart: its names in checkpoints, its classifier over a row's first token,
    values of keys that its configs may leave out, Config fields that only some have with their keys, its own spelling
    of the others' keys, whether positions begin after the padding id, and keys that are harmless in it."""

    names: Names
    head: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    padded: bool = False
    harmless: frozenset[str] = frozenset()


ROBERTA_HEAD = dict(dense="classifier.dense", out="classifier.out_proj")
SEGMENTS = {"segments": "type_vocab_size"}
ROBERTA = Family(Names("roberta."), ROBERTA_HEAD, {"vocab_size": 50265, "type_vocab_size": 2}, SEGMENTS, padded=True)
ENCODERS = {
    "bert": Family(
        Names(), dict(dense="bert.pooler.dense"), {"vocab_size": 30522, "type_vocab_size": 2}, SEGMENTS,
        harmless=frozenset({"directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
                            "pooler_size_per_head", "pooler_type"})),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": Family(
        Names("distilbert.", "transformer.layer.", "attention.q_lin", "attention.k_lin", "attention.v_lin",
              "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
        dict(dense="pre_classifier", activation="relu"), {"vocab_size": 30522},
        spelling={"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_attention_heads": "n_heads",
                  "num_hidden_layers": "n_layers", "hidden_act": "activation"},
        harmless=frozenset({"dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"})),
    "mpnet": Family(
        Names("mpnet.", query="attention.attn.q", key="attention.attn.k", value="attention.attn.v",
              out="attention.attn.o", attention_norm="attention.LayerNorm"),
        ROBERTA_HEAD, {"vocab_size": 30527, "relative_attention_num_buckets": 32},
        {"relative_buckets": "relative_attention_num_buckets"}, padded=True),
}
HARMLESS = frozenset({
    "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "tie_word_embeddings", "output_past",
    "sentence_transformers", "sbert_ce_default_activation_function",
})


def encoder_config(config: Mapping[str, Any], *, max_context: int | None = None, source: str = "config.json") -> Config:
    """The Config of the encoder that a Hugging Face `config` describes; its `model_type` is a key of `ENCODERS`.

    `max_context` is the longest row to read, in tokens; None is the model's own limit. A classification head is part
    of it where `architectures` names one. Raises UnsupportedModel with every problem of the config, InvalidOption for
    a `max_context` out of range.
    """
    family = ENCODERS[config["model_type"]]
    keys = Keys({**family.defaults, **config}, source)
    key = lambda name: family.spelling.get(name, name)
    width, heads = keys.integer(key("hidden_size"), 768), keys.integer(key("num_attention_heads"), 12)
    if width % heads:
        keys.problem(key("num_attention_heads"), f"{heads} does not divide {key('hidden_size')}, {width}")
    positions = keys.integer("max_position_embeddings", 512)
    first = keys.integer("pad_token_id", 1, least=0) + 1 if family.padded else 0
    fields = dict(
        vocab=keys.integer("vocab_size"), width=width, heads=heads, positions=positions, first_position=first,
        ffn=keys.integer(key("intermediate_size"), 4 * width), layers=keys.integer(key("num_hidden_layers"), 12),
        activation=keys.choice(key("hidden_act"), ACTIVATIONS, "gelu"), norm_eps=keys.number("layer_norm_eps", 1e-12),
        head=_head(keys, family), names=family.names, **{name: keys.integer(key) for name, key in family.reads.items()},
    )
    keys.only("position_embedding_type", "absolute")
    keys.only("is_decoder", False)
    keys.finish(HARMLESS | family.harmless)
    limit = positions - first
    if max_context is not None and not 1 <= max_context <= limit:
        raise InvalidOption(f"{source}: max_context is {max_context}; it must be from 1 to this model's {limit} tokens")
    return Config(**fields, max_context=max_context or limit)


def _head(keys: Keys, family: Family) -> Head | None:
    """The classifier that `architectures` names, if any."""
    name = next(iter(keys.get("architectures", ())), "Model")
    if name.endswith("ForSequenceClassification"):
        labels = _labels(keys)
        problem = keys.choice("problem_type", PROBLEMS, "multi_label_classification" if len(labels) == 1 else
                              "single_label_classification")
        return Head(labels, **family.head, problem=problem)
    if name.endswith("ForTokenClassification"):
        return Head(_labels(keys), per_token=True)
    if not name.endswith(BODIES):
        keys.problem("architectures", f"{short(name)} is not supported; expected one that ends in "
                                      f"{', '.join(BODIES)}, ForSequenceClassification or ForTokenClassification")
    return None


def _labels(keys: Keys) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers."""
    named = keys.mapping("id2label") or {str(i): f"LABEL_{i}" for i in range(keys.integer("num_labels", 2))}
    try:
        numbered = sorted((int(number), str(label)) for number, label in named.items())
    except ValueError:
        numbered = []
    if [number for number, _ in numbered] != list(range(len(named))):
        keys.problem("id2label", f"{short(named)} does not name the classes 0 to {len(named) - 1}")
    elif len({label for _, label in numbered}) < len(named):
        keys.problem("id2label", f"{short(named)} gives one name to two classes")
    return tuple(label for _, label in numbered)
