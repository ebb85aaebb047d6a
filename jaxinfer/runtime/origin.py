"""What a checkpoint says to whoever loads or converts it: its Graph, its dtype, its quantisation, its tokenizer."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxinfer.errors import InvalidOption, ModelNotFound, UnsupportedModel
from jaxinfer.frontend.architectures import DECODERS, architecture
from jaxinfer.frontend.checkpoint import Checkpoint
from jaxinfer.frontend.tokenizer import Tokenizer, from_directory
from jaxinfer.graph import Encoder, Graph
from jaxinfer.kernels.quantised import SCHEMES

DTYPES = ("float32", "bfloat16")
MAX_CONTEXT = 4096  # of a model whose user names no other


def check_numbers(dtype: Any, quantize: Any) -> None:
    """Raises InvalidOption unless weights can be held so."""
    if dtype is not None and str(dtype) not in DTYPES:
        raise InvalidOption(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if quantize is not None and (not isinstance(quantize, str) or quantize not in SCHEMES):
        raise InvalidOption(f"quantize is {quantize!r}; it must be one of {', '.join(SCHEMES)}, or None")


def model_of(checkpoint: Checkpoint, graph: Any, max_context: int | None) -> tuple[Any, Graph | Encoder]:
    """The config and the Graph. The architecture's default context is cut to ours before RoPE factors are fixed."""
    known = checkpoint.config.get("model_type") in (*DECODERS, "gpt2")
    if graph is None and not checkpoint.config:
        raise ModelNotFound(f"{checkpoint.source}: has arrays and no config.json, which would say what they are the "
                            "weights of; put it there, or give load a graph=")
    if graph is None or known:
        found = architecture(checkpoint.config, max_context=max_context, source=checkpoint.source)
        if max_context is None and found.config.max_context > MAX_CONTEXT:
            found = architecture(checkpoint.config, max_context=MAX_CONTEXT, source=checkpoint.source)
        config, build = found
    else:
        config, build = checkpoint.config, None
    if isinstance(graph, Graph | Encoder):
        return config, graph
    build = graph if graph is not None else build
    build = getattr(build, "build", build)
    if not callable(build):
        raise InvalidOption(f"graph is a {type(graph).__name__}; it must be a Graph, or a function that makes one "
                            "from a config, or a module with such a function named build")
    model = build(config)
    if not isinstance(model, Graph | Encoder):
        raise InvalidOption(f"graph made a {type(model).__name__} from the config; it must return a jaxinfer.Graph")
    return config, model


def dtype_of(checkpoint: Checkpoint, dtype: str | None) -> Any:
    """The dtype of weights: what was asked for, else what they were saved in, else float32 if they are."""
    if dtype is None and checkpoint.saved is not None:
        dtype = checkpoint.saved.dtype
    if dtype is not None:
        return jnp.dtype(str(dtype))
    matrices = [t for t in checkpoint.tensors.values() if len(t.shape) > 1]
    exact = all(t.dtype == jnp.float32 and t.nbytes == 4 * math.prod(t.shape) for t in matrices)  # on disk as well
    return jnp.dtype("float32" if exact else "bfloat16")


def scheme_of(checkpoint: Checkpoint, quantize: str | None) -> str | None:
    """The scheme by which weights are quantised: what was asked for, else what they were saved in. Raises
    InvalidOption if what was saved cannot become what was asked for."""
    saved = checkpoint.saved.quantize if checkpoint.saved else None
    if quantize is not None and saved is not None and SCHEMES[saved] != SCHEMES[quantize]:
        raise InvalidOption(f"quantize is {quantize!r}; the weights of {checkpoint.source} were saved in {saved}, and "
                            "what that rounded away is gone: convert the original instead")
    return quantize or saved


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.directory is not None:
        return from_directory(checkpoint.directory)
    if checkpoint.gguf is None:
        raise UnsupportedModel(f"{checkpoint.source} has no tokenizer")
    from jaxinfer.frontend.gguf_tokenizer import from_gguf

    return from_gguf(checkpoint.gguf)


def eos_of(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the generation config's word, then the config's, then the tokenizer's."""
    for config in (checkpoint.generation, checkpoint.config):
        ids = config.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids]) | tokenizer.eos_ids
    return tokenizer.eos_ids
