"""What is done to pages besides attending: a run's keys and values are written, pages are copied, and one page of all
layers leaves the device or comes back. Any layout will do.

Axes: T tokens, C pairs of pages, K KV heads, H head width; of a layout's arrays, axis 0 is pages.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.graph import Pages, Run
from jaxinfer.kernels.op import Cut, Op


def write_reference(pages: Pages, k_TKH: jax.Array, v_TKH: jax.Array, run: Run, group: str) -> Pages:
    """Put each token's key and value at its position; padding goes to a page past the end, which drops it."""
    num_pages, _, page_size, _ = pages.shape
    position_T = run.position_T
    page_T = run.tables[group][run.row_T, position_T // page_size]
    page_T = jnp.where(run.valid_T, page_T, num_pages)
    at = (page_T, *[slice(None)] * (pages.slot_axis - 1), position_T % page_size)
    put = lambda page, new: page.at[at].set(new.astype(page.dtype), mode="drop")
    return jax.tree.map(put, pages, pages.entries(k_TKH, v_TKH))


def write_loop(pages: Pages, k_TKH: jax.Array, v_TKH: jax.Array, run: Run, group: str) -> Pages:
    """Token by token, real ones only. XLA's CPU backend makes a loop of a scatter anyway, and up to JAX 0.10 it
    converts the whole pool to float32 around it: a step of 8 rows took 1.1 s over a pool of 3 GB."""
    axis, page_size, entries = pages.slot_axis, pages.shape[2], pages.entries(k_TKH, v_TKH)
    position_T = run.position_T
    page_T = run.tables[group][run.row_T, position_T // page_size]

    def put(t, pages):
        def one(page, new):
            at = [0] * page.ndim
            at[0], at[axis] = page_T[t], position_T[t] % page_size
            return lax.dynamic_update_slice(page, jnp.expand_dims(new[t], (0, axis)).astype(page.dtype), at)

        return jax.tree.map(one, pages, entries)

    return lax.fori_loop(0, run.cu_q_lens[-1], put, pages)


write = Op("write", reference=write_reference, fast={"loop": (("cpu",), write_loop)})


def copy_reference(pages: Pages, from_C: jax.Array, to_C: jax.Array) -> Pages:
    """Page `to_C[i]` becomes what page `from_C[i]` was; a pair whose `to_C[i]` is past the end is padding. No page may
    be written twice, nor read by a pair after the one that writes it."""
    return jax.tree.map(lambda page: page.at[to_C].set(page[from_C], mode="drop"), pages)


def copy_loop(pages: Pages, from_C: jax.Array, to_C: jax.Array) -> Pages:
    """Pair by pair, real ones only and in order, for the reasons of `write_loop`."""
    padding_C = to_C >= pages.shape[0]
    order_C = jnp.argsort(padding_C, stable=True)

    def put(i, pages):
        old, new = from_C[order_C[i]], to_C[order_C[i]]
        move = lambda page: lax.dynamic_update_index_in_dim(page, lax.dynamic_index_in_dim(page, old, 0), new, 0)
        return jax.tree.map(move, pages)

    return lax.fori_loop(0, (~padding_C).sum(), put, pages)


copy = Op("copy", reference=copy_reference, fast={"loop": (("cpu",), copy_loop)},
          cut=lambda pages, from_C, to_C: Cut((pages.axes, (), ()), (pages.axes,)))


def export_page(layers: list[Any], page: jax.Array) -> Any:
    """One page of a state group, to the bit: the layout's arrays, with layers in the place of pages."""
    take = lambda *arrays: jnp.stack([lax.dynamic_index_in_dim(array, page, 0, keepdims=False) for array in arrays])
    return jax.tree.map(take, *layers)


def import_page(layers: list[Any], page: jax.Array, exported: Any) -> list[Any]:
    """The state group with what was exported as this page."""
    put = lambda array, new: lax.dynamic_update_index_in_dim(array, new, page, 0)
    return [jax.tree.map(lambda array, new, i=i: put(array, new[i]), pages, exported) for i, pages in enumerate(layers)]
