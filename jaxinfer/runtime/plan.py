"""`plan`: from a model's description to memory, times and cost on a device that need not be here. No weight is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfer.compiler.hardware import (
    HARDWARE,
    Hardware,
    compiling_for,
    cuda_device,
    described,
    tpu_topology,
)
from jaxinfer.compiler.inspect import amount
from jaxinfer.compiler.placement import Placement, spread
from jaxinfer.compiler.plan_picture import plan_picture
from jaxinfer.compiler.probe import probed
from jaxinfer.errors import InvalidOption, UnsupportedModel
from jaxinfer.frontend.architectures import architecture
from jaxinfer.frontend.checkpoint import Checkpoint, open_config
from jaxinfer.graph import Graph
from jaxinfer.graphs import decoder, gpt2
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.devices import AXES, find_device, find_meshes, mesh_sizes
from jaxinfer.runtime.load import MAX_ROWS, check_sizes
from jaxinfer.runtime.origin import MAX_CONTEXT, dtype_of, model_of
from jaxinfer.runtime.planner import Planner, Step, largest
from jaxinfer.runtime.shapes import CPU_PAGES, SHARE, steady

OF_ABSENT = 0.9  # of the memory of a device that is not here is for the model; the rest is the runtime's own
BUILDERS = {decoder.Config: decoder.build, gpt2.Config: gpt2.build}


@dataclass(frozen=True)
class Traffic:
    """What is asked of a model: requests of `prompt_tokens` that are answered with `answer_tokens`; `concurrency` of
    them at any time (None: as many as the plan has rows), or `requests_per_second`."""

    prompt_tokens: int = 512
    answer_tokens: int = 128
    concurrency: int | None = None
    requests_per_second: float | None = None

    def __post_init__(self):
        for name in ("prompt_tokens", "answer_tokens", "concurrency"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "concurrency" and value is None):
                raise InvalidOption(f"traffic has {name}={value!r}; it must be an integer >= 1")
        rate = self.requests_per_second
        if rate is not None and (type(rate) not in (int, float) or not 0 < rate < float("inf")):
            raise InvalidOption(f"traffic has requests_per_second={rate!r}; it must be a number > 0")
        if rate is not None and self.concurrency is not None:
            raise InvalidOption("traffic has concurrency and requests_per_second; one follows from the other")


@dataclass(frozen=True)
class Service:
    """What the traffic gets: `rows` decode at a time on each shard. `tokens_per_second` are of answers, of all devices;
    `first_token` the seconds until a request's first, if a place is free when it comes, and `each_token` those between
    the others, neighbours' prompts included. `keeps_up` says whether requests are served as fast as they come.
    `cost_per_million` answer tokens is in the price's currency (None: there is no price)."""

    rows: int
    tokens_per_second: float
    requests_per_second: float
    first_token: float
    each_token: float
    keeps_up: bool
    cost_per_million: float | None


@dataclass(frozen=True)
class Plan:
    """What a model needs and takes on a device. Print it, show it in a notebook, or read its fields.

    Bytes are those of each device: `weights`, `pages` (what `load` would make), the largest `temporaries`, and what is
    left `free` of the `budget`. `rows` are the full contexts that have pages at once. `batches` are (context, the most
    rows of it), `contexts` are (rows, the longest context of each). `fits` is what `load` would say by its upper
    estimate of temporaries, and `suggestions` are options with which it would fit. `sources` say where each number
    comes from.
    """

    model: str
    device: str
    devices: int
    placement: str
    dtype: str
    quantize: str | None
    max_context: int
    max_rows: int
    budget: int
    weights: int
    pages: int
    page_count: dict[str, int]
    temporaries: int
    needed: int
    rows: float
    batches: tuple[tuple[int, int], ...]
    contexts: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]
    traffic: Traffic
    service: Service | None
    suggestions: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def free(self) -> int:
        return self.budget - self.weights - self.pages - self.temporaries

    @property
    def fits(self) -> bool:
        """Whether one full context fits beside the weights and the temporaries of `max_rows`."""
        return self.needed <= self.budget

    def lines(self) -> list[tuple[str, str]]:
        """The first table: what, and how much."""
        size = partial(amount, unit="B")
        counts = ", ".join(f"{count:,} {name}" for name, count in self.page_count.items())
        found = [
            ("model", f"{self.model}, {self.dtype}" + (f", weights in {self.quantize}" if self.quantize else "")),
            ("devices", f"{self.devices} x {self.device}; {self.placement}"),
            ("budget of each", size(self.budget)),
            ("weights", size(self.weights)),
            ("pages", f"{size(self.pages)} ({counts}: {self.rows:.1f} contexts of {self.max_context:,})"),
            ("temporaries", size(self.temporaries)),
            ("free", size(self.free)),
            ("fits", "yes" if self.fits else f"no: one context of {self.max_context:,} needs {size(self.needed)}"),
            ("largest batch", ", ".join(f"{rows:,} x {context:,}" for context, rows in self.batches)),
            ("longest context", ", ".join(f"{context:,} for {rows} row{'s' * (rows > 1)}"
                                          for rows, context in self.contexts)),
        ]
        if self.service is not None:
            found += self._served(self.traffic, self.service)
        return found + [("it would fit with", option) for option in self.suggestions]

    def _served(self, traffic: Traffic, service: Service) -> list[tuple[str, str]]:
        asked = (f"{traffic.requests_per_second:g} requests/s" if traffic.requests_per_second
                 else f"{service.rows} rows at a time")
        found = [
            ("traffic", f"{traffic.prompt_tokens:,} + {traffic.answer_tokens:,} tokens, {asked}"
                        + ("" if service.keeps_up else f"; only {service.requests_per_second:.2f} are served")),
            ("tokens/s", f"{service.tokens_per_second:,.0f} ({service.requests_per_second:,.2f} requests/s)"),
            ("first token", f"{1e3 * service.first_token:,.1f} ms"),
            ("each later token", f"{1e3 * service.each_token:,.2f} ms"),
        ]
        if service.cost_per_million is not None:
            found.append(("cost of 1 M tokens", f"{service.cost_per_million:,.2f}"))
        return found

    def table(self) -> list[tuple[str, ...]]:
        """The second: a header, and a line for each step."""
        ms = lambda seconds: "" if seconds is None else f"{1e3 * seconds:,.2f}"
        return [("step", "context", "ms", "bytes ms", "arithmetic ms", "compiler ms", "waits for", "tokens/s"), *(
            (step.name, f"{step.context:,}", ms(step.seconds), ms(step.memory), ms(step.arithmetic), ms(step.compiler),
             step.bound, f"{step.tokens / step.seconds:,.0f}") for step in self.steps)]

    def __str__(self) -> str:
        lines, table = self.lines(), self.table()
        width = max(len(what) for what, _ in lines)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        row = lambda cells: "  ".join([cells[0].ljust(widths[0]),
                                       *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()
        return "\n".join([*(f"{what:<{width}}  {value}" for what, value in lines), "", *map(row, table), "",
                          *self.sources])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
        first = "".join(line(cells, "td") for cells in self.lines())
        head, *rest = self.table()
        second = line(head, "th") + "".join(line(cells, "td") for cells in rest)
        notes = "".join(f"<p>{escape(source)}</p>" for source in self.sources)
        return f"<table>{first}</table><table>{second}</table>{self.svg()}{notes}"

    def svg(self) -> str:
        """The picture: memory by kind, and what each step waits for."""
        kinds = {"weights": self.weights, "pages": self.pages, "temporaries": self.temporaries, "free": self.free}
        times = [(step.name, step.seconds, step.memory, step.arithmetic) for step in self.steps]
        return plan_picture(f"{self.model} on {self.devices} x {self.device}", kinds, self.budget, times)

    def save(self, path: str | Path) -> Path:
        """Write the picture to `path`, an .svg file."""
        path = Path(path)
        path.write_text(self.svg(), encoding="utf-8")
        return path


def plan(model: Any, *, topology: str | None = None, device: str | jax.Device | None = None,
         traffic: Traffic | Mapping[str, Any] | None = None, price: float | None = None, dtype: str | None = None,
         quantize: str | None = None, kv_cache_dtype: str | None = None, max_context: int | None = None,
         max_rows: int = MAX_ROWS, memory: int | str | None = None, mesh: Mapping[str, int] | None = None,
         compile: bool = True) -> Plan:
    """What a language model needs and takes, before any of it is loaded: memory, step times, tokens a second, cost.

    `model`: what `load` takes, a config.json (its path, or its dict), a Config of `jaxinfer.graphs`, or a Graph. Its
    weights need not be there; of a hub's model only config.json is fetched.
    `topology`: a TPU slice that need not be here, such as "v5e:2x2" or "v6e:1x1" (pip install "jaxinfer[tpu]"); its
    compiler is asked. `device`: one of `load`'s, or the name of one that need not be here: "h200", "h100", "v5e".
    `mesh`: as in `load`; by default one device, or all of a topology for one model.
    `memory`: bytes of each device for the model; by default what `load` would take of a device that is here, and nine
    tenths of one that is not.
    `traffic`: a `Traffic`, or a dict of its fields: prompt_tokens, answer_tokens, concurrency or requests_per_second.
    `price` is that of one device for an hour; costs are in its currency.
    `compile`: ask the compiler, where it is installed, for temporaries and for what it knows of times: a block of each
    kind and the head, for a few buckets, some seconds; else all is arithmetic, at once. A device without figures in
    `jaxinfer.compiler.hardware`, such as a CPU, is tried for some seconds in any case.
    Other options are those of `load`.

    Times are of the device: the host's work overlaps with it, and waiting in the queue comes on top.
    Raises InvalidOption, ModelNotFound, UnsupportedModel; what does not fit is no error: see `Plan.fits`.

    >>> config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    ...           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    ...           "max_position_embeddings": 8192, "rope_theta": 500000.0}
    >>> found = plan(config, device="h200", compile=False)
    >>> found.fits, found.weights // 10**9, [step.bound for step in found.steps]
    (True, 16, ['memory', 'memory', 'arithmetic'])
    """
    check_sizes(dtype, kv_cache_dtype, quantize, max_context, max_rows)
    traffic = _traffic(traffic)
    if price is not None and (type(price) not in (int, float) or not 0 <= price < float("inf")):
        raise InvalidOption(f"price is {price!r}; it must be a number >= 0, of one device for an hour")
    given = planning.parse_bytes(memory) if memory is not None else None
    source = _read(model, max_context, dtype)
    if max_context is not None and max_context > source.limit:
        raise InvalidOption(f"max_context is {max_context}; this model's limit is {source.limit} tokens")
    context = max_context or min(MAX_CONTEXT, source.graph.max_context)
    if traffic.prompt_tokens + traffic.answer_tokens > context:
        raise InvalidOption(f"traffic has {traffic.prompt_tokens} + {traffic.answer_tokens} tokens; max_context is "
                            f"{context}")
    target = _target(topology, device, mesh, partial(spread, source.graph, quantize=quantize),
                     FORCED.get(quantize, {}), compile)
    planner = Planner(source.graph, target.hardware, target.place, source.dtype, quantize, kv_cache_dtype, context,
                      max_rows, given or target.budget, None if given else target.most, FORCED.get(quantize, {}),
                      source.experts, target.within)
    served = None
    if planner.fits:
        rows = _rows(planner, traffic, target.shards)
        ends = dict.fromkeys((planner.decoding(1), planner.decoding(rows), planner.decoding(max_rows),
                              planner.reading(min(traffic.prompt_tokens, planner.ladder.chunk))))
        planner.compile(ends)
        served = _serve(planner, traffic, rows, target, price)
    middle = min(context, traffic.prompt_tokens + traffic.answer_tokens // 2)
    chunk = min(traffic.prompt_tokens, planner.ladder.chunk)
    counts = dict.fromkeys((1, served.rows if served else 1, max_rows))
    try:
        return Plan(
            model=source.name, device=target.hardware.name, devices=target.devices, placement=str(target.where),
            dtype=str(source.dtype), quantize=quantize, max_context=context, max_rows=max_rows, budget=planner.budget,
            weights=planner.weights, pages=planner.pages,
            page_count={group.name: group.pages for group in planner.groups}, temporaries=planner.scratch,
            needed=planner.needed(1, context, max_rows), rows=planner.full_rows,
            batches=tuple((size, planner.largest_batch(size)) for size in _contexts(context)),
            contexts=tuple((n, planner.largest_context(n, source.limit)) for n in dict.fromkeys((1, 8, max_rows))),
            steps=(*(planner.decode(n, middle) for n in counts), planner.read(chunk, chunk)),
            traffic=traffic, service=served, suggestions=() if planner.fits else _suggestions(planner),
            sources=_sources(planner, target))
    finally:
        planner.parts.close()


class Source(NamedTuple):
    """A model as it is planned: `limit` is the longest context that it could have."""

    name: str
    graph: Graph
    dtype: Any
    limit: int
    experts: int


def _read(model: Any, max_context: int | None, dtype: str | None) -> Source:
    if isinstance(model, Graph) or type(model) in BUILDERS:
        graph = model if isinstance(model, Graph) else BUILDERS[type(model)](model)
        experts = getattr(model, "experts_per_token", 0)
        return Source(graph.name, graph, jnp.dtype(dtype or "bfloat16"), graph.max_context, experts)
    if isinstance(model, Mapping):
        checkpoint = Checkpoint("config.json", dict(model), {}, {}, None, None)
    elif isinstance(model, str | os.PathLike):
        if os.fspath(model).endswith(".onnx"):
            raise UnsupportedModel(f"{model}: plans are for language models")
        checkpoint = open_config(model)
    else:
        raise InvalidOption(f"model is a {type(model).__name__}; it must be what load takes, a config, or a Graph")
    config, graph = model_of(checkpoint, None, max_context)
    if not isinstance(graph, Graph):
        raise UnsupportedModel(f"{checkpoint.source}: plans are for language models, and this is an encoder")
    says = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    number = dtype_of(checkpoint, dtype) if dtype or checkpoint.tensors else jnp.dtype(
        "float32" if says == "float32" else "bfloat16")
    name = checkpoint.config.get("model_type") if isinstance(model, Mapping) else Path(checkpoint.source).stem
    whole: Any = architecture(checkpoint.config, source=checkpoint.source).config
    return Source(str(name), graph, number, whole.max_context, getattr(config, "experts_per_token", 0))


class Target(NamedTuple):
    """Where it is planned: one of `shards` lies at `place`, of `devices` in all. `budget` and `most` are bytes.
    `within` is what the compiler must be told (None: it is not asked); `asked` says so in words."""

    hardware: Hardware
    place: Placement
    shards: int
    devices: int
    budget: int
    most: int | None
    within: Callable[[], AbstractContextManager] | None
    asked: str

    @property
    def where(self) -> str:
        return "all on one" if self.place.mesh is None else str(self.place)


Over = Callable[[Any], Placement]  # the placement of a graph on a mesh, which may be abstract


def _target(topology: Any, device: Any, mesh: Any, over: Over, forced: Mapping[str, str], compile: bool) -> Target:
    if topology is not None and device is not None:
        raise InvalidOption("topology and device are both given; a topology says which devices there are")
    if topology is not None:
        return _on_topology(topology, mesh, over, compile)
    hardware = described(device) if isinstance(device, str) else None
    return _on_absent(hardware, mesh, over, compile) if hardware else _on_present(device, mesh, over, forced, compile)


def _on_topology(topology: str, mesh: Any, over: Over, compile: bool) -> Target:
    """All devices of a slice, or those that a mesh asks for."""
    devices = tpu_topology(topology)
    data, model = mesh_sizes({"model": len(devices)} if mesh is None else mesh)
    if data * model > len(devices):
        raise InvalidOption(f"mesh asks for {data * model} devices; {topology} has {len(devices)}")
    place = _place(over, devices[:model], model)
    hardware = HARDWARE[topology.partition(":")[0]]
    within = partial(compiling_for, place.device, place.mesh)
    return Target(hardware, place, data, data * model, int(OF_ABSENT * hardware.memory), None,
                  within if compile else None, "its compiler (libtpu)")


def _on_absent(hardware: Hardware, mesh: Any, over: Over, compile: bool) -> Target:
    """Devices that are known by their figures; one GPU's compiler may be here without it."""
    data, model = mesh_sizes({} if mesh is None else mesh)
    gpu = cuda_device(hardware) if compile and hardware.platform == "gpu" and model == 1 else None
    if model > 1:
        place = over(AbstractMesh((model,), ("model",), axis_types=(AxisType.Auto,)))
    else:
        place = Placement(gpu or find_device(None))
    within = partial(compiling_for, gpu, None) if gpu else None
    return Target(hardware, place, data, data * model, int(OF_ABSENT * hardware.memory), None, within,
                  "its compiler (XLA, by description)")


def _on_present(device: Any, mesh: Any, over: Over, forced: Mapping[str, str], compile: bool) -> Target:
    """Devices that are here, with what `load` would take of them."""
    meshes = find_meshes(mesh, device)
    places = [over(one) if isinstance(one, Mesh) else Placement(one) for one in meshes]
    first, free = places[0].device, planning.free(places)
    hardware = described(first.device_kind) or probed(first, free, forced)
    most = CPU_PAGES // planning.sharing(places) if first.platform == "cpu" else None
    count = sum(len(place.devices) for place in places)
    return Target(hardware, places[0], len(places), count, steady(int(SHARE * free)), most,
                  nullcontext if compile else None, "its compiler (XLA)")


def _place(over: Over, devices: list[jax.Device], model: int) -> Placement:
    if model == 1:
        return Placement(devices[0])
    return over(Mesh(np.array(devices), AXES[1:], axis_types=(AxisType.Auto,)))


def _traffic(traffic: Any) -> Traffic:
    if traffic is None or isinstance(traffic, Traffic):
        return traffic or Traffic()
    known = [field.name for field in fields(Traffic)]
    if not isinstance(traffic, Mapping):
        raise InvalidOption(f"traffic is a {type(traffic).__name__}; it must be a dict with any of {', '.join(known)}")
    if unknown := [name for name in traffic if name not in known]:
        raise InvalidOption(f"traffic has {unknown[0]!r}; it may have {', '.join(known)}")
    return Traffic(**traffic)


def _contexts(context: int) -> tuple[int, ...]:
    """A quarter of the longest, a half, and all of it."""
    return tuple(dict.fromkeys(max(2, context // part) for part in (4, 2, 1)))


# Traffic.


def _rows(planner: Planner, traffic: Traffic, shards: int) -> int:
    """The rows that decode at a time on each shard: those that are there, or the fewest that keep up."""
    each = planner.row_bytes(traffic.prompt_tokens + traffic.answer_tokens)
    most = max(1, min(planner.max_rows, planner.pages // each))
    if traffic.requests_per_second is None:
        return min(most, -(-(traffic.concurrency or most * shards) // shards))
    rate = traffic.requests_per_second / shards
    return min(most, 1 + largest(lambda rows: _rate(planner, traffic, rows) < rate, most))


def _round(planner: Planner, traffic: Traffic, rows: int) -> float:
    """Seconds in which so many rows, begun one after another, read their prompts and draw their answers."""
    context = traffic.prompt_tokens + traffic.answer_tokens // 2
    drawing = traffic.answer_tokens * planner.decode(rows, context).seconds
    return drawing + rows * planner.prompt_seconds(traffic.prompt_tokens)


def _rate(planner: Planner, traffic: Traffic, rows: int) -> float:
    """Requests a second of one shard."""
    return rows / _round(planner, traffic, rows)


def _serve(planner: Planner, traffic: Traffic, rows: int, target: Target, price: float | None) -> Service:
    able = _rate(planner, traffic, rows) * target.shards
    asked = traffic.requests_per_second
    served = able if asked is None else min(able, asked)
    tokens = served * traffic.answer_tokens
    step = planner.decode(rows, traffic.prompt_tokens + traffic.answer_tokens // 2)
    cost = None if price is None else price * target.devices / 3600 / tokens * 1e6
    return Service(rows, tokens, served, planner.prompt_seconds(traffic.prompt_tokens) + step.seconds,
                   _round(planner, traffic, rows) / traffic.answer_tokens, asked is None or able >= asked, cost)


# Words.


def _sources(planner: Planner, target: Target) -> tuple[str, ...]:
    hardware = target.hardware
    rates = ", ".join(f"{rate / 1e12:,.3g} T/s in {dtype}" for dtype, rate in hardware.rates.items())
    asked = planner.within is not None and bool(planner.compiled)
    timed = any(part.seconds is not None for part in planner.compiled.values())
    blocks = f"{target.asked}, asked about one block of each kind and the head"
    return (
        f"{hardware.name}: {hardware.bandwidth / 1e9:,.0f} GB/s, {rates}; {hardware.source}.",
        f"Temporaries: {blocks if asked else 'an upper estimate'}."
        f" Times: {'the roofline, or what ' + target.asked + ' says where that is longer' if timed else 'the roofline'}"
        f"{'; kernels as ' + target.asked + ' makes them' if asked and hardware.start else ''}.",
    )


def _suggestions(planner: Planner) -> tuple[str, ...]:
    """At most three changes, of one option each, with which it would fit by the same arithmetic."""
    halves = [planner.max_context >> n for n in range(1, 12) if planner.max_context >> n >= 128]
    changes: list[dict[str, Any]] = [
        *({"quantize": scheme} for scheme in ("int8", "int4") if planner.quantize is None),
        *({"max_context": context} for context in halves), {"max_rows": 1},
        *([{"kv_cache_dtype": "int8"}] if planner.kv_cache_dtype is None else []),
    ]
    fitting: dict[str, str] = {}
    for change in changes:
        (name, value), = change.items()
        if name not in fitting and (other := replace(planner, compiled={}, **change)).fits:
            needed = other.needed(1, other.max_context, other.max_rows)
            fitting[name] = f"{name}={value!r}: {amount(needed, 'B')}"
    needed = planner.needed(1, planner.max_context, planner.max_rows)
    there_is = (f"memory={needed!r}: {amount(needed, 'B')}",) if needed <= planner.hardware.memory else ()
    return (*there_is, *fitting.values())[:3]
