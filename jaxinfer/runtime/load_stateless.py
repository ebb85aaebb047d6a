"""From a checkpoint of an encoder, or an ONNX file, to what serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.compiler.buckets import powers
from jaxinfer.compiler.encoders import Encoders, encoder_ladder
from jaxinfer.compiler.functions import Functions, LeafLike
from jaxinfer.errors import InvalidOption, UnsupportedModel
from jaxinfer.frontend.checkpoint import Checkpoint
from jaxinfer.frontend.folder import save_folder
from jaxinfer.frontend.saved import Saved
from jaxinfer.frontend.sentence import read_pipeline
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Encoder
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.door import Door
from jaxinfer.runtime.encoder import TextEncoder
from jaxinfer.runtime.endpoint import Endpoint
from jaxinfer.runtime.padded import BATCH, Ladders

MAX_DELAY = 0.002  # seconds that a request waits for company while the device is busy
ANONYMOUS = (None, "?")  # what an ONNX file calls sizes that have nothing to do with each other


def load_encoder(checkpoint: Checkpoint, config: Any, model: Encoder, tokenizer: Any, *, dtype: Any,
                 quantize: str | None, max_waiting: int, device: jax.Device) -> TextEncoder:
    """The weights are read, the pipeline of the checkpoint's directory is followed, and its queue is opened."""
    pipeline = read_pipeline(checkpoint.directory) if checkpoint.directory else read_pipeline("")
    longest = min(pipeline.max_length or model.max_context, model.max_context)
    shapes = planning.abstract_params(model, dtype, quantize)
    programs = Encoders(model, shapes, pipeline.pooling, pipeline.normalise, device, forced=FORCED.get(quantize))
    try:
        read = partial(load_params, model, checkpoint.tensors, dtype=dtype, quantize=quantize, source=checkpoint.source,
                       put=lambda _, x: jax.device_put(x[...], device), saved=checkpoint.saved)
        save = partial(save_folder, spec=model.spec, checkpoint=checkpoint, tokenizer=tokenizer,
                       saved=Saved(str(dtype), quantize))
        return TextEncoder(model, programs, read(), tokenizer, pipeline, encoder_ladder(longest), config=config,
                           save=save, max_delay=MAX_DELAY, max_waiting=max_waiting,
                           name=Path(checkpoint.source).name, again=None if checkpoint.rounds(quantize) else read)
    except BaseException:
        programs.close()
        raise


def load_onnx_endpoint(path: Path, *, known: Mapping[str, Any], max_batch: int, max_waiting: int, device: jax.Device
                       ) -> Endpoint:
    """An Endpoint of an ONNX file, with `graph`. Requests are batched if the first axis of every input and output is
    one and the same open size, unless `max_batch` is 1: then a request brings that axis as well. Other sizes that the
    file leaves open are not padded, but compiled as they come. `known` inputs are the same for all requests."""
    from jaxinfer.frontend.onnx import load_onnx

    graph = load_onnx(path)
    known = {name: _known(path, graph, name, value) for name, value in known.items()}
    asked = {name: like for name, like in graph.inputs.items() if not like.optional and name not in known}
    _check_inputs(path, asked)
    batched = max_batch > 1 and _has_batch(graph, asked)
    leaves = tuple(_leaf(name, like, batched) for name, like in sorted(asked.items()))  # as a dict's leaves are
    axes = {BATCH: powers(max_batch)} if batched else {}
    structure = jax.tree.structure(((), {leaf.path: 0 for leaf in leaves}))
    params = jax.device_put(graph.params, device)
    call = _call(graph, known, [name for name, like in asked.items() if like.branching])
    functions = Functions(_by_row(call) if batched else call, params, leaves, structure, 0, device)
    try:
        if not any(isinstance(dim, str) for leaf in leaves for dim in leaf.shape):
            functions.check((), axes.get(BATCH))
        endpoint = Endpoint(functions, params, Door(leaves, structure, tuple(asked), {}), Ladders(axes),
                            max_delay=MAX_DELAY, max_waiting=max_waiting, nan="pass", name=graph.name)
    except BaseException:
        functions.close()
        raise
    endpoint.graph = graph
    return endpoint


def _known(path: Path, graph: Any, name: str, value: Any) -> np.ndarray:
    if name not in graph.inputs:
        raise InvalidOption(f"known names {name!r}; the inputs of {path} are {', '.join(graph.inputs)}")
    try:
        return np.asarray(value).astype(graph.inputs[name].dtype)
    except (ValueError, TypeError) as error:
        raise InvalidOption(f"known {name} is {value!r}; it must be {graph.inputs[name].dtype}") from error


def _call(graph: Any, known: dict[str, np.ndarray], branching: list[str]) -> Callable:
    """The file's function of what a request brings. Only with the sizes of one is it seen whether both branches fit."""
    def call(params, **inputs):
        try:
            return graph.apply(params, inputs | known)
        except UnsupportedModel as error:
            if not branching:
                raise
            raise UnsupportedModel(f"{str(error).rstrip('.')}; which one is taken follows from "
                                   f"{', '.join(branching)}: load with known={{{branching[0]!r}: ...}}") from error
    return call


def _check_inputs(path: Path, asked: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel for inputs that cannot be a request's arrays."""
    alone = "jaxinfer.frontend.onnx.load_onnx(path).apply(params, inputs) runs it for one"
    if fixed := [name for name, like in asked.items() if like.shaping]:
        raise UnsupportedModel(f"{path}: {', '.join(fixed)} decide shapes, which differ from request to request then; "
                               f"give them as known={{{fixed[0]!r}: ...}}, or {alone}")
    if odd := [name for name, like in asked.items()
               if like.shape is None or like.kind != "tensor" or like.dtype == object]:
        raise UnsupportedModel(f"{path}: {', '.join(odd)} are no arrays of numbers with a known rank, as an endpoint's "
                               f"requests must be; {alone}")


def _has_batch(graph: Any, asked: Mapping[str, Any]) -> bool:
    """Whether the first axis of all inputs and outputs is one and the same open size."""
    firsts = {like.shape[0] if like.shape else None for like in (*asked.values(), *graph.outputs.values())}
    return len(firsts) == 1 and isinstance(firsts.pop(), str)


def _by_row(call: Callable) -> Callable:
    """The function, mapped over batches of one: whatever the file does along its first axis, a request is alone."""
    def row(params, inputs):
        found = call(params, **jax.tree.map(lambda x: x[None], inputs))
        return jax.tree.map(lambda x: jnp.squeeze(x, 0), found)
    return lambda params, **inputs: jax.vmap(row, (None, 0))(params, inputs)


def _leaf(name: str, like: Any, batched: bool) -> LeafLike:
    dims = like.shape[1:] if batched else like.shape
    shape = tuple(f"{name}.{i}" if dim in ANONYMOUS else dim for i, dim in enumerate(dims))
    return LeafLike(name, shape, np.dtype(jax.dtypes.canonicalize_dtype(like.dtype)))
