"""What is done to a row's logits before it draws: penalties, biases, masks, and the functions that users bring.

Axes: R rows, V vocabulary, B biases, W words of a mask, S slots, L tokens of history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.errors import InvalidRequest
from jaxinfer.kernels.op import LOGITS, whole
from jaxinfer.kernels.sampling import Draws, sample_whole
from jaxinfer.request import MOST_BIASES

BIASES = MOST_BIASES  # the most that a row may have


class Edits(NamedTuple):
    """What is done to each row's logits, in this order; what is off changes no bit.

    `repetition` f32[R] (1 is off) divides the positive logits of the tokens in the prompt or drawn so far, and
    multiplies their negative ones (Keskar et al., 2019). `frequency` and `presence` f32[R] (0 is off) are subtracted
    from the tokens drawn so far, for each time and once (OpenAI). `bias` f32[R, B] is added to `bias_tokens`
    int32[R, B]; padding has a token past the vocabulary. `mask` uint32[R, W] allows token t where bit t % 32 of word
    t // 32 is set. Of the row's history, `length` int32[R] tokens are real, and the first `prompt` int32[R] of them
    are its prompt.
    """

    repetition: Any
    presence: Any
    frequency: Any
    bias_tokens: Any
    bias: Any
    mask: Any
    length: Any
    prompt: Any


class Context(NamedTuple):
    """What a user's logits function knows of its row: `tokens` int32[L], of which `length` int32 are real (the others
    are no tokens: `.at[]` drops them), the first `prompt` int32 of them its prompt and the last `count` int32 drawn;
    and the request's `seed` uint32."""

    tokens: Any
    length: Any
    prompt: Any
    count: Any
    seed: Any


LogitsFunction = Callable[[jax.Array, Context], jax.Array]  # logits_V, context -> logits_V


def begin_history(history_SL: jax.Array, slot: jax.Array, tokens_L: jax.Array) -> jax.Array:
    """The histories, with a slot's replaced by a new row's prompt, padded to L with V, which is no token."""
    return history_SL.at[slot].set(tokens_L, mode="drop")


def _history(history_SL: jax.Array, slot_R: jax.Array) -> jax.Array:
    """Each row's history; padding, whose slot is past the end, gets somebody's."""
    return history_SL.at[slot_R].get(mode="clip")


def _penalise(logits_V: jax.Array, tokens_L: jax.Array, edits: Edits) -> jax.Array:
    V, at_L = logits_V.size, jnp.arange(tokens_L.size)
    place_L = jnp.where(at_L < edits.prompt, tokens_L, tokens_L + V)
    place_L = jnp.where(at_L < edits.length, place_L, 2 * V)
    count_2V = jnp.zeros(2 * V, jnp.int32).at[place_L].add(1, mode="drop")  # in the prompt, then drawn
    asked_V, drawn_V = count_2V[:V], count_2V[V:]
    stronger_V = jnp.where(logits_V > 0, logits_V / edits.repetition, logits_V * edits.repetition)
    logits_V = jnp.where((asked_V + drawn_V > 0) & (edits.repetition != 1), stronger_V, logits_V)
    lower_V = logits_V - edits.frequency * drawn_V.astype(jnp.float32) - edits.presence
    return jnp.where((drawn_V > 0) & ((edits.frequency != 0) | (edits.presence != 0)), lower_V, logits_V)


def _edit(logits_V: jax.Array, tokens_L: jax.Array, edits: Edits) -> jax.Array:
    logits_V = _penalise(logits_V, tokens_L, edits)
    logits_V = logits_V.at[edits.bias_tokens].add(edits.bias, mode="drop")
    bits_W32 = edits.mask[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None, :] & 1
    return jnp.where(bits_W32.reshape(-1)[: logits_V.size] == 1, logits_V, -jnp.inf)


def edit(logits_RV: jax.Array, slot_R: jax.Array, edits: Edits, history_SL: jax.Array) -> jax.Array:
    """The logits that each row draws from."""
    return jax.vmap(_edit)(whole(logits_RV, LOGITS), _history(history_SL, slot_R), edits)


def sample_edited(logits_RV: jax.Array, last_S: jax.Array, slot_R: jax.Array, draws: Draws, edits: Edits,
                  history_SL: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`sample` after `edits`: `(last_S, history_SL, tokens_R)`. The token drawn is also remembered in the history of
    the row's slot, at `length`; a slot or a length past the end is dropped."""
    edited_RV = jax.lax.optimization_barrier(edit(logits_RV, slot_R, edits, history_SL))  # `sample` as it is elsewhere
    last_S, tokens_R = sample_whole(edited_RV, last_S, slot_R, draws)
    history_SL = history_SL.at[slot_R, edits.length].set(jnp.maximum(tokens_R, 0), mode="drop")
    return last_S, history_SL, tokens_R


def edit_logits(fn: LogitsFunction, logits_RV: jax.Array, history_SL: jax.Array, slot_R: jax.Array,
                chosen_R: jax.Array, length_R: jax.Array, prompt_R: jax.Array, seed_R: jax.Array) -> jax.Array:
    """What a user's function makes of the chosen rows' logits; the others keep theirs to the bit."""
    logits_RV = whole(logits_RV, LOGITS)
    context = Context(_history(history_SL, slot_R), length_R, prompt_R, length_R - prompt_R, seed_R)
    edited_RV = jax.vmap(fn)(logits_RV, context).astype(logits_RV.dtype)
    return jnp.where(chosen_R[:, None], edited_RV, logits_RV)


def check_logits_function(fn: LogitsFunction, vocab: int, length: int) -> None:
    """Trace `fn` for a vocabulary and a history of these sizes; `InvalidRequest` if it gives no float array [V], or
    calls back to the host: what fails there would fail the step of everybody."""
    name = getattr(fn, "__qualname__", None) or repr(fn)
    ints = jax.ShapeDtypeStruct((1,), jnp.int32)
    context = Context(jax.ShapeDtypeStruct((1, length), jnp.int32), ints, ints, ints,
                      jax.ShapeDtypeStruct((1,), jnp.uint32))
    wanted = (f"it must take (logits, context), a float32 array [{vocab}] and a Context, and return a float array "
              f"[{vocab}], in operations that JAX can trace")
    try:
        logits_1V = jax.ShapeDtypeStruct((1, vocab), jnp.float32)
        jaxpr, found = jax.make_jaxpr(jax.vmap(fn), return_shape=True)(logits_1V, context)
    except Exception as error:
        raise InvalidRequest(f"logits function {name} raised {type(error).__name__}: {error}; {wanted}") from error
    if _calls_back(jaxpr.jaxpr):
        raise InvalidRequest(f"logits function {name} calls back to the host; {wanted}")
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise InvalidRequest(f"logits function {name} returned a {type(found).__name__}, not one array; {wanted}")
    if found.shape != (1, vocab) or not jnp.issubdtype(found.dtype, jnp.floating):
        shape = list(found.shape[1:])
        raise InvalidRequest(f"logits function {name} returned {found.dtype} {shape}; {wanted}")


def _calls_back(jaxpr: Any) -> bool:
    """Whether a jaxpr, or one inside it, calls back to the host."""
    for equation in jaxpr.eqns:
        if "callback" in equation.primitive.name:
            return True
        inner = (getattr(x, "jaxpr", x) for x in jax.tree.leaves(tuple(equation.params.values())))
        if any(hasattr(x, "eqns") and _calls_back(x) for x in inner):
            return True
    return False
