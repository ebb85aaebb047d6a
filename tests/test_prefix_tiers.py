"""Prefix pages on the host and on the disk: the same tokens, the same bits, within their budgets, whatever fails."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.errors import InvalidOption, OutOfMemory
from tests.running import all_free, eventually, hooked, seen_events
from tests.test_prefix import nodes

pytestmark = pytest.mark.usefixtures("in_haste")

PAGE = 2 * 2 * 64 * 2 * 16 * 4  # bytes of 64 tokens of the tiny model, in float32
ROOM = 9  # pages on the device: one context of 512 tokens, and one
PROMPTS = [np.random.default_rng(i).integers(4, 320, 400).tolist() for i in range(4)]  # six full pages each
HOW = dict(max_tokens=6, ignore_eos=True)
alone = partial(ji.load, max_context=512, max_rows=1, batch_invariant=True)  # one bucket: little to compile


def ready(lm):
    """The programs that move pages are there: until then, what is evicted is gone."""
    lm._engine.executables.compile_all(*lm._engine.executables.moving)
    return lm


@contextmanager
def afresh(lm, host=None, disk=None):
    """Nothing is known, all tiers are open, and they keep so many pages. The engine has nothing to do meanwhile."""
    engine, lower = lm._engine, lm._engine.scheduler.tree.lower
    assert eventually(lambda: all_free(lm))
    engine.mover._disk.submit(int).result()
    lower.open, costs = True, dict(vars(lower.costs))
    lower.sizes = {"host": {"full": host or 99}, "disk": {"full": 99 if disk is None else disk}}
    engine.scheduler.tree.clear()
    engine.mover.forget()
    vars(lower.costs).update(token=None, back=None, read=None)
    try:
        yield lower
    finally:
        assert eventually(lambda: all_free(lm))
        vars(lower.costs).update(costs)


@pytest.fixture(scope="module")
def expected(tiny_path):
    with alone(tiny_path) as lm:
        assert lm.prefix_tiers is None and not lm._engine.executables.moving
        return [lm(prompt, **HOW).tokens for prompt in PROMPTS]


@pytest.fixture(scope="module")
def lm(tiny_path):
    with alone(tiny_path, prefix_host_memory=99 * PAGE, prefix_disk_memory=99 * PAGE) as lm:
        assert lm._engine.scheduler.tree.pools["full"].size == ROOM
        yield ready(lm)


def test_prompts_that_do_not_fit_on_the_device_come_back_from_the_host(lm, expected):
    with afresh(lm) as lower, seen_events(events.Compiling) as compiled:
        assert [lm(prompt, **HOW).tokens for prompt in PROMPTS] == expected
        before = lower.returned
        outputs = [lm(prompt, **HOW) for prompt in PROMPTS]
        assert [output.tokens for output in outputs] == expected
        assert [output.reused for output in outputs] == [384] * 4 and lower.returned > before
        told = lm.prefix_tiers
    assert not [event for event in compiled if "port" in event.name], "a page waited for a compile"
    assert told.open and told.host.hits == lower.returned and told.host.pages == 99
    assert told.host.nbytes == told.host.used * PAGE > 0 and told.host.back > 0 and told.host.away > 0
    assert told.seconds_per_token > 0 and "hits; a page takes" in str(told)


def test_they_come_back_from_the_disk(lm, expected):
    with afresh(lm, host=6) as lower:
        lower.costs.read = lower.costs.back = 0.0
        for _ in range(2):
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                assert lm(prompt, **HOW).tokens == tokens
                lm._engine.mover._disk.submit(int).result()
        assert lower.fetched > 0
        told = lm.prefix_tiers.disk
        assert told.hits == lower.fetched and told.used > 6 and told.back is not None and told.away > 0


def test_where_reading_again_takes_less_time_nothing_comes_back(lm, expected):
    with afresh(lm, disk=0) as lower:
        lower.costs.back, before = 1e9, (lower.returned, lower.declined)
        assert [lm(prompt, **HOW).tokens for prompt in PROMPTS * 2] == expected * 2
        assert lower.returned == before[0] and lower.declined > before[1]
        assert lm.prefix_tiers.recomputed == lower.declined and lower.left > 0


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(host=st.integers(1, 20), disk=st.integers(0, 30), asked=st.lists(st.integers(0, 3), min_size=2, max_size=8),
       token=st.sampled_from((None, 0.0, 1.0)))
def test_whatever_is_asked_within_whatever_budget_the_tokens_are_the_same(lm, expected, host, disk, asked, token):
    mover, most = lm._engine.mover, 0
    move = mover.move

    def watched(kind, moves, state):
        nonlocal most
        state = move(kind, moves, state)
        most = max(most, sum(x.nbytes for x in jax.tree.leaves(mover.host)))
        return state

    with afresh(lm, host, disk) as lower, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mover, "move", watched)
        lower.costs.token = token
        assert [lm(PROMPTS[i], **HOW).tokens for i in asked] == [expected[i] for i in asked]
        mover._disk.submit(int).result()
        told = lm.prefix_tiers
        assert most <= host * PAGE and told.host.used <= host and told.disk.used <= disk
        assert all(place < disk for kind, place in kept_places(lm) if kind == "disk")


def kept_places(lm):
    return [(tier, place) for _, _, path in nodes(lm._engine.scheduler.tree)
            for (tier, _), place in path[-1].kept.items()]


@pytest.mark.parametrize(("options", "slow"), [
    (dict(dtype="bfloat16"), False), (dict(kv_cache_dtype="int8"), True),
    pytest.param(dict(kv_cache_dtype="fp8"), True, marks=pytest.mark.long)], ids=str)
def test_a_page_that_comes_back_is_what_it_was_to_the_bit(windowed_path, options, slow):
    """With a window; `slow`: by way of the disk."""
    with alone(windowed_path, prefix_host_memory="4MiB", prefix_disk_memory="4MiB", **options) as lm:
        lower = ready(lm)._engine.scheduler.tree.lower
        lm(PROMPTS[0], **HOW)
        before = held_pages(lm, PROMPTS[0])
        assert set(before) == {"full", "window_100"} and len(before["full"]) == 6
        for prompt in PROMPTS[1:]:
            lm(prompt, **HOW)
        assert not held_pages(lm, PROMPTS[0])["full"], "they have not left"
        if slow:
            lm._engine.mover._disk.submit(int).result()
            assert eventually(lambda: not any(map(any, (s.pins for s in lower.slots.values()))))
            for group in ("full", "window_100"):
                slots = lower.slots["host", group]
                for slot, node in enumerate(slots.owner):
                    if node is not None:
                        del node.kept[slots.key]
                        slots.drop(slot)
            lm._engine.mover.sweep()
        lower.costs.token = 1.0
        assert lm(PROMPTS[0], **HOW).reused == 384 and (lower.fetched > 0) == slow
        after = held_pages(lm, PROMPTS[0])
        assert after["window_100"] and all(len(after[name]) <= len(before[name]) for name in before)
        for name, pages in after.items():
            for i, arrays in pages.items():
                for now, was in zip(arrays, before[name][i], strict=True):
                    assert now.dtype == was.dtype and now.tobytes() == was.tobytes()


def held_pages(lm, prompt):
    """What the device holds of a prompt's full pages, by state group and number."""
    assert eventually(lambda: all_free(lm))
    found = {name: {} for name in lm._engine.state}
    for _, tokens, path in nodes(lm._engine.scheduler.tree):
        if len(tokens) % 64 == 0 and list(tokens) == prompt[: len(tokens)]:
            for name, page in path[-1].pages.items():
                if page is not None:
                    found[name][len(path)] = [np.asarray(x[page]) for x in jax.tree.leaves(lm._engine.state[name])]
    return found


@pytest.mark.parametrize("failing", ["write", "read"])
def test_a_disk_that_fails_is_closed_and_nothing_else_is_harmed(lm, expected, failing, monkeypatch):
    mover, spill, file = lm._engine.mover, lm._engine.mover._spill, lm._engine.mover._spill.file
    with afresh(lm, host=6) as lower, seen_events(events.TierClosed) as closed, open("/dev/full", "r+b") as full:
        if failing == "write":
            monkeypatch.setattr(spill, "file", full)
        else:
            for prompt in PROMPTS[:3]:
                lm(prompt, **HOW)
                mover._disk.submit(int).result()
            os.ftruncate(spill.file.fileno(), 0)
        lower.costs.token = 1.0
        for prompt, tokens in zip(PROMPTS * 2, expected * 2, strict=True):
            assert lm(prompt, **HOW).tokens == tokens
            mover._disk.submit(int).result()
        assert [event.tier for event in closed] == ["disk"]
        assert ("are to lie in" if failing == "write" else "ends within record") in closed[0].why
        assert lm.prefix_tiers.disk.used == 0 and lm.prefix_tiers.host.used > 0 and lm.prefix_tiers.open
    os.ftruncate(file.fileno(), spill.nbytes)


def test_a_host_without_memory_is_closed_and_nothing_else_is_harmed(lm, expected):
    def none_left(key):
        if key.kind == "export full":
            raise MemoryError("none left")

    with afresh(lm), seen_events(events.TierClosed) as closed:
        with hooked(lm, none_left):
            assert [lm(prompt, **HOW).tokens for prompt in PROMPTS * 2] == expected * 2
        assert [(event.tier, event.why) for event in closed] == [("host", "none left")]
        assert not lm.prefix_tiers.open and lm.prefix_tiers.host.used == 0


def test_after_a_lost_device_nothing_is_kept_and_pages_leave_again(lm, expected):
    with afresh(lm) as lower:
        for prompt in PROMPTS[:3]:
            lm(prompt, **HOW)
        assert kept_places(lm)
        failures = iter([RuntimeError("lost")])

        def fails_once(key):
            if key.kind == "forward" and (error := next(failures, None)):
                raise error

        with hooked(lm, fails_once):
            assert lm(PROMPTS[3], **HOW).tokens == expected[3]
        assert not kept_places(lm)
        assert [lm(prompt, **HOW).tokens for prompt in PROMPTS * 2] == expected * 2 and lower.returned


def test_a_swap_gives_back_what_the_old_weights_have_made(lm, expected):
    with afresh(lm, disk=0):
        for prompt in PROMPTS:
            lm(prompt, **HOW)
        assert lm.prefix_tiers.host.used > 0 and lm._engine.mover.host
        version = lm.swap(lm.params)
        assert lm.prefix_tiers.host.used == 0 and not lm._engine.mover.host
        output = lm(PROMPTS[0], **HOW)
        assert output.reused == 0 and output.tokens == expected[0] and output.version == version


def test_closing_waits_for_the_disk_and_leaves_nothing(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    with alone(tiny_path, prefix_host_memory=99 * PAGE, prefix_disk_memory=99 * PAGE) as lm:
        for prompt in ready(lm) and PROMPTS:
            lm(prompt, **HOW)
    assert lm._engine.mover._spill.file.closed and not lm._engine.mover.host
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > PAGE]


@pytest.mark.parametrize(("options", "error", "message"), [
    (dict(prefix_host_memory="lots"), InvalidOption, "prefix_host_memory is 'lots'; it must be a number of bytes"),
    (dict(prefix_host_memory=-1), InvalidOption, "prefix_host_memory is -1"),
    (dict(prefix_host_memory=True), InvalidOption, "prefix_host_memory is True"),
    (dict(prefix_disk_memory="1GiB"), InvalidOption, "come through the host's memory: give prefix_host_memory"),
    (dict(prefix_host_memory=1000), InvalidOption, "does not hold a page of each state group: give at least '1MiB'"),
    (dict(prefix_host_memory=2**50), OutOfMemory, "of which the host has"),
    (dict(prefix_host_memory="1MiB", prefix_disk_memory=2**60), OutOfMemory, "bytes of prefix pages are to lie in"),
])
def test_budgets_that_have_no_meaning_are_refused(tiny_path, options, error, message):
    with pytest.raises(error, match=message):
        alone(tiny_path, **options)
