"""GGUF's block formats: how a block's bytes become float32 weights, bit for bit as ggml's reference does it.

A block is a record: a scale `d` (and a minimum `m`) for a run of weights, which are small integers. `n`
blocks make `[n, weights]`. The layouts are those of ggml-common.h; the K formats split a block of 256 into
groups of 32 or 16 that have 6-bit or 8-bit scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Weights unpacked at a time: 256 KiB of float32 stay in a core's L2. Zen 5, Q4_1: 1.24 ns a weight, 1.59 with
# a quarter of it; SmolLM2's 135 M weights take 0.2 to 0.5 s on one thread of a busy machine.
CHUNK = 65_536


class BlockFormat(NamedTuple):
    """`record`: a block's bytes; `weights`: how many it holds; `unpack(blocks, out)` fills `[n, weights]`."""

    record: np.dtype
    weights: int
    unpack: Callable[[np.ndarray, np.ndarray], None]


def dequantize(data: np.ndarray, format: BlockFormat) -> np.ndarray:
    """The float32 weights, flat, of contiguous bytes `data` (uint8) that hold whole blocks of `format`."""
    blocks = data.view(format.record)
    out = np.empty((len(blocks), format.weights), np.float32)
    step = CHUNK // format.weights
    with np.errstate(invalid="ignore", over="ignore"):  # infinite scales are the file's, not our arithmetic's
        for start in range(0, len(blocks), step):
            format.unpack(blocks[start : start + step], out[start : start + step])
    return out.reshape(-1)


def _f32(scales: np.ndarray) -> np.ndarray:
    """Scales [n, ...] as float32 with an axis to broadcast over the weights that share one."""
    return scales.astype(np.float32)[..., None]


def _nibbles(qs: np.ndarray, out: np.ndarray) -> None:
    """Bytes [..., B] to out [..., 2, B]: the low halves come first."""
    np.copyto(out[..., 0, :], qs & 15)
    np.copyto(out[..., 1, :], qs >> 4)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks["qs"], _f32(blocks["d"]), out=out)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks["qs"], out.reshape(-1, 2, 16))
    out -= 8
    out *= _f32(blocks["d"])


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks["qs"], out.reshape(-1, 2, 16))
    out *= _f32(blocks["d"])
    out += _f32(blocks["m"])


def _fifth_bits(blocks: np.ndarray, out: np.ndarray) -> None:
    """Four bits in `qs` as for Q4, and weight i's fifth in bit i of `qh`."""
    _nibbles(blocks["qs"], out.reshape(-1, 2, 16))
    out += np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _fifth_bits(blocks, out)
    out -= 16
    out *= _f32(blocks["d"])


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _fifth_bits(blocks, out)
    out *= _f32(blocks["d"])
    out += _f32(blocks["m"])


def _group_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum, each [n, 8, 1] float32, of a Q4_K or Q5_K block's eight groups.

    Of the twelve bytes, 0..3 hold the first four scales in their low six bits, 4..7 the first four minima; the
    others have their low four bits in 8..11 (scale low, minimum high), their top two above the first four.
    """
    first, second, rest = np.split(blocks["scales"], 3, axis=-1)
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 48)], axis=-1)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 48)], axis=-1)
    return _f32(blocks["d"])[..., None] * _f32(scales), _f32(blocks["m"])[..., None] * _f32(minima)


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales, minima = _group_scales(blocks)
    groups = out.reshape(-1, 8, 32)
    _nibbles(blocks["qs"].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32))
    groups *= scales
    groups -= minima


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales, minima = _group_scales(blocks)
    groups = out.reshape(-1, 8, 32)
    _nibbles(blocks["qs"].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32))
    for group in range(8):  # group g's fifth bits are bit g of the 32 bytes of qh
        groups[:, group] += ((blocks["qh"] >> group) & 1) << 4
    groups *= scales
    groups -= minima


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    halves, groups = out.reshape(-1, 2, 4, 32), out.reshape(-1, 16, 16)
    _nibbles(blocks["ql"].reshape(-1, 2, 64), out.reshape(-1, 2, 2, 64))
    qh = blocks["qh"].reshape(-1, 2, 32)
    for quarter in range(4):
        halves[:, :, quarter] += ((qh >> (2 * quarter)) & 3) << 4
    out -= 32
    groups *= _f32(blocks["d"])[..., None] * _f32(blocks["scales"])


def _record(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


_d, _m, _qs = ("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)
_group = ("scales", "u1", 12)
FORMATS = {
    "Q4_0": BlockFormat(_record(_d, _qs), 32, _q4_0),
    "Q4_1": BlockFormat(_record(_d, _m, _qs), 32, _q4_1),
    "Q5_0": BlockFormat(_record(_d, ("qh", "u1", 4), _qs), 32, _q5_0),
    "Q5_1": BlockFormat(_record(_d, _m, ("qh", "u1", 4), _qs), 32, _q5_1),
    "Q8_0": BlockFormat(_record(_d, ("qs", "i1", 32)), 32, _q8_0),
    "Q4_K": BlockFormat(_record(_d, _m, _group, ("qs", "u1", 128)), 256, _q4_k),
    "Q5_K": BlockFormat(_record(_d, _m, _group, ("qh", "u1", 32), ("qs", "u1", 128)), 256, _q5_k),
    "Q6_K": BlockFormat(_record(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _d), 256, _q6_k),
}
