"""Reads a model's config key by key, and collects everything that is wrong with it into one error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.errors import UnsupportedModel

# Keys that no forward pass of a language model reads: bookkeeping, training, token ids, generation defaults.
HARMLESS = frozenset({
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
    "name_or_path", "auto_map", "_commit_hash", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "cache_implementation", "use_cache", "unsloth_fixed", "unsloth_version",
    "transformers.js_config", "is_llama_config", "tokenizer_class", "initializer_range", "attention_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "pretraining_tp", "gradient_checkpointing",
    "use_bfloat16", "torchscript", "tf_legacy_loss", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "prefix", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "output_hidden_states", "output_attentions", "return_dict",
    "return_dict_in_generate", "output_scores", "chunk_size_feed_forward", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty", "tie_encoder_decoder", "is_decoder", "cross_attention_hidden_size",
})

# Keys that would change the mathematics, each with the one value that does not.
ONLY = {
    "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}, "quantization_config": None,
    "rope_interleaved": False, "use_mrope": False, "lm_head_bias": False, "use_bidirectional_attention": False,
}

_REQUIRED = object()


class Keys:
    """A config's values by key. Each method reads one; a value that will not do is noted, and stood in for by a
    placeholder, so that one pass finds all that is wrong. `finish` raises it."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values, self.source, self.prefix = dict(values), source, ""
        self.seen: set[str] = set()
        self.problems: list[tuple[str, str]] = []

    def inside(self, prefix: str, values: Mapping[str, Any]) -> Keys:
        """The keys of a dict within this config; its problems are this config's."""
        inner = Keys(values, self.source)
        inner.prefix, inner.problems = f"{prefix}.", self.problems
        return inner

    def problem(self, key: str, text: str, *depends: str) -> None:
        """Note a problem, unless it may only follow from one with a key that it `depends` on."""
        if not {key for key, _ in self.problems}.intersection(depends):
            self.problems.append((f"{self.prefix}{key}", text))

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands; null and absent are the same."""
        self.seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        good = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least
        return self._checked(key, default, good, f"an integer of at least {least}", least)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._checked(key, default, _positive, "a positive number", 1.0)

    def numbers(self, key: str, count: int) -> list[float]:
        good = lambda value: isinstance(value, list) and len(value) == count and all(map(_positive, value))
        return self._checked(key, _REQUIRED, good, f"a list of {count} positive numbers", [1.0] * count)

    def flag(self, key: str, default: bool) -> bool:
        return self._checked(key, default, lambda value: isinstance(value, bool), "true or false", default)

    def mapping(self, key: str) -> dict[str, Any]:
        return self._checked(key, {}, lambda value: isinstance(value, dict), "an object", {})

    def choice(self, key: str, table: Mapping[str, Any], default: str) -> Any:
        """The entry of `table` that the value names."""
        good = lambda value: isinstance(value, str) and value in table
        return table[self._checked(key, default, good, "one of " + ", ".join(sorted(table)), default)]

    def only(self, key: str, right: Any) -> None:
        """A key with a single value that we can honour."""
        value = self.get(key, right)
        if value != right:
            self.problem(key, f"{short(value)} is not supported, only {right!r} is")

    def _checked(self, key: str, default: Any, good: Callable[[Any], bool], expected: str, placeholder: Any) -> Any:
        value = self.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if value is None or not good(value):
            wrong = "missing; expected" if value is None else f"{short(value)} is not"
            self.problem(key, f"{wrong} {expected}")
            return placeholder
        return value

    def surplus(self, harmless: frozenset[str] = frozenset()) -> None:
        """Every key that was neither read nor is harmless is a problem."""
        for key in self.values.keys() - self.seen - harmless:
            self.problem(key, f"unknown key (its value is {short(self.values[key])})")

    def finish(self, harmless: frozenset[str]) -> None:
        """Raise UnsupportedModel if anything was wrong, or was never read and is not known to be harmless."""
        for key, right in ONLY.items():
            self.only(key, right)
        self.surplus(HARMLESS | harmless)
        if self.problems:
            lines = "\n  ".join(f"{key}: {text}" for key, text in sorted(self.problems))
            count = f"{len(self.problems)} problem" + "s" * (len(self.problems) > 1)
            raise UnsupportedModel(f"{self.source}: {count}, nothing was loaded:\n  {lines}")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def short(value: Any) -> str:
    """The value's repr in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
