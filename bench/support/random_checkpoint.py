"""A checkpoint of any shape with random weights, written on the spot: what a bench of speed loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from jaxinfer.frontend.architectures import architecture
from jaxinfer.graph import Leaf

BLOCK = 2**25  # numbers that are drawn; longer tensors repeat them


def write(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """config.json, tokenizer.json (one word for each token) and bfloat16 weights in one model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    words = {f"w{i}": i for i in range(config["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")
    header, at = {}, 0
    shapes = dict(_shapes(config))
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that the tensors are aligned
    normal = np.random.default_rng(seed).standard_normal(BLOCK, np.float32) * 0.02
    block, one = _bfloat16(normal), _bfloat16(np.ones(max(config["hidden_size"], 1), np.float32))
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = math.prod(shape)
            source = one if len(shape) == 1 else block  # norms of one
            while left:
                left -= len(part := source[:left])
                part.tofile(file)
    return directory


def _shapes(config: dict[str, Any]):
    """The names and shapes of the checkpoint's tensors, which a leaf of several is split into."""
    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    query, kv = (config[key] * head for key in ("num_attention_heads", "num_key_value_heads"))
    for leaf in jax.tree.leaves(architecture(config).graph().spec, is_leaf=lambda x: isinstance(x, Leaf)):
        names = leaf.alternatives[0]
        parts = [query, kv, kv] if len(names) == 3 else [leaf.shape[0] // len(names)] * len(names)
        yield from ((name, [rows, *leaf.shape[1:]]) for name, rows in zip(names, parts, strict=True))


def _bfloat16(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)
