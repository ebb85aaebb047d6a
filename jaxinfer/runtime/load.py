"""`load`: from a name or a path to a running language model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxinfer import compiler, events
from jaxinfer import kernels as ops
from jaxinfer.compiler import Executables, Key
from jaxinfer.compiler.placement import Placement, spread
from jaxinfer.compiler.streamed import Streamed
from jaxinfer.errors import InvalidOption, OutOfMemory
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.checkpoint import Checkpoint, open_checkpoint
from jaxinfer.frontend.folder import save_folder
from jaxinfer.frontend.saved import Saved
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Encoder, Graph
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.kernels.quantised_pages import FORMATS
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime import origin
from jaxinfer.runtime.admission import Admission
from jaxinfer.runtime.delivery import Delivery
from jaxinfer.runtime.devices import find_device, find_meshes
from jaxinfer.runtime.engine import Engine
from jaxinfer.runtime.followers import PARAMS, Follower, Leader, meet
from jaxinfer.runtime.language import LanguageModel
from jaxinfer.runtime.load_stateless import load_encoder, load_onnx_endpoint
from jaxinfer.runtime.pinned import page_lock
from jaxinfer.runtime.prefix_tiers import MOVING
from jaxinfer.runtime.prefix_tiers import places as prefix_places
from jaxinfer.runtime.ring import Ring
from jaxinfer.runtime.shapes import Streaming, shapes_of
from jaxinfer.runtime.shards import Shard
from jaxinfer.runtime.startup import Startup
from jaxinfer.scheduler import Scheduler


class Prefixes(NamedTuple):
    """Bytes for prefix pages below the device."""

    host: int
    disk: int


KV_CACHE_DTYPES = (*origin.DTYPES, *FORMATS)
MAX_ROWS = 32
MAX_WAITING, MAX_WAITING_TOKENS = 1024, 2**20
INVARIANT = {"attend": "by_page"}  # implementations whose arithmetic for a token depends on nothing but the token


def load(source: str | os.PathLike, *, graph: Graph | ModuleType | Callable[[Any], Graph] | None = None,
         dtype: str | None = None, max_context: int | None = None, max_rows: int = MAX_ROWS,
         max_waiting: int = MAX_WAITING, max_waiting_tokens: int = MAX_WAITING_TOKENS, batch_invariant: bool = False,
         memory: int | str | None = None, device_memory: int | str | None = None, host_memory: int | str | None = None,
         prefix_host_memory: int | str = 0, prefix_disk_memory: int | str = 0,
         device: str | jax.Device | None = None, quantize: str | None = None, kv_cache_dtype: str | None = None,
         known: Mapping[str, Any] | None = None, mesh: Mapping[str, int] | None = None,
         kernels: Mapping[str, str] | None = None) -> Any:
    """Load a model and start what serves it: a `LanguageModel`; for an encoder such as BERT a `TextEncoder`, which
    embeds and classifies texts; for an .onnx file an `Endpoint` (and its `graph`).

    `source`: a catalog name (`jaxinfer models`), a directory in Hugging Face layout, a .gguf file, a hub id, a folder
    that `save` or `jaxinfer convert` wrote, or one with an Orbax checkpoint whose leaves' paths are those of the graph.
    `graph`: a Graph of your own; or a function (or a module with `build`) that makes one from what the front end
    made of the config: the Config of `jaxinfer.graphs.decoder` or `.gpt2`, or config.json's dict if it does not
    know the architecture.
    `dtype`: "float32" or "bfloat16" for weights and KV pages; by default float32 if the checkpoint is, else bfloat16.
    `kv_cache_dtype`: another one for KV pages, or half of bfloat16's bytes, with a scale for each head of each token:
    "int8", or "fp8" (e4m3, less exact; an NVIDIA GPU must be an Ada, a Hopper or newer).
    `max_context`: the longest prompt and answer, in tokens; by default the model's own limit, at most 4,096.
    `max_rows`: sequences that run at once. `max_waiting`, `max_waiting_tokens`: requests, and tokens of their prompts,
    that may wait; what comes on top is `Rejected`.
    `batch_invariant`: a request's logits and tokens are the same to the bit whatever shares its steps (slower: every
    step has one padded shape).
    `memory`: bytes for weights, pages and temporaries, as a number or a text such as "8GiB"; by default at most half
    of what is free, and at most 512 MiB of KV pages on the CPU. Pages are made for `max_rows` full contexts if they
    fit, and fewer otherwise: then a request may have to wait for pages.
    `device_memory`: the same budget for a model that may be larger: then as many layers as fit stay on the device, and
    the others stream through a ring of two or three in every step, from the host's memory or, where `host_memory` is
    too small for them, from a file that is written while the model is loaded. `host_memory` is by default half of what
    is free; on a CPU, whose memory is the device's, nothing. KV pages take up to a quarter of `device_memory`. Such a
    model can do all that others can but have its weights swapped or saved, or run on a mesh; `lm.tiers` and
    `lm.timeline` tell what lies where, and what happened when.
    `prefix_host_memory`, `prefix_disk_memory`: bytes for KV pages of earlier prompts and answers that the device has no
    room for, as `memory`; 0 for none. They go to the host's memory, and to a file without a name in the directory of
    our caches, and come back for whoever begins alike where that takes less time than reading the tokens again, as
    both are measured: `lm.prefix_tiers` tells. The disk wants the host as well, through which its pages come. On a mesh
    they are shared by the data shards.
    `device`: "cpu", "gpu", "tpu" (the first of its kind, "gpu:1" the second), or a `jax.Device`; by default JAX's
    first.
    `quantize`: matrices, experts' too, are held in fewer bits, rounded while they are read; position tables, routers,
    classifiers, norms and biases are not, and embeddings and the head are int8 in all schemes. "int8": a scale for each
    output; a CPU and a TPU multiply with activations as two int8 numbers each. "w8a8": the same weights, and
    activations in one int8 with a scale for each token: faster for many tokens, less exact. "int4": a scale and a
    minimum for every 32 inputs; the smallest, but a CPU unpacks it in each step. "fp8" (e4m3): for GPUs, which round
    activations to it too (experts' stay in float16 there). A Graph of your own must read its matrices by
    `kernels.matmul` and `kernels.embed_rows`. bench/RESULTS.md says what is lost.
    `known`: inputs of an .onnx file that are the same for every request, such as {"sr": 16000}: those that decide its
    shapes must be. There, `max_rows` are the requests of a batch; 1 asks for requests with the file's batch axis.
    `mesh`: several devices of one kind. {"model": 2} cuts attention heads, feed-forward layers, vocabulary and KV
    pages over two; an axis that cannot be divided is whole on each, which `lm.placements` and an event tell.
    {"data": 2} serves requests on two shards, each with weights, pages, queue and `max_rows` of its own; a request
    goes to the shard with the fewest. Both may be given; `memory` is that of each device. With several processes
    (`jax.distributed`) all of them call `load`, process 0 gets the model and each other one a `Follower`, whose
    `follow()` is to be called.
    `kernels`: implementations that ops take wherever these are for the call, such as {"attend": "by_page"}: names of
    `jaxinfer.kernels.OPS`, and of what each has `available` on this platform, your own included (`Op.add`). Other
    calls go where they would without; `lm.ledger` says what was taken. One that is for no call at all is refused.

    Raises ModelNotFound, DownloadFailed, CorruptFile, UnsupportedModel, CheckpointMismatch (all problems of the
    weights at once), InvalidOption, OutOfMemory.
    """
    startup = Startup()
    check_sizes(dtype, kv_cache_dtype, quantize, max_context, max_rows)
    for name, value in (("max_waiting", max_waiting), ("max_waiting_tokens", max_waiting_tokens)):
        if type(value) is not int or value < 1:
            raise InvalidOption(f"{name} is {value!r}; it must be an integer >= 1")
    if memory is not None:
        planning.parse_bytes(memory)  # before anything is downloaded
    stream = _streaming(memory, device_memory, host_memory, mesh)
    prefixes = _prefixes(prefix_host_memory, prefix_disk_memory)
    compiler.enable()
    if prefixes.host and jax.process_count() > 1:
        raise InvalidOption("prefix_host_memory is given; pages of several processes' devices are kept nowhere else")
    meshes, path = find_meshes(mesh, device), resolve(source)
    forced = _forced(kernels, batch_invariant, find_device(device).platform)
    if path.suffix == ".onnx":
        _only_for_language(MAX_ROWS, max_waiting_tokens, batch_invariant, memory, stream, mesh, kernels,
                           kv_cache_dtype, prefixes, "an ONNX file")
        if any(given is not None for given in (graph, dtype, max_context, quantize)):
            raise InvalidOption("graph, dtype, max_context and quantize are not for an ONNX file, which says these "
                                "itself")
        return load_onnx_endpoint(path, known=known or {}, max_batch=max_rows, max_waiting=max_waiting,
                                  device=find_device(device))
    if known is not None:
        raise InvalidOption(f"known is for inputs of an .onnx file; {source} is none")
    with startup.phase("config"):
        checkpoint = open_checkpoint(path)
        quantize = origin.scheme_of(checkpoint, quantize)
        config, model = origin.model_of(checkpoint, graph, max_context)
    forced = {**FORCED.get(quantize, {}), **forced}
    if isinstance(model, Encoder):
        _only_for_language(max_rows, max_waiting_tokens, batch_invariant, memory, stream, mesh, kernels,
                           kv_cache_dtype, prefixes, "an encoder")
        return load_encoder(checkpoint, config, model, origin.tokenizer_of(checkpoint), quantize=quantize,
                            dtype=origin.dtype_of(checkpoint, dtype), max_waiting=max_waiting,
                            device=find_device(device))
    if max_context is not None and max_context > model.max_context:
        raise InvalidOption(f"max_context is {max_context}; this graph's limit is {model.max_context} tokens")
    context = max_context or min(origin.MAX_CONTEXT, model.max_context)
    number = origin.dtype_of(checkpoint, dtype)
    places = [spread(model, one, quantize) if isinstance(one, Mesh) else Placement(one) for one in meshes]
    for axis, why in places[0].replicated.items():
        events.emit(events.Replicated(axis, why))
    ladder, chunks, groups, given, tiers = shapes_of(
        model, places, number, max_context=context, max_rows=max_rows, quantize=quantize, forced=forced,
        kv_cache_dtype=kv_cache_dtype, batch_invariant=batch_invariant, memory=memory, stream=stream,
        moving=MOVING if prefixes.host else 0)
    aliased = places[0].device.platform == "cpu"  # it computes from the host's memory where it lies
    with ExitStack() as undo:
        others = None if places[0].is_local else meet()
        kind = partial(Leader, others) if isinstance(others, list) else Executables
        put, ring = places[0].put, None
        if tiers is not None:
            ring = undo.enter_context(closing(Ring(model, tiers, places[0].device, aliased)))
            kind, put = partial(Streamed, ring), ring.put
        each = [undo.enter_context(closing(kind(model, ladder, device=place, tiered=prefixes.host > 0, **given)))
                for place in places]
        kept = []
        for executables in each:
            kept.append(prefix_places(executables, groups, *(size // len(each) for size in prefixes)))
            if kept[-1] and kept[-1].spill:
                undo.enter_context(closing(kept[-1].spill))
        first, then = each[0].first
        for executables in each:  # while the weights are read
            executables.prepare(Key("zeros"), Key("greedy", first.rows), Key("forward", first))
        for op, how in (kernels or {}).items():
            _check_taken(op, how, each[0].taken(op, how))
        with ThreadPoolExecutor(1, "tokenizer") as beside:  # the weights
            words = beside.submit(_timed_tokenizer, checkpoint, startup)
            read = partial(load_params, model, checkpoint.tensors, dtype=number, quantize=quantize,
                           source=checkpoint.source, put=put, saved=checkpoint.saved,
                           copies=not aliased or ring is not None,
                           again=None if aliased or ring is not None else page_lock)
            params = read(timed=startup.note)
            tokenizer = words.result()
        if ring is not None:
            ring.start(params, params.pop("blocks"))
        for executables in each:  # while the first prompt runs
            executables.prepare(Key("forward", then), Key("greedy", then.rows), Key("copy"), *executables.moving)
            if places[0].device.platform != "cpu":  # where steps run on the cores that this takes, 0.7 s a program
                executables.fetch_all()
        if isinstance(others, Connection):
            undo.pop_all()
            return Follower(others, each[0], params)
        if isinstance(each[0], Leader):
            each[0].keep(PARAMS, params)
        eos, shards = origin.eos_of(checkpoint, tokenizer), []
        for executables, place, below in zip(each, places, kept, strict=True):
            delivery = undo.enter_context(closing(Delivery(tokenizer)))
            scheduler = Scheduler(groups, max_rows=max_rows, chunk=ladder.chunk, chunks=chunks, budget=ladder.budget,
                                  rungs=ladder.rungs, again=ladder.again, **(below.pages if below else {}))
            if place is not places[0]:
                params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, executables.params))
            with startup.phase("pages"):
                engine = Engine(executables, scheduler, {scheduler.version: params}, delivery.tell, delivery.failed,
                                Admission(max_waiting, max_waiting_tokens), below.spill if below else None)
            shards.append(Shard(undo.enter_context(closing(engine)), delivery))
        undo.pop_all()
    save = partial(save_folder, spec=model.spec, checkpoint=checkpoint, tokenizer=tokenizer,
                   saved=Saved(str(number), quantize))
    return LanguageModel(model, tokenizer, shards, config=config, eos=eos, save=save, max_context=context,
                         startup=startup, ring=ring, again=None if checkpoint.rounds(quantize) else read)


def _streaming(memory: Any, device_memory: Any, host_memory: Any, mesh: Any) -> Streaming | None:
    """What `device_memory` asks for, if it is given."""
    if device_memory is None:
        if host_memory is not None:
            raise InvalidOption("host_memory is for what device_memory leaves out; give device_memory as well")
        return None
    for name, other in (("memory", memory), ("mesh", mesh)):
        if other is not None:
            raise InvalidOption(f"device_memory and {name} are given; weights stream to one device, whose whole budget "
                                f"device_memory is: leave {name} out, or device_memory")
    sized = lambda value, name: None if value is None else planning.parse_bytes(value, name)
    return Streaming(planning.parse_bytes(device_memory, "device_memory"), sized(host_memory, "host_memory"))


def _prefixes(host_memory: Any, disk_memory: Any) -> Prefixes:
    """What `prefix_host_memory` and `prefix_disk_memory` ask for, in bytes."""
    sized = lambda value, name: 0 if type(value) is int and value == 0 else planning.parse_bytes(value, name)
    found = Prefixes(sized(host_memory, "prefix_host_memory"), sized(disk_memory, "prefix_disk_memory"))
    if found.disk and not found.host:
        raise InvalidOption("prefix_disk_memory is given; its pages come through the host's memory: give "
                            "prefix_host_memory as well")
    if found.host > (free := planning.host_memory()):
        raise OutOfMemory(f"prefix_host_memory is {planning.mib(found.host)}, of which the host has "
                          f"{planning.mib(free)} free; nothing was loaded. Give less, and a prefix_disk_memory.")
    return found


def check_sizes(dtype: Any, kv_cache_dtype: Any, quantize: Any, max_context: Any, max_rows: Any) -> None:
    """Raises InvalidOption for what decides how large a model is and has no meaning."""
    if type(max_rows) is not int or not 1 <= max_rows <= 4096:
        raise InvalidOption(f"max_rows is {max_rows!r}; it must be an integer from 1 to 4096")
    origin.check_numbers(dtype, quantize)
    if kv_cache_dtype is not None and not (isinstance(kv_cache_dtype, str) and kv_cache_dtype in KV_CACHE_DTYPES):
        raise InvalidOption(f"kv_cache_dtype is {kv_cache_dtype!r}; it must be one of {', '.join(KV_CACHE_DTYPES)}, or "
                            "None for the model's dtype")
    if max_context is not None and (type(max_context) is not int or max_context < 2):
        raise InvalidOption(f"max_context is {max_context!r}; it must be an integer >= 2, or None for the default")


def _forced(kernels: Mapping[str, str] | None, batch_invariant: bool, platform: str) -> dict[str, str]:
    """The implementations that ops take wherever they can."""
    if not isinstance(kernels, Mapping | None):
        raise InvalidOption(f"kernels is a {type(kernels).__name__}; it must map names of ops to implementations")
    for name, how in (kernels or {}).items():
        if name not in ops.OPS:
            raise InvalidOption(f"kernels: there is no op {name!r}; there are {', '.join(sorted(ops.OPS))}")
        if how not in (known := ops.OPS[name].available(platform)):
            raise InvalidOption(f"kernels: {name} has no {how!r} on {platform}; it has {', '.join(known)}")
        if batch_invariant and INVARIANT.get(name, how) != how:
            raise InvalidOption(f"kernels: batch_invariant needs {name} to be {INVARIANT[name]!r}, not {how!r}")
    return {**(kernels or {}), **(INVARIANT if batch_invariant else {})}


def _check_taken(op: str, how: str, taken: list[str]) -> None:
    if how not in taken:
        instead = f"they take {', '.join(taken)}" if taken else f"none of them calls {op}"
        raise InvalidOption(f"kernels: {how!r} of {op} is for no call in the programs of this model; {instead}")


def _only_for_language(max_rows: int, max_waiting_tokens: int, batch_invariant: bool, memory: Any, stream: Any,
                       mesh: Any, kernels: Any, kv_cache_dtype: Any, prefixes: Prefixes, what: str) -> None:
    wrong = [name for name, given in (
        ("max_rows", max_rows != MAX_ROWS), ("max_waiting_tokens", max_waiting_tokens != MAX_WAITING_TOKENS),
        ("batch_invariant", batch_invariant), ("memory", memory is not None), ("device_memory", stream is not None),
        ("mesh", mesh is not None),
        ("kernels", kernels), ("kv_cache_dtype", kv_cache_dtype is not None),
        ("prefix_host_memory", prefixes.host), ("prefix_disk_memory", prefixes.disk)) if given]
    if wrong:
        raise InvalidOption(f"{', '.join(wrong)} cannot be given for {what}; they are for language models")


def _timed_tokenizer(checkpoint: Checkpoint, startup: Startup) -> Any:
    with startup.phase("tokenizer"):
        return origin.tokenizer_of(checkpoint)
