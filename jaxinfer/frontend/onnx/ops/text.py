"""Strings. They never reach a device, so every input is concrete."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import ANY, op
from jaxinfer.frontend.onnx.values import Value


def each(function: Callable[[str], object], x: np.ndarray, dtype: type = object) -> np.ndarray:
    return np.array([function(str(text)) for text in x.reshape(-1)], dtype).reshape(x.shape)


@op("StringConcat", since=20)
def string_concat(node: Node, x: Value, y: Value) -> Value:
    return np.asarray(np.add(x.astype(object), y.astype(object)), object)


@op("RegexFullMatch", since=20)
def regex_full_match(node: Node, x: Value, *, pattern: str) -> Value:
    """ONNX means RE2; Python's `re` agrees on what both understand."""
    compiled = re.compile(pattern)
    return each(lambda text: compiled.fullmatch(text) is not None, x, bool)


@op("StringSplit", since=20)
def string_split(node: Node, x: Value, *, delimiter: str | None = None, maxsplit: int = -1) -> tuple[Value, Value]:
    """Pieces [..., most], padded with empty strings, and how many each string has."""
    pieces = [str(text).split(delimiter or None, maxsplit) for text in x.reshape(-1)]
    counts = np.array([len(found) for found in pieces], np.int64)
    most = int(counts.max(initial=0))
    rows = [found + [""] * (most - len(found)) for found in pieces]
    return np.array(rows, object).reshape(*x.shape, most), counts.reshape(x.shape)


@op("StringNormalizer", since=10)
def string_normalizer(
    node: Node, x: Value, *, case_change_action: str = "NONE", is_case_sensitive: int = 0, locale: str = "",
    stopwords: list[str] | None = None,
) -> Value:  # fmt: skip
    """Without its stop words, in upper or lower case. Nothing left is one empty string."""
    change = {"LOWER": str.lower, "UPPER": str.upper, "NONE": str}[case_change_action]
    fold = str if is_case_sensitive else str.lower
    stops = {fold(word) for word in stopwords or []}
    words = [change(str(word)) for word in x.reshape(-1) if fold(str(word)) not in stops]
    kept = np.array(words or [""], object)
    return kept if x.ndim == 1 else kept.reshape(1, -1)


@op("TfIdfVectorizer", since=9, shaping=(ANY,))
def tf_idf_vectorizer(
    node: Node, x: Value, *, mode: str, max_gram_length: int, max_skip_count: int, min_gram_length: int,
    ngram_counts: list[int], ngram_indexes: list[int], pool_int64s: list[int] | None = None,
    pool_strings: list[str] | None = None, weights: list[float] | None = None,
) -> Value:  # fmt: skip
    """How often each n-gram of the pool occurs in a row, with gaps of up to `max_skip_count`."""
    grams = _grams(pool_strings if pool_strings is not None else pool_int64s or [], ngram_counts)
    x = node.array(x, "X")
    rows, width = np.atleast_2d(x), max(ngram_indexes) + 1
    counts = np.zeros((len(rows), width), np.float32)
    scale = weights or [1.0] * len(grams)
    column = {gram: (place, scale[i]) for i, (gram, place) in enumerate(zip(grams, ngram_indexes, strict=True))}
    for row, tokens in enumerate(rows.tolist()):
        for gram in _found(tokens, min_gram_length, max_gram_length, max_skip_count):
            if gram in column:
                counts[row, column[gram][0]] += 1
    weigh = np.ones(width, np.float32)
    for place, weight in column.values():
        weigh[place] = weight
    result = counts if mode == "TF" else (counts > 0) * weigh if mode == "IDF" else counts * weigh
    return result.astype(np.float32).reshape(*x.shape[:-1], width)


def _grams(pool: list, starts: list[int]) -> list[tuple]:
    """The pool holds all 1-grams, then all 2-grams, ...; `starts` says where each length begins."""
    grams: list[tuple] = []
    for n, (start, end) in enumerate(zip(starts, [*starts[1:], len(pool)], strict=True), start=1):
        grams += [tuple(pool[i : i + n]) for i in range(start, end, n)]
    return grams


def _found(tokens: list, least: int, most: int, skips: int) -> list[tuple]:
    """Every n-gram in the row, once for each gap; a single token has no gap."""
    found = []
    for n in range(least, most + 1):
        for gap in range(1, (1 if n == 1 else skips + 1) + 1):
            found += [tuple(tokens[i : i + n * gap : gap]) for i in range(len(tokens) - (n - 1) * gap)]
    return found
