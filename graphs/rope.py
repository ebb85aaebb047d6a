"""Rotary positions (Su et al., 2021) and the ways to stretch them past the context a model was trained at.

Each function below returns a `Rope` from `width`, the turned channels of a head, and `theta`, the base of its
geometric series of frequencies. `trained` is the context, in tokens, of the original training; `context` the one to
serve. Frequencies are rounded where PyTorch rounds them, so that angles agree at long distances.

Axes: T tokens, H turned channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """How positions turn the first `2 * len(inv_freq)` channels of a head: the angle, in radians, by which one
    position turns each pair of channels, and a factor on the cosine and the sine."""

    inv_freq: tuple[float, ...]
    scale: float = 1.0


def turns(rope: Rope, position_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each token's angles, `[T, H]` each; channel c is paired with channel c + H / 2."""
    inv_freq_H = np.asarray(rope.inv_freq * 2, np.float32)
    angle_TH = position_T.astype(jnp.float32)[:, None] * inv_freq_H[None]
    return jnp.cos(angle_TH) * rope.scale, jnp.sin(angle_TH) * rope.scale


def plain(width: int, theta: float) -> Rope:
    """The original: pair i turns by theta ** (-2 i / width).

    >>> plain(4, 10_000.0).inv_freq
    (1.0, 0.009999999776482582)
    """
    return _rope(1 / _wave(width, theta))


def linear(width: int, theta: float, *, factor: float) -> Rope:
    """Position interpolation (Chen et al., 2023): every pair turns `factor` times more slowly."""
    return _rope(1 / _wave(width, theta) / np.float32(factor))


def dynamic(width: int, theta: float, *, factor: float, trained: int, context: int) -> Rope:
    """NTK-aware scaling (bloc97 and emozilla, 2023): a larger base, as a context of this length asks for."""
    stretch = factor * max(context, trained) / trained - (factor - 1)
    return plain(width, theta * stretch ** (width / (width - 2)))


def llama3(width: int, theta: float, *, factor: float, low: float, high: float, trained: int) -> Rope:
    """Llama 3.1: pairs that turn less than `low` times within `trained` tokens are slowed by `factor`, those that
    turn more than `high` times are kept, and the ones between are blended."""
    inv_freq = 1 / _wave(width, theta)
    turned = np.float32(trained / (2 * math.pi)) * inv_freq
    kept = np.clip((turned - low) / (high - low), 0, 1)
    return _rope((1 - kept) * inv_freq / np.float32(factor) + kept * inv_freq)


def yarn(width: int, theta: float, *, factor: float, trained: int, fast: float = 32.0, slow: float = 1.0,
         truncate: bool = True, scale: float | None = None) -> Rope:
    """YaRN (Peng et al., 2023): pairs that turn less than `slow` times within `trained` tokens are slowed by
    `factor`, those that turn more than `fast` times are kept, with a ramp over the pairs between.

    `scale` None is the paper's 0.1 ln(factor) + 1.
    """
    pair = lambda rotations: width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    first, last = pair(fast), pair(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (np.arange((width + 1) // 2, dtype=np.float32) - first) / ((last - first) or 0.001)
    slowed = np.clip(ramp, 0, 1)
    inv_freq = 1 / _wave(width, theta)
    scale = yarn_scale(factor) if scale is None else scale
    return _rope(slowed * inv_freq / np.float32(factor) + (1 - slowed) * inv_freq, scale)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on cosine and sine."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def longrope(width: int, theta: float, *, short: Sequence[float], long: Sequence[float], factor: float, trained: int,
             context: int, scale: float | None = None) -> Rope:
    """LongRoPE (Ding et al., 2024): searched factors for each pair, one list up to `trained`, another beyond.

    `scale` None is the paper's sqrt(1 + ln(factor) / ln(trained)).
    """
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    slowed = np.asarray(long if context > trained else short, np.float32)
    return _rope(1 / (slowed * _wave(width, theta)), scale)


def _wave(width: int, theta: float) -> np.ndarray:
    """The tokens that each pair takes to turn by one radian, in float32."""
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (theta ** exponent.astype(np.float64)).astype(np.float32)


def _rope(inv_freq: np.ndarray, scale: float = 1.0) -> Rope:
    return Rope(tuple(inv_freq.astype(np.float32).tolist()), scale)
