"""The operators of ai.onnx.ml that are arrays in, arrays out: linear models, trees, encoders and scalers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, cast, is_concrete

ML = "ai.onnx.ml"


@op("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(node: Node, x: Value, columns: Value) -> Value:
    y = x[..., node.array(columns, "Y").reshape(-1)]
    return y if x.ndim > 1 else y.reshape(1, -1)


@op("Binarizer", domain=ML)
def binarizer(node: Node, x: Value, *, threshold: float = 0.0) -> Value:
    return (x > threshold).astype(x.dtype)


@op("Scaler", domain=ML)
def scaler(node: Node, x: Value, *, offset: list[float], scale: list[float]) -> Value:
    return (cast(x, np.float32) - np.asarray(offset, np.float32)) * np.asarray(scale, np.float32)


@op("Imputer", domain=ML)
def imputer(
    node: Node, x: Value, *, imputed_value_floats: list[float] | None = None,
    imputed_value_int64s: list[int] | None = None, replaced_value_float: float = 0.0, replaced_value_int64: int = 0,
) -> Value:  # fmt: skip
    if imputed_value_floats is not None:
        missing = jnp.isnan(x) if np.isnan(replaced_value_float) else x == replaced_value_float
        return jnp.where(missing, np.asarray(imputed_value_floats, np.float32), x)
    return jnp.where(x == replaced_value_int64, np.asarray(imputed_value_int64s), x)


@op("FeatureVectorizer", domain=ML)
def feature_vectorizer(node: Node, *values: Value, inputdimensions: list[int] | None = None) -> Value:
    return jnp.concatenate([cast(value.reshape(value.shape[0], -1), np.float32) for value in values], 1)


@op("Normalizer", domain=ML)
def normalizer(node: Node, x: Value, *, norm: str = "MAX") -> Value:
    size = {"MAX": lambda: jnp.max(jnp.abs(x), -1, keepdims=True), "L1": lambda: jnp.sum(jnp.abs(x), -1, keepdims=True),
            "L2": lambda: jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))}[norm]()
    return cast(jnp.where(size == 0, x, x / jnp.where(size == 0, 1, size)), np.float32)


@op("OneHotEncoder", domain=ML)
def one_hot_encoder(
    node: Node, x: Value, *, cats_int64s: list[int] | None = None, cats_strings: list[str] | None = None,
    zeros: int = 1,
) -> Value:  # fmt: skip
    names = np.array(cats_strings, object) if cats_strings else np.asarray(cats_int64s)
    return cast(x[..., None] == names, np.float32)


def transformed(scores: Value, how: str) -> Value:
    """What the linear and tree models do to their sums (`post_transform`)."""
    if how == "SOFTMAX_ZERO":
        return jnp.where(scores == 0, 0, jax.nn.softmax(scores, -1))
    known = {"NONE": lambda x: x, "LOGISTIC": jax.nn.sigmoid, "SOFTMAX": lambda x: jax.nn.softmax(x, -1),
             "PROBIT": lambda x: jnp.sqrt(2.0) * jax.scipy.special.erfinv(2 * x - 1)}
    return known[how](scores)


@op("LinearRegressor", domain=ML)
def linear_regressor(
    node: Node, x: Value, *, coefficients: list[float], intercepts: list[float] | None = None,
    post_transform: str = "NONE", targets: int = 1,
) -> Value:  # fmt: skip
    weights = np.asarray(coefficients, np.float32).reshape(targets, -1)
    bias = np.zeros(targets, np.float32) if intercepts is None else np.asarray(intercepts, np.float32)
    return transformed(jnp.asarray(cast(x, np.float32)) @ weights.T + bias, post_transform)


@op("LinearClassifier", domain=ML)
def linear_classifier(
    node: Node, x: Value, *, coefficients: list[float], intercepts: list[float] | None = None, multi_class: int = 0,
    classlabels_ints: list[int] | None = None, classlabels_strings: list[str] | None = None,
    post_transform: str = "NONE",
) -> tuple[Value, Value]:  # fmt: skip
    """The best label, and the scores of all; labels that are words need concrete scores."""
    labels = np.array(classlabels_strings, object) if classlabels_strings else np.asarray(classlabels_ints, np.int64)
    scores = jnp.asarray(cast(x, np.float32)) @ np.asarray(coefficients, np.float32).reshape(-1, x.shape[-1]).T
    scores = scores if intercepts is None else scores + np.asarray(intercepts, np.float32)
    if scores.shape[-1] == 1 and len(labels) == 2:
        scores = jnp.concatenate([1 - scores if post_transform == "NONE" else -scores, scores], -1)
    best = jnp.argmax(scores, -1)
    chosen = labels[node.array(best, "scores")] if labels.dtype == object else jnp.asarray(labels)[best]
    return chosen, transformed(scores, post_transform)


@op("LabelEncoder", domain=ML, since=2)
def label_encoder(
    node: Node, x: Value, *, keys_floats: list[float] | None = None, keys_int64s: list[int] | None = None,
    keys_strings: list[str] | None = None, keys_tensor: np.ndarray | None = None,
    values_floats: list[float] | None = None, values_int64s: list[int] | None = None,
    values_strings: list[str] | None = None, values_tensor: np.ndarray | None = None,
    default_float: float = 0.0, default_int64: int = -1, default_string: str = "_Unused",
    default_tensor: np.ndarray | None = None,
) -> Value:  # fmt: skip
    """Each key's value, or the default. Numbers may be traced, words may not."""
    keys = _table(keys_tensor, keys_strings, keys_int64s, keys_floats)
    values = _table(values_tensor, values_strings, values_int64s, values_floats)
    usual = default_tensor if default_tensor is not None else (
        default_string if values.dtype == object else default_int64 if values.dtype == np.int64 else default_float)
    default = np.asarray(usual, values.dtype).reshape(-1)[0]
    if object in (keys.dtype, values.dtype) or is_concrete(x):
        found = {_key(key): value for key, value in zip(keys.tolist(), values.tolist(), strict=True)}
        flat = [found.get(_key(key), default) for key in node.array(x, "X").reshape(-1).tolist()]
        return np.array(flat, values.dtype).reshape(x.shape)
    same = (x[..., None] == keys) | (jnp.isnan(x[..., None]) & np.isnan(keys) if keys.dtype.kind == "f" else False)
    return jnp.where(same.any(-1), jnp.asarray(values)[same.argmax(-1)], default)


def _key(value: object) -> object:
    """One key for all NaNs."""
    return "nan" if isinstance(value, float) and np.isnan(value) else value


def _table(tensor: np.ndarray | None, strings: list[str] | None, ints: list[int] | None, floats: list[float] | None):
    if tensor is not None:
        return tensor.reshape(-1)
    if strings is not None:
        return np.array(strings, object)
    return np.asarray(ints, np.int64) if ints is not None else np.asarray(floats, np.float32)
