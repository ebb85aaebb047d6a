"""Which models there are, and the one that a request names: "name", or "name@label" for another version than the
stable one."""

from __future__ import annotations

import math
import time
from typing import Any

from jaxinfer.errors import ModelNotFound
from jaxinfer.runtime.language import LanguageModel
from jaxinfer.runtime.registry import STABLE, Handle
from jaxinfer.serving.openai.wire import ModelCard, ModelList
from jaxinfer.serving.problems import Problem
from jaxinfer.serving.site import Site

STARTED = int(time.time())


def find(site: Site, said: str) -> Handle:
    """The model's handle. Raises ModelNotFound; or Problem 503 for one that is being loaded, or could not be."""
    name, _, label = said.partition("@")
    try:
        return site.registry.at(name, label or STABLE)
    except ModelNotFound:
        loading = site.loading.get(name)
        if loading is None:
            raise
        if loading.error is not None:
            raise Problem(503, f"the model {name!r} could not be loaded", "model_not_loaded", "model") from None
        seconds = math.ceil(max(1.0, time.monotonic() - loading.since))  # about as long again
        raise Problem(503, f"the model {name!r} is being loaded", "model_loading", "model",
                      {"Retry-After": str(min(seconds, 60))}) from None


def find_language(site: Site, said: str) -> tuple[Handle, LanguageModel]:
    """The same, of a model that draws tokens; and what stands behind the handle now, to be looked at."""
    handle = find(site, said)
    model = handle.version.model
    if not isinstance(model, LanguageModel):
        raise Problem(400, f"{said} is no language model: it draws no tokens", "wrong_model", "model")
    return handle, model


def named(site: Site) -> dict[str, Any]:
    """Every version that a request can name, by that name."""
    found = {}
    for name in site.registry:
        try:
            for label in sorted(site.registry.labels(name), key=lambda label: (label != STABLE, label)):
                found[name if label == STABLE else f"{name}@{label}"] = site.registry.at(name, label).version.model
        except ModelNotFound:
            pass  # unloaded just now
    return found


class Models:
    def __init__(self, site: Site):
        self.site = site

    async def list(self) -> ModelList:
        return ModelList([_card(name, model) for name, model in named(self.site).items()])

    async def get(self, model: str) -> ModelCard:
        return _card(model, find(self.site, model).version.model)


def _card(name: str, model: Any) -> ModelCard:
    longest = getattr(model, "max_context", None) or getattr(model, "max_length", None)
    return ModelCard(name, STARTED, "jaxinfer", longest)
