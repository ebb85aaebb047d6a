"""`load`: from a name or a path to a running language model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import compiler, events
from jaxinfer import kernels as ops
from jaxinfer.compiler import Executables, Key, default_ladder, invariant_ladder
from jaxinfer.compiler.buckets import decode, prompt
from jaxinfer.compiler.placement import Placement, spread
from jaxinfer.compiler.streamed import Streamed
from jaxinfer.errors import InvalidOption, UnsupportedModel
from jaxinfer.frontend.architectures import DECODERS, architecture
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.checkpoint import Checkpoint, open_checkpoint
from jaxinfer.frontend.tokenizer import from_directory
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Encoder, Graph
from jaxinfer.kernels.quantised import FORCED, SCHEMES
from jaxinfer.kernels.quantised_pages import FORMATS
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.delivery import Delivery
from jaxinfer.runtime.devices import find_device, find_meshes
from jaxinfer.runtime.engine import Engine
from jaxinfer.runtime.fit import would_fit
from jaxinfer.runtime.followers import PARAMS, Follower, Leader, meet
from jaxinfer.runtime.language import LanguageModel
from jaxinfer.runtime.load_stateless import load_encoder, load_onnx_endpoint
from jaxinfer.runtime.ring import Ring
from jaxinfer.runtime.shards import Shard
from jaxinfer.runtime.tiers import plan_tiers
from jaxinfer.scheduler import Scheduler

DTYPES = ("float32", "bfloat16")
KV_CACHE_DTYPES = (*DTYPES, *FORMATS)
MAX_CONTEXT, MAX_ROWS = 4096, 32
MAX_WAITING, MAX_WAITING_TOKENS = 1024, 2**20
INVARIANT = {"attend": "by_page"}  # implementations whose arithmetic for a token depends on nothing but the token
SHARE = 0.5  # of the free memory may go to a model whose user names no budget,
CPU_PAGES = 2**29  # and of that this much to KV pages on the CPU, where zeroing more would be felt at start-up


def load(source: str | os.PathLike, *, graph: Graph | ModuleType | Callable[[Any], Graph] | None = None,
         dtype: str | None = None, max_context: int | None = None, max_rows: int = MAX_ROWS,
         max_waiting: int = MAX_WAITING, max_waiting_tokens: int = MAX_WAITING_TOKENS, batch_invariant: bool = False,
         memory: int | str | None = None, device_memory: int | str | None = None, host_memory: int | str | None = None,
         device: str | jax.Device | None = None, quantize: str | None = None, kv_cache_dtype: str | None = None,
         known: Mapping[str, Any] | None = None, mesh: Mapping[str, int] | None = None,
         kernels: Mapping[str, str] | None = None) -> Any:
    """Load a model and start what serves it: a `LanguageModel`; for an encoder such as BERT a `TextEncoder`, which
    embeds and classifies texts; for an .onnx file an `Endpoint` (and its `graph`).

    `source`: a catalog name (`jaxinfer models`), a directory in Hugging Face layout, a .gguf file, or a hub id.
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
    model can do all that others can but have its weights swapped, or run on a mesh; `lm.tiers` and `lm.timeline` tell
    what lies where, and what happened when.
    `device`: "cpu", "gpu", "tpu" (the first of its kind, "gpu:1" the second), or a `jax.Device`; by default JAX's
    first.
    `quantize`: matrices are held in fewer bits, rounded while they are read; position tables, classifiers, norms and
    biases are not, and embeddings and the head are int8 in all schemes. "int8": a scale for each output; a CPU and a
    TPU multiply with activations as two int8 numbers each. "w8a8": the same weights, and activations in one int8 with
    a scale for each token: faster for many tokens, less exact. "int4": a scale and a minimum for every 32 inputs; the
    smallest, but a CPU unpacks it in each step. "fp8" (e4m3): for GPUs, which round activations to it too. A Graph of
    your own must read its matrices by `kernels.matmul` and `kernels.embed_rows`. bench/RESULTS.md says what is lost.
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
    start = time.perf_counter()
    if type(max_rows) is not int or not 1 <= max_rows <= 4096:
        raise InvalidOption(f"max_rows is {max_rows!r}; it must be an integer from 1 to 4096")
    for name, value in (("max_waiting", max_waiting), ("max_waiting_tokens", max_waiting_tokens)):
        if type(value) is not int or value < 1:
            raise InvalidOption(f"{name} is {value!r}; it must be an integer >= 1")
    if dtype is not None and str(dtype) not in DTYPES:
        raise InvalidOption(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if kv_cache_dtype is not None and not (isinstance(kv_cache_dtype, str) and kv_cache_dtype in KV_CACHE_DTYPES):
        raise InvalidOption(f"kv_cache_dtype is {kv_cache_dtype!r}; it must be one of {', '.join(KV_CACHE_DTYPES)}, or "
                            "None for the model's dtype")
    if quantize is not None and (not isinstance(quantize, str) or quantize not in SCHEMES):
        raise InvalidOption(f"quantize is {quantize!r}; it must be one of {', '.join(SCHEMES)}, or None")
    if max_context is not None and (type(max_context) is not int or max_context < 2):
        raise InvalidOption(f"max_context is {max_context!r}; it must be an integer >= 2, or None for the default")
    budget = planning.parse_bytes(memory) if memory is not None else None
    stream = _streaming(memory, device_memory, host_memory, mesh)
    compiler.enable()
    meshes, path = find_meshes(mesh, device), resolve(source)
    forced = {**FORCED.get(quantize, {}), **_forced(kernels, batch_invariant, find_device(device).platform)}
    if path.suffix == ".onnx":
        _only_for_language(MAX_ROWS, max_waiting_tokens, batch_invariant, memory, stream, mesh, kernels,
                           kv_cache_dtype, "an ONNX file")
        if any(given is not None for given in (graph, dtype, max_context, quantize)):
            raise InvalidOption("graph, dtype, max_context and quantize are not for an ONNX file, which says these "
                                "itself")
        return load_onnx_endpoint(path, known=known or {}, max_batch=max_rows, max_waiting=max_waiting,
                                  device=find_device(device))
    if known is not None:
        raise InvalidOption(f"known is for inputs of an .onnx file; {source} is none")
    checkpoint = open_checkpoint(path)
    config, model = _model(checkpoint, graph, max_context)
    if isinstance(model, Encoder):
        _only_for_language(max_rows, max_waiting_tokens, batch_invariant, memory, stream, mesh, kernels,
                           kv_cache_dtype, "an encoder")
        return load_encoder(checkpoint, config, model, _tokenizer(checkpoint), dtype=_dtype(checkpoint, dtype),
                            quantize=quantize, max_waiting=max_waiting, device=find_device(device))
    if max_context is not None and max_context > model.max_context:
        raise InvalidOption(f"max_context is {max_context}; this graph's limit is {model.max_context} tokens")
    context = max_context or min(MAX_CONTEXT, model.max_context)
    number = _dtype(checkpoint, dtype)
    places = [spread(model, one) if isinstance(one, Mesh) else Placement(one) for one in meshes]
    for axis, why in places[0].replicated.items():
        events.emit(events.Replicated(axis, why))
    platform = places[0].device.platform
    with ops.tracing(platform, forced):
        chunks = ops.chunks(platform)
        ladders = invariant_ladder if batch_invariant else partial(default_ladder, chunks=chunks)
        ladder = ladders(max_rows, context)
        chunk, several = ladder.chunk, not places[0].is_local
        sizes: dict[str, Any] = dict(dtype=number, quantize=quantize, kv_cache_dtype=kv_cache_dtype, max_rows=max_rows,
                                     max_context=context, chunk=chunk, place=places[0])
        need, aliased, tiers = planning.needs(model, **sizes), platform == "cpu", None
        weights = planning.abstract_params(model, number, quantize)
        if stream and need.least > stream.device:
            host = stream.host or (0 if aliased else int(SHARE * planning.host_memory()))
            tiers, groups = plan_tiers(model, weights, need, max_rows=max_rows, tokens=ladder.budget,
                                       device_memory=stream.device, host_memory=host, aliased=aliased)
        else:
            why, most = f"device_memory={device_memory!r}" if stream else f"{memory=}", None
            budget = stream.device if stream else budget
            if budget is None:
                budget = int(SHARE * planning.free(places))
                why = f"{SHARE:.0%} of the memory that is free on {places[0].device}"
                most = CPU_PAGES // planning.sharing(places) if platform == "cpu" else None
            groups = planning.page_groups(model, **sizes, budget=budget, why=why, most=most,
                                          fits=partial(would_fit, model, sizes, budget, ladders))
        state = planning.abstract_state(model, groups, number, kv_cache_dtype)
    shapes: dict[str, Any] = dict(
        params=weights, state=state, max_rows=max_rows, max_context=context,
        forced=forced, table_width={group.name: -(-context // group.page_size) for group in groups})
    with ExitStack() as undo:
        others = meet() if several else None
        kind = partial(Leader, others) if isinstance(others, list) else Executables
        put, ring = places[0].put, None
        if tiers is not None:
            ring = undo.enter_context(closing(Ring(model, tiers, places[0].device, aliased)))
            kind, put = partial(Streamed, ring), ring.put
        each = [undo.enter_context(closing(kind(model, ladder, device=place, **shapes))) for place in places]
        first, then = ladder.holding(prompt(1))[0], ladder.holding(decode(1))[0]
        for executables in each:  # while the weights are read
            executables.prepare(Key("forward", first), Key("greedy", first.rows))
        for op, how in (kernels or {}).items():
            _check_taken(op, how, each[0].taken(op, how))
        tokenizer = _tokenizer(checkpoint)
        params = load_params(model, checkpoint.tensors, dtype=number, quantize=quantize, source=checkpoint.source,
                             put=put, keep=ring is None)
        if ring is not None:
            ring.start(params, params.pop("blocks"))
        for executables in each:  # while the first prompt runs
            executables.prepare(Key("forward", then), Key("greedy", then.rows), Key("copy"))
        if isinstance(others, Connection):
            undo.pop_all()
            return Follower(others, each[0], params)
        if isinstance(each[0], Leader):
            each[0].keep(PARAMS, params)
        eos, shards = _eos(checkpoint, tokenizer), []
        for executables, place in zip(each, places, strict=True):
            delivery = undo.enter_context(closing(Delivery(tokenizer)))
            scheduler = Scheduler(groups, max_rows=max_rows, chunk=chunk, chunks=chunks, budget=ladder.budget,
                                  rungs=ladder.rungs, again=ladder.again)
            if place is not places[0]:
                params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, executables.params))
            engine = Engine(executables, scheduler, params, delivery.tell, delivery.failed,
                            max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens)
            shards.append(Shard(undo.enter_context(closing(engine)), delivery))
        undo.pop_all()
    return LanguageModel(model, tokenizer, shards, config=config, eos=eos,
                         max_context=context, load_seconds=time.perf_counter() - start, ring=ring)


class Streaming(NamedTuple):
    """Budgets in bytes: the device's, and the host's, or None for the default."""

    device: int
    host: int | None


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
                       mesh: Any, kernels: Any, kv_cache_dtype: Any, what: str) -> None:
    wrong = [name for name, given in (
        ("max_rows", max_rows != MAX_ROWS), ("max_waiting_tokens", max_waiting_tokens != MAX_WAITING_TOKENS),
        ("batch_invariant", batch_invariant), ("memory", memory is not None), ("device_memory", stream is not None),
        ("mesh", mesh is not None),
        ("kernels", kernels), ("kv_cache_dtype", kv_cache_dtype is not None)) if given]
    if wrong:
        raise InvalidOption(f"{', '.join(wrong)} cannot be given for {what}; they are for language models")


def _model(checkpoint: Checkpoint, graph: Any, max_context: int | None) -> tuple[Any, Graph | Encoder]:
    """The config and the Graph. The architecture's default context is cut to ours before RoPE factors are fixed."""
    known = checkpoint.config.get("model_type") in (*DECODERS, "gpt2")
    if graph is None or known:
        found = architecture(checkpoint.config, max_context=max_context, source=checkpoint.source)
        if max_context is None and found.config.max_context > MAX_CONTEXT:
            found = architecture(checkpoint.config, max_context=MAX_CONTEXT, source=checkpoint.source)
        config, build = found
    else:
        config, build = checkpoint.config, None
    if isinstance(graph, Graph | Encoder):
        return config, graph
    build = graph if graph is not None else build
    build = getattr(build, "build", build)
    if not callable(build):
        raise InvalidOption(f"graph is a {type(graph).__name__}; it must be a Graph, or a function that makes one "
                            "from a config, or a module with such a function named build")
    model = build(config)
    if not isinstance(model, Graph | Encoder):
        raise InvalidOption(f"graph made a {type(model).__name__} from the config; it must return a jaxinfer.Graph")
    return config, model


def _dtype(checkpoint: Checkpoint, dtype: str | None) -> Any:
    if dtype is not None:
        return jnp.dtype(str(dtype))
    matrices = [t for t in checkpoint.tensors.values() if len(t.shape) > 1]
    exact = all(t.dtype == jnp.float32 and t.nbytes == 4 * math.prod(t.shape) for t in matrices)  # on disk as well
    return jnp.dtype("float32" if exact else "bfloat16")


def _tokenizer(checkpoint: Checkpoint):
    if checkpoint.directory is not None:
        return from_directory(checkpoint.directory)
    if checkpoint.gguf is None:
        raise UnsupportedModel(f"{checkpoint.source} has no tokenizer")
    from jaxinfer.frontend.gguf_tokenizer import from_gguf

    return from_gguf(checkpoint.gguf)


def _eos(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the generation config's word, then the config's, then the tokenizer's."""
    for config in (checkpoint.generation, checkpoint.config):
        ids = config.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids]) | tokenizer.eos_ids
    return tokenizer.eos_ids
