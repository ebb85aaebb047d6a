"""From a checkpoint of an encoder, or an ONNX file, to what serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.compiler.buckets import powers
from jaxinfer.compiler.encoders import Encoders, encoder_ladder
from jaxinfer.compiler.functions import FunctionKey, Functions, LeafLike
from jaxinfer.errors import UnsupportedModel
from jaxinfer.frontend.checkpoint import Checkpoint
from jaxinfer.frontend.sentence import read_pipeline
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Encoder
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.door import Door
from jaxinfer.runtime.encoder import TextEncoder
from jaxinfer.runtime.endpoint import Endpoint
from jaxinfer.runtime.padded import BATCH, Ladders

MAX_DELAY = 0.002  # seconds that a request waits for company while the device is busy


def load_encoder(checkpoint: Checkpoint, config: Any, model: Encoder, tokenizer: Any, *, dtype: Any, max_waiting: int,
                 device: jax.Device) -> TextEncoder:
    """The weights are read, the pipeline of the checkpoint's directory is followed, and its queue is opened."""
    pipeline = read_pipeline(checkpoint.directory) if checkpoint.directory else read_pipeline("")
    longest = min(pipeline.max_length or model.max_context, model.max_context)
    programs = Encoders(model, planning.abstract_params(model, dtype), pipeline.pooling, pipeline.normalise, device)
    try:
        params = load_params(model, checkpoint.tensors, dtype=dtype, source=checkpoint.source,
                             put=lambda _, array: jax.device_put(array, device))
        return TextEncoder(model, programs, params, tokenizer, pipeline, encoder_ladder(longest), config=config,
                           max_delay=MAX_DELAY, max_waiting=max_waiting, name=Path(checkpoint.source).name)
    except BaseException:
        programs.close()
        raise


def load_onnx_endpoint(path: Path, *, max_batch: int, max_waiting: int, device: jax.Device) -> Endpoint:
    """An Endpoint of an ONNX file, with `graph`. Requests are batched if the first axis of every input and output is
    one and the same unnamed size; other sizes that the file leaves open are not padded, but compiled as they come."""
    from jaxinfer.frontend.onnx import load_onnx

    graph = load_onnx(path)
    if fixed := [name for name, like in graph.inputs.items() if like.shaping]:
        raise UnsupportedModel(f"{path}: {', '.join(fixed)} decide shapes, which differ from request to request then; "
                               "jaxinfer.frontend.onnx.load_onnx(path).apply(params, inputs) runs it for one")
    batch = _batch_axis(graph)
    leaves = tuple(_leaf(name, like, batch) for name, like in graph.inputs.items() if not like.optional)
    axes = {BATCH: powers(max_batch)} if batch is not None else {}
    structure = jax.tree.structure(((), {leaf.path: 0 for leaf in leaves}))
    leaves = tuple(sorted(leaves, key=lambda leaf: leaf.path))  # as a dict's leaves are
    params = jax.device_put(graph.params, device)
    call = lambda params, **inputs: graph.apply(params, inputs)
    functions = Functions(call, params, leaves, structure, 0, device)
    try:
        if not any(isinstance(dim, str) for leaf in leaves for dim in leaf.shape):
            functions.check(FunctionKey(2 if axes else None, ()))
        names = tuple(name for name, like in graph.inputs.items() if not like.optional)
        endpoint = Endpoint(functions, params, Door(leaves, structure, names, {}), Ladders(axes), max_delay=MAX_DELAY,
                            max_waiting=max_waiting, nan="pass", name=graph.name)
    except BaseException:
        functions.close()
        raise
    endpoint.graph = graph
    return endpoint


def _batch_axis(graph: Any) -> str | None:
    """The name of the size that is first in all inputs and outputs, if there is one."""
    firsts = {like.shape[0] if like.shape else None for like in (*graph.inputs.values(), *graph.outputs.values())}
    name = firsts.pop() if len(firsts) == 1 else None
    return name if isinstance(name, str) else None


def _leaf(name: str, like: Any, batch: str | None) -> LeafLike:
    dims = like.shape if batch is None else like.shape[1:]
    shape = tuple(dim if isinstance(dim, int | str) else f"{name}.{i}" for i, dim in enumerate(dims))
    return LeafLike(name, shape, np.dtype(jax.dtypes.canonicalize_dtype(like.dtype)))
