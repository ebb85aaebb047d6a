"""The convolution that the importer's operators share, and the forms in which a CPU computes it faster.

x [N, C, spatial...], w [M, C / group, kernel...]; `pads` are pairs by axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.frontend.onnx.values import wide
from jaxinfer.kernels.op import Op

LETTERS = "DEFGHIJK"  # spatial axes in `dimension_numbers`, which cannot use N, C, O
MOST_TAPS = 81  # of a kernel that is written out as a sum

Pairs = Sequence[tuple[int, int]]


def general(
    x: Array, w: Array, strides: Sequence[int], pads: Pairs, dilations: Sequence[int], group: int,
    spread: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    """XLA's own. `spread` puts zeros between the elements of x, as a transposed convolution does."""
    axes = LETTERS[: x.ndim - 2]
    return lax.conv_general_dilated(
        x, w, strides, pads, lhs_dilation=spread, rhs_dilation=dilations, feature_group_count=group,
        dimension_numbers=("NC" + axes, "OI" + axes, "NC" + axes),
    )


def by_products(
    x: Array, w: Array, strides: Sequence[int], pads: Pairs, dilations: Sequence[int], group: int,
    spread: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    """Kernels of one pixel as matrix products, one filter per channel as a sum of shifted images.

    On two Zen 3 cores: a depthwise 3x3 over [1, 64, 24, 96] takes 0.4 ms for XLA's 8, a 1x1 from 256 to 1,024 channels
    over [4, 256, 14, 14] 9 ms for 18. Dense kernels of several pixels are XLA's: matrix products lose there.
    """
    taps, apart = math.prod(w.shape[2:]), spread is not None and any(n != 1 for n in spread)
    if taps == 1 and not apart and not any(map(any, pads)):
        return pointwise(x[(..., *(slice(None, None, step) for step in strides))], w, group)
    if group == x.shape[1] and w.shape[1] == 1 and taps <= MOST_TAPS and not apart:
        return depthwise(x, w, strides, pads, dilations)
    return general(x, w, strides, pads, dilations, group, spread)


def pointwise(x: Array, w: Array, group: int) -> Array:
    """A matrix product for every image and group; a single one where each image has a single pixel."""
    n, c, *sizes = x.shape
    m = w.shape[0]
    if math.prod(sizes) == 1 and group == 1:
        return (x.reshape(n, c) @ w.reshape(m, c).T).reshape(n, m, *sizes)
    filters = jnp.broadcast_to(w.reshape(group, m // group, c // group), (n, group, m // group, c // group))
    return (filters @ x.reshape(n, group, c // group, -1)).reshape(n, m, *sizes)


def depthwise(x: Array, w: Array, strides: Sequence[int], pads: Pairs, dilations: Sequence[int]) -> Array:
    """One filter, or several, for each channel: a term per tap, which XLA fuses into one loop. Sums are float32."""
    dtype, x, w = x.dtype, wide(x), wide(w)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 2 + [(before, after, 0) for before, after in pads])
    x = jnp.repeat(x, w.shape[0] // x.shape[1], 1) if w.shape[0] != x.shape[1] else x
    reach = [(k - 1) * d for k, d in zip(w.shape[2:], dilations, strict=True)]
    counts = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    terms = []
    for tap in itertools.product(*map(range, w.shape[2:])):
        start = [t * d for t, d in zip(tap, dilations, strict=True)]
        end = [first + (n - 1) * s + 1 for first, n, s in zip(start, counts, strides, strict=True)]
        shifted = lax.slice(x, (0, 0, *start), (*x.shape[:2], *end), (1, 1, *strides))
        terms.append(shifted * w[(slice(None), 0, *tap)].reshape(-1, *(1,) * len(tap)))
    return sum(terms[1:], terms[0]).astype(dtype)


convolution = Op("convolution", reference=general, fast={"products": (("cpu",), by_products)})
