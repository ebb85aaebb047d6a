"""One face for every file that holds a model: its config, its weights (unread), its tokens' and tokenizer's home."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.errors import ModelNotFound, UnsupportedModel
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.files import Tensor, read_json
from jaxinfer.frontend.gguf import MAGIC, open_gguf
from jaxinfer.frontend.gguf_translate import translate
from jaxinfer.frontend.safetensors import open_safetensors_directory


@dataclass(frozen=True)
class Checkpoint:
    """A model as its files describe it. `tensors` are lazy and go by Hugging Face's names.

    `config` has config.json's keys and `generation` those of generation_config.json ({} if there is none), both
    translated if the source is a GGUF file. `directory` is a Hugging Face directory, where tokenizer.json lives;
    `gguf` is the raw metadata of a GGUF file, from which a tokenizer is rebuilt. One of the two is None.
    """

    source: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    generation: dict[str, Any]
    directory: Path | None
    gguf: dict[str, Any] | None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file; no weight is read before its tensor's `read()`.

    Raises ModelNotFound if something that must be there is not, CorruptFile if a file ends early or contradicts
    itself, UnsupportedModel if it holds what we do not understand.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise ModelNotFound(f"{path}: there is no such file or directory")
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC and path.suffix != ".gguf":
        hint = f"; open its directory, {path.parent}" if path.suffix == ".safetensors" else ""
        raise UnsupportedModel(f"{path}: is neither a .gguf file nor a directory with a config.json{hint}")
    metadata, stored = open_gguf(path)
    config, tensors, generation = translate(metadata, stored, str(path))
    return Checkpoint(str(path), config, tensors, generation, None, metadata)


def open_config(source: str | os.PathLike[str]) -> Checkpoint:
    """A model's description, from what `resolve` takes or from the path of a config.json: its weights need not be
    there, and are not fetched from a hub. Without them `tensors` is empty.

    Raises what `resolve` and `open_checkpoint` raise.
    """
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        return Checkpoint(str(path), read_json(path), {}, {}, None, None)
    path = resolve(source, weights=False)
    if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return Checkpoint(str(path), read_json(path / "config.json"), {}, {}, path, None)
    return open_checkpoint(path)


def _open_directory(directory: Path) -> Checkpoint:
    if not (directory / "config.json").is_file():
        held = sorted(entry.name for entry in directory.iterdir())
        gguf = next((f"; open the file {name} itself" for name in held if name.endswith(".gguf")), "")
        raise ModelNotFound(f"{directory}: has no config.json among {', '.join(held[:8]) or 'no files at all'}{gguf}")
    config = read_json(directory / "config.json")
    settings = directory / "generation_config.json"
    generation = read_json(settings) if settings.is_file() else {}
    return Checkpoint(str(directory), config, open_safetensors_directory(directory), generation, directory, None)
