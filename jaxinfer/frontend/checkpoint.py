"""One face for every file that holds a model: its config, its weights (unread), its tokens' and tokenizer's home."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.errors import ModelNotFound, UnsupportedModel
from jaxinfer.frontend.aligned import read_saved
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.files import Tensor, read_json
from jaxinfer.frontend.gguf import MAGIC, open_gguf
from jaxinfer.frontend.gguf_translate import translate
from jaxinfer.frontend.orbax import find_orbax, open_orbax
from jaxinfer.frontend.safetensors import SINGLE, open_safetensors_directory, open_with_metadata
from jaxinfer.frontend.saved import Saved


@dataclass(frozen=True)
class Checkpoint:
    """A model as its files describe it. `tensors` are lazy, and mapped in the order of their file. They go by Hugging
    Face's names, or by paths in a tree: in Orbax checkpoints, and where we `saved` them.

    `config` has config.json's keys ({} where somebody else's Orbax checkpoint has none) and `generation` those of
    generation_config.json ({} if there is none), both translated if the source is a GGUF file. `directory` is a Hugging
    Face directory, where tokenizer.json lives; `gguf` is the raw metadata of a GGUF file, from which a tokenizer is
    rebuilt. One of the two is None.
    """

    source: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    generation: dict[str, Any]
    directory: Path | None
    gguf: dict[str, Any] | None
    saved: Saved | None = None

    def rounds(self, quantize: str | None) -> bool:
        """Whether weights that are quantised so must be rounded whenever they are read."""
        return quantize is not None and (self.saved is None or self.saved.quantize != quantize)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory (Hugging Face's, ours, or one with an Orbax checkpoint) or a GGUF file; no weight is read
    before its tensor's `read()`.

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
    tensors, saved = _weights(directory)
    config, generation = (read_json(file) if file.is_file() else {}
                          for file in (directory / "config.json", directory / "generation_config.json"))
    return Checkpoint(str(directory), config, tensors, generation, directory, None, saved)


def _weights(directory: Path) -> tuple[Mapping[str, Tensor], Saved | None]:
    in_safetensors = any(directory.glob(f"{SINGLE}*"))
    tree = None if in_safetensors else find_orbax(directory)
    if not tree and not (directory / "config.json").is_file():
        held = sorted(entry.name for entry in directory.iterdir())
        gguf = next((f"; open the file {name} itself" for name in held if name.endswith(".gguf")), "")
        raise ModelNotFound(f"{directory}: has no config.json among {', '.join(held[:8]) or 'no files at all'}{gguf}")
    if tree:
        return open_orbax(tree)
    if (directory / SINGLE).is_file():
        return read_saved(*open_with_metadata(directory / SINGLE), directory / SINGLE)
    return open_safetensors_directory(directory), None
