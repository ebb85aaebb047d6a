"""JAX's TPU kernel equals our reference, run by Pallas' TPU interpreter: with its race detection, and NaN in all memory
that nobody has written. Hypothesis would be too slow; the cases are picked for what could go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.kernels import attend, attention_tpu, copy, init_pages, tracing, write
from jaxinfer.kernels.attention_tpu import Interleaved, takes_ragged
from jaxinfer.testing import GROUP, Numbers, RaggedRun, RunShape

pytestmark = pytest.mark.usefixtures("strict")
H, SCALE, JUNK = 128, 0.1, 2**31 - 1


def ragged(lens, cached, window=None, longest=1, singles=0, rows=None) -> RaggedRun:
    """Rows on pages of their own, dealt out of order, but for the last row: it shares the first one's first page."""
    rows = rows or len(lens)
    shape = RunShape(tokens=sum(lens) + 3 if longest > 1 else rows, rows=rows, longest=longest, S=8, P=4, pages=20,
                     singles=singles)
    free, tables = list(np.random.default_rng(0).permutation(shape.pages)), []
    for n, before in zip(lens, cached, strict=True):
        tables.append(tuple(int(free.pop()) for _ in range(-(-(n + before) // shape.S))))
    tables[-1] = (tables[0][0], *tables[-1][1:])
    first = tuple(0 if window is None else max(0, before - window + 1) // shape.S for before in cached)
    return RaggedRun(shape, tuple(cached), tuple(lens), tuple(tables), first, seed=1)


CASES = {
    "decode beside padded rows, capped": (ragged((1, 1), (9, 20), rows=4), (4, 1), "float32", {"softcap": 3.0}),
    "prompts and a row of no tokens, in a window": (
        ragged((1, 0, 7), (30, 0, 12), window=10, longest=7, singles=2), (8, 2), "bfloat16", {"window": 10}),
}


@pytest.fixture
def views(monkeypatch):
    """What the interpreter lacks and this kernel does: reading memory that is seen in another shape or dtype."""
    interpreter = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    plain, to_range = interpreter.get, interpreter.interpret_utils.to_range

    def get(token, device, core, space, buffer, transforms, *rest, **options):
        views = [i for i, t in enumerate(transforms) if not hasattr(t, "indices")]
        direct = transforms[:views[0]] if views else transforms
        token, found = plain(token, device, core, space, buffer, direct, *rest, **options)
        for view in transforms[len(direct):]:
            if hasattr(view, "indices"):
                found = found[to_range([jax.tree.map(int, view)])]
            elif hasattr(view, "shape"):
                found = found.reshape(view.shape)
            else:  # pairs of 16-bit rows become rows of 32 bits, the first row in the low half
                low, high = np.moveaxis(found.view(np.uint16).reshape(-1, 2, found.shape[-1]), 1, 0).astype(np.uint32)
                found = low | high << 16
        return token, found

    get.__wrapped__ = plain.__wrapped__  # which the interpreter's own copies call
    monkeypatch.setattr(interpreter, "get", get)


@pytest.mark.parametrize("name", CASES)
def test_the_ragged_kernel_equals_the_reference(name, views, monkeypatch, capfd):
    monkeypatch.setattr(attention_tpu, "BLOCK_QUERIES", 4)  # several blocks; the interpreter asks for no more queries
    monkeypatch.setattr(attention_tpu, "BLOCK_TOKENS", 16)  # than a KV head has query heads
    run, heads, dtype, options = CASES[name]
    numbers = Numbers.of(run, heads, dtype, H)
    q, k, v, pages = numbers.padded(run.shape, np.nan)
    options = {"group": GROUP, "scale": SCALE, **options}
    expected, _ = attend(q, k, v, pages, device(run), how="reference", **options)
    interpreted = pltpu.InterpretParams(detect_races=True)
    with tracing("tpu") as traced, pltpu.force_tpu_interpret_mode(interpreted):
        found, after = jax.jit(lambda *args: attend(*args, **options))(q, k, v, interleaved(pages), device(run))
    assert traced.chosen["attend"] == "ragged"
    np.testing.assert_allclose(found[:run.ends[-1]], expected[:run.ends[-1]], atol=2e-5 if dtype == "float32" else 6e-2)
    assert not np.asarray(found[run.ends[-1]:]).any(), "padding is not zero"
    for page, written in zip(after.read(jnp.arange(run.shape.pages)), numbers.written(run), strict=True):
        np.testing.assert_array_equal(np.asarray(page, np.float32), written)
    assert "RACE DETECTED" not in capfd.readouterr().out


def device(ragged: RaggedRun):
    return jax.tree.map(jnp.asarray, ragged.run(JUNK))


def interleaved(pages) -> Interleaved:
    both = jnp.stack([pages.k, pages.v], 2)
    return Interleaved(jnp.moveaxis(both.reshape(both.shape[0], -1, *both.shape[3:]), 1, 2))


def test_every_implementation_reads_and_writes_the_interleaved_layout():
    run, heads, dtype, _ = CASES["decode beside padded rows, capped"]
    q, k, v, pages = Numbers.of(run, heads, dtype, H).padded(run.shape, np.nan)
    for how in ("visits", "reference"):
        step = jax.jit(lambda pages, how=how: attend(q, k, v, pages, device(run), group=GROUP, scale=SCALE, how=how))
        (expected, plain), (found, other) = step(pages), step(interleaved(pages))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        np.testing.assert_array_equal(np.asarray(other.kv, np.float32), np.asarray(interleaved(plain).kv, np.float32))
    for how in write.available("cpu"):
        np.testing.assert_array_equal(np.asarray(write(interleaved(pages), k, v, device(run), GROUP, how=how).kv, "f4"),
                                      np.asarray(other.kv, np.float32))
    pair = jnp.array([3, 99]), jnp.array([5, 20])
    for how in copy.available("cpu"):
        moved = copy(other, *pair, how=how).kv
        np.testing.assert_array_equal(np.asarray(moved, "f4"), np.asarray(other.kv.at[5].set(other.kv[3]), "f4"))


def test_a_pool_has_the_layout_of_what_attends_where_its_heads_fit():
    with tracing("tpu"):
        fits = [(8, 128, "bfloat16"), (2, 128, "float32"), (1, 256, "bfloat16")]
        assert all(type(init_pages(2, 8, *heads)) is Interleaved for heads in fits)
        narrow = [(2, 64, "bfloat16"), (3, 128, "bfloat16"), (2, 256, "bfloat16"), (8, 128, "float32")]
        assert not any(type(init_pages(2, 8, *heads)) is Interleaved for heads in narrow)
    with tracing("tpu", {"attend": "by_page"}):
        assert type(init_pages(2, 8, *fits[0])) is not Interleaved
    pages = Interleaved(jnp.zeros((2, 8, 4, 128)))
    assert takes_ragged(None, None, None, pages, None) and pages.shape == (2, 2, 8, 128)
    assert not takes_ragged(None, None, None, pages, None, sinks_N=jnp.zeros(4)), "the kernel has no sinks"
