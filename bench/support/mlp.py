"""The model of the benches of endpoints: one hidden layer, float32, the same weights everywhere."""

from __future__ import annotations

import jax
import numpy as np


def weights(widths: tuple[int, int, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=widths[:2]).astype(np.float32), "v": rng.normal(size=widths[1:]).astype(np.float32)}


def mlp(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]
