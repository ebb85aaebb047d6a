"""What a sentence-transformers directory does around its encoder: truncate, pool, normalise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend.files import read_json

# Ways of pooling in the order in which their vectors are concatenated, and the flags that stood for them before
# sentence-transformers 5.4 gave them names.
FLAGS = {"cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens",
         "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
         "weightedmean": "pooling_mode_weightedmean_tokens", "lasttoken": "pooling_mode_lasttoken"}


@dataclass(frozen=True)
class Pipeline:
    """From text to vector: `prompt` goes before each text, which is lowered if `lower` and cut to `max_length` tokens,
    special ones included (None: to what the encoder reads); the row's vectors by each way of `pooling` (a key of
    `kernels.encode.POOLS`) are concatenated, and divided by their length if `normalise`."""

    pooling: tuple[str, ...] = ("mean",)
    normalise: bool = False
    max_length: int | None = None
    lower: bool = False
    prompt: str = ""


def read_pipeline(directory: str | Path) -> Pipeline:
    """The Pipeline that `modules.json` and its modules' configs describe; without one, the mean over all tokens.

    Raises UnsupportedModel for modules and ways of pooling that are not known, CorruptFile for a file that is no JSON.

    >>> read_pipeline("/nowhere")
    Pipeline(pooling=('mean',), normalise=False, max_length=None, lower=False, prompt='')
    """
    folder = Path(directory)
    if not (folder / "modules.json").is_file():
        return Pipeline()
    modules = {kind: folder / path for kind, path in _modules(folder / "modules.json")}
    settings = _settings(folder / "sentence_bert_config.json")
    prompts = _settings(folder / "config_sentence_transformers.json")
    return Pipeline(
        pooling=_pooling(modules["Pooling"] / "config.json"),
        normalise="Normalize" in modules,
        max_length=settings.get("max_seq_length"),
        lower=bool(settings.get("do_lower_case")),
        prompt=(prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), ""),
    )


def _modules(file: Path) -> list[tuple[str, str]]:
    """The modules' kinds and folders, in order. Raises UnsupportedModel unless they are a pipeline as we know it."""
    try:
        modules = [(entry["type"].rpartition(".")[2], entry["path"]) for entry in json.loads(file.read_bytes())]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptFile(f"{file}: is no list of modules with a type and a path each ({error!r})") from error
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedModel(f"{file}: its modules are {', '.join(kinds)}; expected Transformer, Pooling and perhaps "
                               "Normalize")
    return modules


def _settings(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _pooling(file: Path) -> tuple[str, ...]:
    """The ways of pooling, in the order in which their vectors stand."""
    settings = read_json(file)
    told = settings.get("pooling_mode") or [name for name, flag in FLAGS.items() if settings.get(flag)] or "mean"
    names = [told] if isinstance(told, str) else told
    unknown = [str(name) for name in names if name not in FLAGS]
    if unknown:
        raise UnsupportedModel(f"{file}: pools by {', '.join(unknown)}; expected some of {', '.join(FLAGS)}")
    if settings.get("include_prompt", True) is not True:
        raise UnsupportedModel(f"{file}: include_prompt is {settings['include_prompt']}; only true is supported")
    return tuple(name for name in FLAGS if name in names)
