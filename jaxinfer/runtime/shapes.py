"""What a language model's programs are compiled for, known before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from jaxinfer import kernels as ops
from jaxinfer.compiler import Executables, Key, Ladder, default_ladder, invariant_ladder
from jaxinfer.compiler.placement import Placement
from jaxinfer.graph import Graph
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.fit import would_fit
from jaxinfer.runtime.tiers import Tiers, plan_tiers
from jaxinfer.scheduler import PageGroup

SHARE = 0.5  # of the free memory may go to a model whose user names no budget,
CPU_PAGES = 2**29  # and of that this much to KV pages on the CPU, where zeroing more would be felt at start-up


class Streaming(NamedTuple):
    """Budgets in bytes: the device's, and the host's, or None for the default."""

    device: int
    host: int | None


class Shapes(NamedTuple):
    """`chunks` is what attention says of prompt chunks (`kernels.chunks`); `given` is what `Executables` is given;
    `tiers` say where the layers are if not all of them stay on the device."""

    ladder: Ladder
    chunks: int | None
    groups: tuple[PageGroup, ...]
    given: dict[str, Any]
    tiers: Tiers | None


def shapes_of(model: Graph, places: Sequence[Placement], dtype: Any, *, max_context: int, max_rows: int,
              quantize: str | None, kv_cache_dtype: str | None, batch_invariant: bool, memory: int | str | None,
              forced: Mapping[str, str], stream: Streaming | None = None, moving: int = 0,
              programs: Callable[..., Executables] = Executables) -> Shapes:
    """The ladder, and as many pages as there is memory for. The arithmetic of `planning.needs` says how many, so that
    they are as many on every machine, beside `moving` ones on their way to or from the host; where its estimate of
    temporaries is all that stands in the way, the compiler is asked, about `programs`. Raises InvalidOption,
    OutOfMemory."""
    budget, platform = None if memory is None else planning.parse_bytes(memory), places[0].device.platform
    with ops.tracing(platform, forced):
        chunks = ops.chunks(platform)
        ladders = invariant_ladder if batch_invariant else partial(default_ladder, chunks=chunks)
        ladder, tiers = ladders(max_rows, max_context), None
        sizes: dict[str, Any] = dict(dtype=dtype, quantize=quantize, kv_cache_dtype=kv_cache_dtype, max_rows=max_rows,
                                     max_context=max_context, chunk=ladder.chunk, place=places[0])
        need, aliased = planning.needs(model, **sizes), platform == "cpu"
        passing = moving * max(need.page.values())
        need = replace(need, temporaries=need.temporaries + passing)
        params = planning.abstract_params(model, dtype, quantize)

        def given(groups: tuple[PageGroup, ...]) -> dict[str, Any]:
            return dict(params=params, state=planning.abstract_state(model, groups, dtype, kv_cache_dtype),
                        max_rows=max_rows, max_context=max_context, forced=forced,
                        table_width={group.name: -(-max_context // group.page_size) for group in groups})

        if stream and need.least > stream.device:
            host = stream.host or (0 if aliased else int(SHARE * planning.host_memory()))
            tiers, groups = plan_tiers(model, params, need, max_rows=max_rows, tokens=ladder.budget,
                                       device_memory=stream.device, host_memory=host, aliased=aliased)
        else:
            why, most = f"device_memory={stream.device}" if stream else f"{memory=}", None
            budget = stream.device if stream else budget
            if budget is None:
                budget = steady(int(SHARE * planning.free(places)))
                why = f"{SHARE:.0%} of the memory that is free on {places[0].device}"
                most = CPU_PAGES // planning.sharing(places) if aliased else None
            if need.weights + need.row <= budget < need.least and places[0].is_local:
                asked = programs(model, ladder, device=places[0], **given(need.groups(model, 1)))
                need = replace(need, temporaries=_temporaries(asked) + passing, told="as the compiler says")
            groups = planning.page_groups(model, **sizes, budget=budget, why=why, most=most, need=need,
                                          fits=partial(would_fit, model, sizes, budget, ladders))
        return Shapes(ladder, chunks, groups, given(groups), tiers)


def _temporaries(programs: Executables) -> int:
    """Those of a model's widest steps and draws, compiled."""
    with closing(programs):
        steps = [bucket for bucket in programs.ladder.buckets if bucket.steps == 1]
        widest = {max(steps, key=lambda bucket: bucket.tokens), max(steps, key=lambda bucket: bucket.rows)}
        draws = max(bucket.rows for bucket in steps)
        programs.compile_all(*(Key("forward", bucket) for bucket in widest), Key("score", programs.ladder.prompts[-1]),
                             Key("edited", draws))
        return max(entry.bytes for entry in programs.ledger)


def steady(count: int) -> int:
    """At most an eighth less than `count`, and the same for counts that differ little, such as what is free now and
    then: with another number of pages, no stored program would fit.

    >>> steady(1_000_000), steady(1_040_000)
    (983040, 983040)
    """
    step = 1 << max(0, count.bit_length() - 4)
    return count // step * step
