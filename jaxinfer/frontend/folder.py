"""A model's folder as we save it: config, tokenizer and weights in one place, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from jaxinfer.errors import InvalidOption, JaxinferError, ModelNotFound, SaveFailed
from jaxinfer.frontend.aligned import write, write_aligned
from jaxinfer.frontend.checkpoint import Checkpoint
from jaxinfer.frontend.files import read_json
from jaxinfer.frontend.huggingface import named
from jaxinfer.frontend.orbax import write_orbax
from jaxinfer.frontend.safetensors import SINGLE
from jaxinfer.frontend.saved import Saved, by_name
from jaxinfer.frontend.tokenizer import Tokenizer
from jaxinfer.frontend.wheel import DISK_FULL

Format = Literal["safetensors", "orbax", "huggingface"]
FORMATS = get_args(Format)
# What may lie beside a model's weights: configs, tokenizers, chat templates, and a sentence pipeline's modules.
BESIDE = ("*.json", "*.jinja", "*.model", "additional_chat_templates/*.jinja", "[0-9]_*/*.json")
INDEX = "*.index.json"  # of weights in several files


def save_folder(path: str | os.PathLike, params: Any, *, spec: Any, checkpoint: Checkpoint,
                tokenizer: Tokenizer | None, saved: Saved, format: str = "safetensors") -> Path:
    """Write a model into a new folder at `path`, which `load` takes: `params`, in the shape of `spec`, in an aligned
    safetensors file, where they may be unread, in an Orbax checkpoint, or in the tensors that they were made of, as
    transformers knows them ("huggingface"); and what lies beside the weights of `checkpoint`, or of a GGUF file its
    config and `tokenizer`.

    Raises InvalidOption for an unknown format, if there is something at `path` or if quantised weights are to be
    transformers', SaveFailed where it cannot be written; then nothing is there.
    """
    path = new_folder(path, format, saved.quantize)
    needed = sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(params))
    with _whole(path, needed) as folder:
        if checkpoint.directory is not None:
            _copy_beside(checkpoint.directory, folder)
        else:
            assert tokenizer is not None
            _describe(checkpoint, tokenizer, folder)
        if format == "orbax":
            write_orbax(folder / format, params, saved)
        elif format == "huggingface":
            _say_dtype(folder / "config.json", saved.dtype)
            tensors = named(spec, params, checkpoint.config.get("model_type"))
            write(folder / SINGLE, tensors, lambda _: {"format": "pt"}, path.name)
        else:
            write_aligned(folder / SINGLE, by_name(params), saved, path.name)
    return path


def new_folder(path: str | os.PathLike, format: str, quantize: str | None) -> Path:
    """The path, if a model can be saved there in this format. Raises InvalidOption."""
    if format not in FORMATS:
        raise InvalidOption(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if format == "huggingface" and quantize is not None:
        raise InvalidOption(f"format is {format!r}, which holds floats, and the weights are in {quantize}; leave "
                            "quantize out, or convert the original")
    path = Path(path).expanduser()
    if path.exists():
        raise InvalidOption(f"{path} is there already; give another name, or remove it")
    return path


def _say_dtype(file: Path, dtype: str) -> None:
    """Have config.json name the dtype that the matrices are written in: transformers loads them in it."""
    if file.is_file():
        config = read_json(file)
        file.write_text(json.dumps({**config, "dtype" if "dtype" in config else "torch_dtype": dtype}, indent=1))


def _copy_beside(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise ModelNotFound(f"{source}: is gone, and with it the config and the tokenizer; nothing was saved")
    for file in sorted({file for pattern in BESIDE for file in source.glob(pattern)}):
        if not file.match(INDEX):
            to = folder / file.relative_to(source)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to)


def _describe(checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path) -> None:
    """What a folder says, of a model that came in one file."""
    ends = checkpoint.generation.get("eos_token_id", [])
    every = sorted({*(ends if isinstance(ends, list) else [ends]), *tokenizer.eos_ids})
    generation = {**checkpoint.generation, "eos_token_id": every}
    (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    tokenizer.save(folder)


@contextmanager
def _whole(path: Path, needed: int) -> Iterator[Path]:
    """A folder beside `path`, whose name begins with a dot, that takes its name when it is full, and is removed if
    anything fails before."""
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free / 1e6:,.1f} MB are free, {needed / 1e6:,.1f} MB are needed")
        yield folder
        for file in (*folder.rglob("*"), folder):
            _sync(file)
        os.rename(folder, path)
    except OSError as error:
        if isinstance(error, JaxinferError):
            raise
        why = "the disk is full" if error.errno in DISK_FULL else "it cannot be written"
        raise SaveFailed(f"{path}: {why} ({error.strerror}); nothing was saved") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # it has its name by now if all went well


def _sync(file: Path) -> None:
    """Have it on the disk before it has its name."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
