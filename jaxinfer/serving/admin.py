"""The administration, on a port and with a token of its own: load, unload, swap, label, drain, ledger, plan, cache."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import jax
from jax.numpy import floating, issubdtype
from msgspec import Meta, Struct

from jaxinfer.compiler.stored import store
from jaxinfer.errors import InvalidOption
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Encoder, Graph
from jaxinfer.runtime import load as loading
from jaxinfer.runtime import origin
from jaxinfer.runtime.plan import plan
from jaxinfer.runtime.registry import STABLE
from jaxinfer.serving.openai.wire import Asked
from jaxinfer.serving.operations import Operation
from jaxinfer.serving.problems import Problem
from jaxinfer.serving.site import Part, Site, check_options
from jaxinfer.serving.threads import OPERATING, WATCHING

Seconds = Annotated[float, Meta(ge=0, le=86400)]
Options = dict[str, str | int | float | bool | dict[str, str | int] | None]


class LoadRequest(Asked):
    """`options` are those of `jaxinfer.load`; the others those of `Registry.load`."""

    source: str
    options: Options = {}
    label: str = STABLE
    policy: Literal["available", "frugal"] | None = None
    needs: int | str | None = None
    drain: Seconds = 60.0


class UnloadRequest(Asked):
    version: int | None = None
    drain: Seconds = 60.0


class SwapRequest(Asked):
    """The weights of `source` take the place of those that the version with the `label` runs on."""

    source: str
    label: str = STABLE
    running: Literal["finish", "continue"] = "finish"


class LabelRequest(Asked):
    label: str
    version: int
    drain: Seconds = 60.0


class DrainRequest(Asked):
    """Take no more requests, and wait for so many seconds until those that run have ended."""

    seconds: Seconds = 60.0


class PlanRequest(Asked):
    source: str
    options: Options = {}


class PruneRequest(Asked):
    gigabytes: Annotated[float, Meta(ge=0)]


class Number(Struct):
    """The version that was made, or given the label; of weights, after a swap."""

    version: int


class Done(Struct):
    done: bool = True


class Running(Struct):
    running: int
    draining: bool


class VersionInfo(Struct):
    version: int
    weights: int
    bytes: int
    stats: dict[str, Any]


class ModelInfo(Struct):
    versions: list[VersionInfo]
    labels: dict[str, int]


class Loading(Struct):
    seconds: float
    error: str | None


class Overview(Struct):
    models: dict[str, ModelInfo]
    loading: dict[str, Loading]
    running: int
    draining: bool


class Program(Struct):
    name: str
    size: int
    used: float
    note: dict[str, Any]


class Programs(Struct):
    folder: str
    limit: int
    programs: list[Program]


class Pruned(Struct):
    programs: int
    bytes: int


class Admin:
    """The registry's verbs, each on a thread: they may take minutes, and the server serves on."""

    def __init__(self, site: Site):
        self.site, self.registry = site, site.registry

    async def overview(self) -> Overview:
        now = time.monotonic()
        loading = {name: Loading(now - one.since, None if one.error is None else str(one.error))
                   for name, one in tuple(self.site.loading.items())}
        models = {name: await WATCHING.run(self._info, name) for name in self.registry}
        return Overview(models, loading, self.site.running, self.site.draining)

    def _info(self, name: str) -> ModelInfo:
        labels = self.registry.labels(name)
        at = {number: self.registry.at(name, label).version for label, number in labels.items()}
        versions = [VersionInfo(v.number, v.model.version, v.model.nbytes, asdict(v.model.stats)) for v in at.values()]
        return ModelInfo(sorted(versions, key=lambda info: info.version), labels)

    async def load(self, ask: LoadRequest, model: str) -> Number:
        if "@" in model:
            raise InvalidOption(f"name {model!r} has an @ in it, which requests put between a name and a label")
        check_options(loading.load, ask.options)
        make = partial(loading.load, ask.source, **ask.options)
        return Number(await _apart(self.site.load, model, make, label=ask.label, policy=ask.policy, needs=ask.needs,
                                   drain=ask.drain))

    async def unload(self, ask: UnloadRequest, model: str) -> Done:
        if ask.version is None:
            self.site.asked -= {model}
        if (failed := self.site.loading.get(model)) is not None and failed.error is not None:
            self.site.loading.pop(model, None)
            if model not in self.registry:
                return Done()
        await _apart(self.registry.unload, model, ask.version, ask.drain)
        return Done()

    async def swap(self, ask: SwapRequest, model: str) -> Number:
        running = self.registry.at(model, ask.label).version.model
        params = await _apart(_weights, ask.source, running)
        how = {} if ask.running == "finish" else {"running": ask.running}
        if how and isinstance(running.graph, Encoder):
            raise InvalidOption("running is 'continue', which is for language models; others finish what they do")
        return Number(await _apart(running.swap, params, **how))

    async def label(self, ask: LabelRequest, model: str) -> Number:
        await _apart(self.registry.flip, model, ask.version, ask.label, ask.drain)
        return Number(ask.version)

    async def roll_back(self, model: str) -> Number:
        return Number(await _apart(self.registry.roll_back, model))

    async def drain(self, ask: DrainRequest) -> Running:
        self.site.draining = True
        end = time.monotonic() + ask.seconds
        await _apart(_until, lambda: not self.site.running, end)
        return Running(self.site.running, self.site.draining)

    async def resume(self) -> Running:
        self.site.draining = False
        return Running(self.site.running, self.site.draining)

    async def ledger(self, model: str) -> list[dict[str, Any]]:
        entries = self.registry[model].version.model.ledger
        return [asdict(entry) | {"waste": entry.waste} for entry in entries]

    async def plan(self, ask: PlanRequest) -> dict[str, Any]:
        check_options(plan, ask.options)
        found = await _apart(plan, ask.source, **ask.options)
        return asdict(found) | {"free": found.free, "fits": found.fits}

    async def cache(self) -> Programs:
        kept = _store()
        items = await _apart(lambda: list(kept.items()))
        return Programs(str(kept.folder), kept.limit, [Program(one.name, one.size, one.used, one.note)
                                                       for one in items])

    async def prune(self, ask: PruneRequest) -> Pruned:
        return Pruned(*await _apart(_store().prune, int(ask.gigabytes * 1e9)))


async def _apart(act: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `act` returns, on a thread. A caller that hangs up does not stop it."""
    return await OPERATING.run(partial(act, *args, **options), abandon=True)


def _until(condition: Callable[[], object], end: float) -> None:
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def _store() -> Any:
    kept = store()
    if kept is None:
        raise Problem(404, "no programs are stored: $JAXINFER_CACHE_GB is 0", "no_cache")
    return kept


def _weights(source: str, model: Any) -> Any:
    """The weights of a checkpoint in the shape, and the dtype, of those that a model runs on."""
    graph = model.graph
    if not isinstance(graph, Graph | Encoder):
        raise InvalidOption("swap is for models of a checkpoint; load this one anew")
    checkpoint = open_checkpoint(resolve(source))
    floats = Counter(x.dtype for x in jax.tree.leaves(model.params) if x.ndim > 1 and issubdtype(x.dtype, floating))
    dtype = max(floats, key=floats.__getitem__) if floats else origin.dtype_of(checkpoint, None)
    return load_params(graph, checkpoint.tensors, dtype=dtype, source=checkpoint.source, saved=checkpoint.saved,
                       quantize=origin.scheme_of(checkpoint, None))


def part(site: Site) -> Part:
    """Only routes of the admin port; what they take is not in the public document."""
    admin = Admin(site)
    at = "/admin/models/{model:path}"
    operations = [
        Operation("GET", "/admin", "Models, versions, labels, what is being loaded", admin.overview),
        Operation("POST", f"{at}/load", "Load a version, and give it a label", admin.load, LoadRequest),
        Operation("POST", f"{at}/unload", "Drain and close a version, or all", admin.unload, UnloadRequest),
        Operation("POST", f"{at}/swap", "Take other weights, with no compile", admin.swap, SwapRequest),
        Operation("POST", f"{at}/label", "Give a label to a version", admin.label, LabelRequest),
        Operation("POST", f"{at}/roll_back", "Make the version before stable again", admin.roll_back),
        Operation("GET", f"{at}/ledger", "Every Executable of a model", admin.ledger),
        Operation("POST", "/admin/drain", "Take no more requests", admin.drain, DrainRequest),
        Operation("POST", "/admin/resume", "Take requests again", admin.resume),
        Operation("POST", "/admin/plan", "What a model needs and takes", admin.plan, PlanRequest),
        Operation("GET", "/admin/cache", "The programs that are stored", admin.cache),
        Operation("POST", "/admin/cache/prune", "Remove the programs used the longest ago", admin.prune, PruneRequest),
    ]
    return Part(admin=[operation.route() for operation in operations])
