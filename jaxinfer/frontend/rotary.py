"""A config's rotary positions: `rope_parameters`, or the older `rope_theta` and `rope_scaling`, become a Rope.

Each function here also returns the model's context limit, in tokens, since some scalings stretch it. Scalings that
depend on the length ("dynamic", "longrope") are fixed by `max_context`: cached keys could not follow a later change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.frontend.keys import Keys
from jaxinfer.graphs import rope
from jaxinfer.graphs.rope import Rope

Scaling = Callable[[Keys, int, float, int, "int | None"], tuple[Rope, int]]


def one_rope(keys: Keys, head_width: int, max_context: int | None) -> tuple[tuple[Rope, ...], int]:
    """The one rope of most families."""
    return _one(keys, head_width, max_context, {})


def part_rope(keys: Keys, head_width: int, max_context: int | None) -> tuple[tuple[Rope, ...], int]:
    """Phi's: part of each head may turn, longrope has older names, the trained context stands outside."""
    more = {"partial_rotary_factor": keys.number("partial_rotary_factor", 1.0)}
    always = {"original_max_position_embeddings": keys.integer("original_max_position_embeddings", 4096)}
    return _one(keys, head_width, max_context, more, always, part=True, renamed={"su": "longrope", "yarn": "longrope"})


def two_ropes(keys: Keys, head_width: int, max_context: int | None) -> tuple[tuple[Rope, ...], int]:
    """Gemma 3's: one rope for layers that see all, which alone is scaled, and one for layers with a window."""
    limit = keys.integer("max_position_embeddings")
    outer, old = keys.inside("rope_parameters", keys.mapping("rope_parameters")), keys.mapping("rope_scaling")
    ropes = []
    for kind, theta, scaling in (("full_attention", keys.number("rope_theta", 1_000_000.0), old),
                                 ("sliding_attention", keys.number("rope_local_base_freq", 10_000.0), {})):
        rope_keys = keys.inside(f"rope_parameters.{kind}", {"rope_theta": theta, **outer.mapping(kind), **scaling})
        ropes.append(_rope(rope_keys, head_width, limit, max_context)[0])
    outer.surplus()
    return tuple(ropes), limit


def _one(keys: Keys, head_width: int, max_context: int | None, more: Mapping[str, Any],
         always: Mapping[str, Any] | None = None, **how: Any) -> tuple[tuple[Rope, ...], int]:
    theta, limit = keys.number("rope_theta", 10_000.0), keys.integer("max_position_embeddings")
    new, old = keys.mapping("rope_parameters"), keys.mapping("rope_scaling")
    values = {"rope_theta": theta, **more, **(old or new), **(always or {})}
    inner = keys.inside("rope_scaling" if old else "rope_parameters", values)
    result, limit = _rope(inner, head_width, limit, max_context, **how)
    return (result,), limit


def _rope(keys: Keys, head_width: int, limit: int, max_context: int | None, *, part: bool = False,
          renamed: Mapping[str, str] | None = None) -> tuple[Rope, int]:
    """One rope from its own keys. `part` says that the unscaled rope, too, may turn part of a head."""
    kind = keys.get("rope_type", keys.get("type", "default"))
    kind = (renamed or {}).get(kind, kind)
    theta, share = keys.number("rope_theta"), keys.number("partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and kind == "default" and not part):
        keys.problem("partial_rotary_factor", f"{share} is not supported here, only 1.0 is")
    width = int(head_width * share)
    if width < 4 or width % 2 or width > head_width:
        keys.problem("partial_rotary_factor", f"{width} of {head_width} channels would turn; expected an even number "
                     f"from 4", "head_dim", "hidden_size", "num_attention_heads")
        width = 4
    if kind not in SCALINGS:
        keys.problem("rope_type", f"{kind!r} is not one of {', '.join(sorted(SCALINGS))}")
        return Rope(()), limit
    result, limit = SCALINGS[kind](keys, width, theta, limit, max_context)
    keys.surplus()
    return result, limit


def _plain(keys: Keys, width: int, theta: float, limit: int, max_context: int | None) -> tuple[Rope, int]:
    keys.get("original_max_position_embeddings")  # nothing is scaled by it
    return rope.plain(width, theta), limit


def _linear(keys: Keys, width: int, theta: float, limit: int, max_context: int | None) -> tuple[Rope, int]:
    factor = keys.number("factor")
    return rope.linear(width, theta, factor=factor), int(limit * max(factor, 1))


def _dynamic(keys: Keys, width: int, theta: float, limit: int, max_context: int | None) -> tuple[Rope, int]:
    factor = keys.number("factor")
    stretched = int(limit * max(factor, 1))
    return rope.dynamic(width, theta, factor=factor, trained=limit, context=max_context or stretched), stretched


def _llama3(keys: Keys, width: int, theta: float, limit: int, max_context: int | None) -> tuple[Rope, int]:
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    factor, trained = keys.number("factor"), keys.integer("original_max_position_embeddings", limit)
    if low >= high:
        keys.problem("high_freq_factor", f"{high} is not above low_freq_factor, {low}")
        return Rope(()), limit
    return rope.llama3(width, theta, factor=factor, low=low, high=high, trained=trained), limit


def _yarn(keys: Keys, width: int, theta: float, limit: int, max_context: int | None) -> tuple[Rope, int]:
    trained = keys.integer("original_max_position_embeddings", limit)
    factor, scale = keys.number("factor", limit / trained), keys.number("attention_factor", None)
    one, every = keys.number("mscale", None), keys.number("mscale_all_dim", None)
    if scale is None and one and every:
        scale = rope.yarn_scale(factor, one) / rope.yarn_scale(factor, every)
    result = rope.yarn(width, theta, factor=factor, trained=trained, fast=keys.number("beta_fast", 32),
                       slow=keys.number("beta_slow", 1), truncate=keys.flag("truncate", True), scale=scale)
    return result, max(limit, int(trained * factor))


def _longrope(keys: Keys, width: int, theta: float, limit: int, max_context: int | None) -> tuple[Rope, int]:
    trained = keys.integer("original_max_position_embeddings", limit)
    factor, scale = keys.number("factor", limit / trained), keys.number("attention_factor", None)
    short, long = keys.numbers("short_factor", width // 2), keys.numbers("long_factor", width // 2)
    return rope.longrope(width, theta, short=short, long=long, factor=factor, trained=trained,
                         context=max_context or limit, scale=scale), limit


SCALINGS: dict[str, Scaling] = {"default": _plain, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3,
                                "yarn": _yarn, "longrope": _longrope}
