"""A model of the Hugging Face hub as a folder on this disk, through `huggingface_hub` and its own cache."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from jaxinfer.errors import DownloadFailed, ModelNotFound
from jaxinfer.events import Progress, emit
from jaxinfer.frontend.wheel import writing

# What a Hugging Face directory needs. Weights in pickles can run code and are never fetched.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
SURPLUS = ["[!1-9]*/*", "consolidated*"]  # folders of other formats (not 1_Pooling), and Mistral's second copy


def fetch_snapshot(repo: str, weights: bool = True) -> Path:
    """The folder of the hub's model `repo` ("org/name"), downloaded unless the hub's cache holds it.

    Only configs, tokenizers, chat templates and safetensors are fetched; without `weights` only config.json.
    Raises `ModelNotFound` where the hub has no such model, or cannot be reached and the cache lacks it;
    `DownloadFailed` where fetching broke off.
    """
    from huggingface_hub import constants, errors, snapshot_download  # takes 0.4 s, and most runs need no hub

    hub, cache, totals = constants.ENDPOINT, Path(constants.HF_HUB_CACHE), []
    with writing(repo, cache, needed=0):
        try:
            bars: Any = _events_for_bars(repo, totals)
            folder = snapshot_download(repo, allow_patterns=FILES if weights else ["config.json"],
                                       ignore_patterns=SURPLUS, tqdm_class=bars)
        except errors.GatedRepoError as error:
            raise ModelNotFound(f"{repo}: only users whom its owner has let in may download it; accept its "
                                f"terms on {hub}/{repo}, then log in with `hf auth login`") from error
        except errors.RepositoryNotFoundError as error:
            raise ModelNotFound(f"{repo}: neither a folder here nor a public model on {hub}; check "
                                "the spelling, or log in with `hf auth login` if it is private") from error
        except errors.LocalEntryNotFoundError as error:
            raise ModelNotFound(f"{repo}: no such folder here, the hub ({hub}) cannot be reached, "
                                f"and its cache {cache} does not hold the model. Connect (and unset "
                                "HF_HUB_OFFLINE), copy the model into that cache, or give the path of a "
                                "folder or .gguf file") from error
        except Exception as error:  # the client's transport is requests, httpx or httpx2, by its version
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DownloadFailed(f"{repo}: fetching it from {hub} broke off ({error}); complete "
                                 f"files stay in {cache}, try again") from error
    if totals:
        emit(Progress("download", repo, totals[-1], totals[-1]))
    return _checked(repo, Path(folder), ("config.json", "*.safetensors") if weights else ("config.json",))


def _checked(repo: str, folder: Path, needed: tuple[str, ...]) -> Path:
    lacking = [pattern for pattern in needed if not any(folder.glob(pattern))]
    if lacking:
        raise ModelNotFound(f"{repo}: the hub's copy has no {' and no '.join(lacking)}; models are read from "
                            "config.json and *.safetensors, or from a .gguf file that you download and name")
    return folder


def _events_for_bars(repo: str, totals: list[int]) -> type:
    """A tqdm class that emits `Progress` where it would draw, and notes each total in bytes that it sees."""
    from tqdm import tqdm

    class Events(tqdm):
        monitor_interval = 0  # no thread to watch a bar that nobody sees

        def __init__(self, *args: Any, **kwargs: Any):
            # The client counts files in one bar, and in two more the bytes on the wire and on the disk.
            self.counts = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "leave": False})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.counts and self.total:
                totals.append(int(self.total))
                # The total grows with each file that starts, so only the end of all of them is the end.
                emit(Progress("download", repo, min(int(self.n), totals[-1] - 1), totals[-1]))

    return Events
