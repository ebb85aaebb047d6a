"""Quantised weights: small numbers with a scale for each output (or group of inputs), in the place of an array.

Axes: T tokens, O outputs, I inputs, G groups of inputs. A stack of matrices, of experts say, has an axis before these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxinfer.graph import Leaf

CHUNK = 1 << 16  # numbers quantised at a time: their temporaries stay in the cache


class Format(NamedTuple):
    """How a weight is held. Without `group`, values up to `most` and a float32 scale for each output. With it, values
    from 0 to 15, four in a word, and for every `group` inputs of an output a float16 scale and minimum, as in GGUF's
    Q4_1."""

    name: str
    values: np.dtype
    most: float
    group: int | None = None


INT8 = Format("int8", np.dtype(np.int8), 127)
INT4 = Format("int4", np.dtype(np.uint16), 15, group=32)
FP8 = Format("fp8", np.dtype(ml_dtypes.float8_e4m3fn), 448)

SHIFTS = np.arange(0, 16, 4, dtype=np.uint16)[:, None]  # of a word's numbers, [..., O, words // lane, 4, lane]

# What `quantize=` makes of a matrix, by the axis of its outputs. A leaf whose outputs have none of these (positions,
# segments, classes) keeps its dtype, an exact one float32. What errors show in most, logits, and what is looked up row
# by row, embeddings, are int8 always.
SCHEMES: dict[str, Mapping[str | None, Format]] = {
    "int8": {"vocab": INT8, "heads": INT8, "ffn": INT8, "embed": INT8},
    "w8a8": {"vocab": INT8, "heads": INT8, "ffn": INT8, "embed": INT8},
    "int4": {"vocab": INT8, "heads": INT4, "ffn": INT4, "embed": INT4},
    "fp8": {"vocab": INT8, "heads": FP8, "ffn": FP8, "embed": FP8},
}

# The implementations that a scheme asks for, where there is a choice; a GPU's "gated" would not round activations.
FORCED: dict[str | None, Mapping[str, str]] = {"w8a8": {"matmul_int8": "w8a8", "gated": "reference"}}


def format_of(leaf: Leaf, quantize: str | None) -> Format | None:
    """How a leaf is held under `quantize` (a key of SCHEMES); None: as it is. Inputs that are no whole groups take a
    scale for each output, in int8."""
    if quantize is None or leaf.exact or len(leaf.shape) < 2:
        return None
    format = SCHEMES[quantize].get(leaf.axes[leaf.outputs])
    return INT8 if format and format.group and leaf.shape[-1] % format.group else format


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale", "minimum"], meta_fields=["dtype"])
@dataclass(frozen=True)
class Quantised:
    """A weight [O, I] that `matmul` and `embed_rows` take in the place of an array, or a stack of such.

    It stands for `scale_O * numbers_OI`; with a minimum, whose scales are for groups of inputs (int4), for
    `scale_OG * numbers_OGi + minimum_OG`. `dtype` is what the weight would be otherwise: activations that meet it
    unquantised are rounded to that.
    """

    values: Any
    scale: Any
    minimum: Any
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if self.minimum is None:
            return self.values.shape
        return (*self.scale.shape[:-1], self.scale.shape[-1] * INT4.group)

    @property
    def format(self) -> str:
        return INT4.name if self.minimum is not None else INT8.name if self.values.dtype == np.int8 else FP8.name

    @property
    def numbers(self) -> jax.Array:
        """The small numbers [O, I], out of their words."""
        if self.minimum is None:
            return self.values
        words = self.values.reshape(*self.shape[:-1], -1, 1, lane(self.shape[-1]))
        shifts = SHIFTS.reshape((1,) * (words.ndim - 2) + SHIFTS.shape)
        return (words >> shifts & np.uint16(INT4.most)).reshape(self.shape)

    @property
    def matrix(self) -> Quantised:
        """A stack of matrices as one, which has the outputs of all."""
        return jax.tree.map(lambda part: part.reshape(-1, *part.shape[len(self.shape) - 1 :]), self)

    def rows(self, index: Any) -> Quantised:
        """Some of the outputs: a slice, or their numbers."""
        return jax.tree.map(lambda part: part[index], self)

    def dequantised(self) -> jax.Array:
        """The weight in float32."""
        scale, numbers = self.scale.astype(jnp.float32), self.numbers.astype(jnp.float32)
        if self.minimum is None:
            return numbers * scale[..., None]
        numbers_OGi = numbers.reshape(*scale.shape, -1)
        return (numbers_OGi * scale[..., None] + self.minimum.astype(jnp.float32)[..., None]).reshape(self.shape)


def lane(inputs: int) -> int:
    """How four numbers share a word of int4: of every `4 * lane` inputs, word `j` holds `j`, `j + lane`, `j + 2 * lane`
    and `j + 3 * lane`, the first lowest. One shift unpacks as many numbers that are next to each other, 32 where the
    inputs are whole 128s; a GPU so has two in each of its registers."""
    return math.gcd(inputs, 4 * INT4.group) // 4  # type: ignore[operator]  # int4 has groups


def blank(format: Format, shape: tuple[int, ...], dtype: Any,
          make: Callable[[tuple[int, ...], np.dtype], Any] = jax.ShapeDtypeStruct) -> Quantised:
    """A weight of this shape, each of its parts made by `make(shape, dtype)`."""
    if format.group is None:
        return Quantised(make(shape, format.values), make(shape[:-1], np.dtype(np.float32)), None, np.dtype(dtype))
    *outputs, inputs = shape
    words, of_groups = (*outputs, inputs // 4), ((*outputs, inputs // format.group), np.dtype(np.float16))
    return Quantised(make(words, format.values), make(*of_groups), make(*of_groups), np.dtype(dtype))


def fill(out: Quantised, start: int, rows_OI: np.ndarray) -> None:
    """Quantise float rows into `out`, a matrix whose parts are numpy arrays, from row `start` on: to nearest, with the
    scales that the largest and smallest numbers ask for. Scales that are not finite are left for `finite` to find."""
    here, rows_OI = slice(start, start + len(rows_OI)), np.asarray(rows_OI, np.float32)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if out.minimum is None:
            most = INT8.most if out.format == "int8" else FP8.most
            scale_O = np.maximum(np.abs(rows_OI.max(1)), np.abs(rows_OI.min(1))) / np.float32(most)
            out.scale[here] = scale_O
            ratio_OI = rows_OI * _inverse(scale_O)[:, None]
            if out.format == "int8":
                out.values[here] = np.rint(ratio_OI, out=ratio_OI)
            else:
                out.values[here].view(np.uint8)[...] = _to_fp8()[ratio_OI.astype(np.float16).view(np.uint16)]
            return
        rows_OGi = rows_OI.reshape(len(rows_OI), out.scale.shape[1], -1)
        low_OG, high_OG = rows_OGi.min(2), rows_OGi.max(2)
        out.minimum[here], out.scale[here] = low_OG, (high_OG - low_OG) / np.float32(INT4.most)
        if _as_q4_0(rows_OGi[:1], low_OG[:1], high_OG[:1])[2].any():
            start_OG, step_OG, as_it_was_OG = _as_q4_0(rows_OGi, low_OG, high_OG)
            np.copyto(out.minimum[here], start_OG, "same_kind", where=as_it_was_OG)
            np.copyto(out.scale[here], step_OG, "same_kind", where=as_it_was_OG)
        level_OGi = rows_OGi - out.minimum[here].astype(np.float32)[..., None]
        level_OGi *= _inverse(out.scale[here].astype(np.float32))[..., None]
        np.clip(np.rint(level_OGi, out=level_OGi), 0, INT4.most, out=level_OGi)
        numbers = level_OGi.astype(np.uint16).reshape(len(rows_OI), -1, 4, lane(rows_OI.shape[1]))
        out.values[here] = np.bitwise_or.reduce(numbers << SHIFTS, axis=2).reshape(len(rows_OI), -1)


def _as_q4_0(rows_OGi: np.ndarray, low_OG: np.ndarray, high_OG: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where groups begin and the steps that they have if they are blocks of GGUF's Q4_0, and whether they are: its
    sixteen levels, which a block hardly ever spans, begin with the largest number and end beyond zero."""
    start_OG = np.where(high_OG >= -low_OG, high_OG, low_OG)
    step_OG = start_OG / np.float32(-8)
    level_OGi = (rows_OGi - start_OG[..., None]) * _inverse(step_OG)[..., None]
    np.clip(np.rint(level_OGi, out=level_OGi), 0, INT4.most, out=level_OGi)
    is_so_OG = (level_OGi * step_OG[..., None] + start_OG[..., None] == rows_OGi).all(2)
    return start_OG, step_OG, is_so_OG & (step_OG.astype(np.float16) == step_OG)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """One over it, and 0 where that is no number: what is divided is then 0, or all the same."""
    return np.where(np.abs(scale) >= np.finfo(np.float32).tiny, 1 / scale, np.float32(0))


@cache
def _to_fp8() -> np.ndarray:
    """The bits of e4m3 for every float16's: by this table a cast takes a tenth of ml_dtypes' own 25 ns."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(FP8.values).view(np.uint8)


def finite(weight: Quantised) -> bool:
    """Whether all scales are: a weight that holds NaN, infinities, or what float16 cannot hold, has others."""
    return all(np.isfinite(part).all() for part in (weight.scale, weight.minimum) if part is not None)


def quantise(weight_OI: Any, like: Quantised) -> Quantised:
    """A float weight, quantised on the host as `like` (of the same shape) is.

    >>> weight = quantise(np.array([[0.5, -1.27], [0.0, 0.0]]), blank(INT8, (2, 2), np.float32))
    >>> weight.values.tolist()
    [[50, -127], [0, 0]]
    >>> weight.dequantised().astype(float).round(2).tolist()
    [[0.5, -1.27], [0.0, 0.0]]
    """
    out = jax.tree.map(lambda part: np.empty(part.shape, part.dtype), like)
    weight_OI, step = np.asarray(weight_OI).reshape(-1, like.shape[-1]), rows_at_once(like.shape)
    for start in range(0, len(weight_OI), step):
        fill(out.matrix, start, weight_OI[start : start + step])
    return out


def rows_at_once(shape: tuple[int, ...]) -> int:
    """How many rows of a weight are quantised at a time."""
    return max(1, CHUNK // max(1, shape[-1]))


def embed_rows(table: jax.Array | Quantised, index_T: jax.Array) -> jax.Array:
    """Rows of an embedding table, quantised or not, in float32: `table[index_T]`."""
    return table.rows(index_T).dequantised() if isinstance(table, Quantised) else table[index_T].astype(jnp.float32)
