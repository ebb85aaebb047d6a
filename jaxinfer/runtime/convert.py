"""`convert`: a model from one format on the disk to another, a piece of a weight at a time; and `verify`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from jaxinfer.errors import InvalidOption
from jaxinfer.frontend import aligned
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.folder import new_folder, save_folder
from jaxinfer.frontend.saved import Saved
from jaxinfer.frontend.weights import load_params, open_params
from jaxinfer.runtime import origin


def convert(source: str | os.PathLike, destination: str | os.PathLike, *, to: str = "safetensors",
            dtype: str | None = None, quantize: str | None = None, graph: Any = None) -> Path:
    """Write the model at `source` (whatever `load` takes, but for ONNX files) into a new folder at `destination`.
    Loaded, either gives the same bits.

    `to`: "safetensors", one file that is written a piece of a weight at a time, and that a CPU reads where it is
    mapped; "orbax", a checkpoint for which the weights are held in memory once. Both have the weights as the engine
    holds them, so that `load` has nothing to do to them. "huggingface" has the tensors that transformers knows, not
    quantised. `dtype`, `quantize` and `graph` are what `load` would take.

    Raises what `load` raises, InvalidOption if there is something at `destination`, and SaveFailed if the disk is full;
    then nothing is there.
    """
    origin.check_numbers(dtype, quantize)
    new_folder(destination, to, quantize)
    checkpoint = open_checkpoint(resolve(source))
    quantize, number = origin.scheme_of(checkpoint, quantize), origin.dtype_of(checkpoint, dtype)
    _, model = origin.model_of(checkpoint, graph, None)
    how: dict[str, Any] = dict(dtype=number, source=checkpoint.source, quantize=quantize, saved=checkpoint.saved)
    if to == "orbax":
        cpu = jax.local_devices(backend="cpu")[0]
        params = load_params(model, checkpoint.tensors, put=lambda _, x: jax.device_put(x[...], cpu), **how)
    else:
        params = open_params(model, checkpoint.tensors, **how)
    tokenizer = None if checkpoint.gguf is None else origin.tokenizer_of(checkpoint)
    return save_folder(destination, params, spec=model.spec, checkpoint=checkpoint, tokenizer=tokenizer,
                       saved=Saved(str(number), quantize), format=to)


def verify(source: str | os.PathLike) -> int:
    """Read all weights at `source`, which `convert` or `save` wrote as safetensors, and compare them with the checksums
    in the file; returns how many tensors there are. A load does not: it would have to read what it only maps.

    Raises CorruptFile that names the tensors that differ, InvalidOption where no checksums were written.
    """
    checkpoint = open_checkpoint(resolve(source))
    if not (checkpoint.saved and checkpoint.saved.sha256):
        raise InvalidOption(f"{checkpoint.source} has no checksums; a safetensors file that jaxinfer wrote has")
    aligned.verify(checkpoint.tensors, checkpoint.saved, checkpoint.source)
    return len(checkpoint.tensors)
