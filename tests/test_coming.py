"""Requests are served as soon as the smallest programs are there; the others come meanwhile."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.compiler import Key
from jaxinfer.errors import Closed
from tests.running import eventually

pytestmark = pytest.mark.usefixtures("in_haste")

X = np.zeros(3, np.float32)


@contextmanager
def held(programs, those):
    """Until the block ends, or `go` is set, no program of `those` keys is compiled. Yields `go`, and what was begun."""
    go, begun, lower = threading.Event(), [], programs.lower

    def slow(key):
        begun.append(key)
        if those(key):
            go.wait(60)
        return lower(key)

    programs.lower = slow
    try:
        yield go, begun
    finally:
        go.set()


@pytest.fixture
def lm(tiny_path):
    with ji.load(tiny_path, max_context=64, max_rows=2) as lm:
        yield lm


def test_a_model_draws_while_the_rest_of_its_programs_come(lm):
    executables = lm._engine.executables
    least = {*executables.least, Key("copy")}  # `load` has begun with that
    with held(executables, lambda key: key not in least) as (go, begun):
        lm.warmup(background=True)
        coming = lm.coming
        assert len(least) - 1 <= coming.ready <= len(least) and coming.total == len(executables.keys)
        assert lm("ab", max_tokens=3, ignore_eos=True).finish_reason == "length"
        assert lm("ab", max_tokens=3, temperature=1.0, ignore_eos=True).finish_reason == "length"
        assert eventually(lambda: set(begun) - least) and coming.ended is None
        go.set()
        assert eventually(lambda: coming.ended) and coming.ready == coming.total and not coming.failed
    assert all(executables.is_ready(key) for key in executables.keys)
    assert lm.startup["warm-up in the background"].busy > 0


def test_what_a_request_wants_goes_in_between(lm):
    executables = lm._engine.executables
    with held(executables, lambda key: key.kind == "history") as (go, begun):
        lm.warmup(background=True)
        assert eventually(lambda: any(key.kind == "history" for key in begun))
        answers = [lm.submit("ab", max_tokens=2, ignore_eos=True, **how) for how in ({}, {"presence_penalty": 0.5})]
        go.set()
        assert [len(answer.result(60).tokens) for answer in answers] == [2, 2]
        assert lm.coming.ready < lm.coming.total, "it waited for all the others"


def test_a_program_that_cannot_be_compiled_is_told_of_and_the_others_come(capfd):
    with ji.endpoint(lambda x: x + 1, example=X, max_batch=8) as f:
        lower = f.functions.lower

        def broken(key):
            if key.rows == 2:
                raise RuntimeError("too wide")
            return lower(key)

        f.functions.lower = broken
        f.warmup(background=True)
        assert eventually(lambda: f.coming.ended)
        assert f.coming.failed == {"apply[B=2]": "RuntimeError: too wide"}
        assert (f.coming.ready, f.coming.total) == (3, 4)
        assert f(X).tolist() == [1, 1, 1]
    assert "too wide" in capfd.readouterr().err


def test_closing_ends_what_is_coming(tiny_path):
    lm = ji.load(tiny_path, max_context=64, max_rows=2)
    executables = lm._engine.executables
    with held(executables, lambda key: key.kind == "history") as (go, begun):
        lm.warmup(background=True)
        assert eventually(lambda: any(key.kind == "history" for key in begun))
        closing = threading.Thread(target=lm.close)
        closing.start()
        assert eventually(lambda: lm._engine.closed)
        go.set()
        closing.join(30)
    assert eventually(lambda: lm.coming.ended) and lm.coming.ready < lm.coming.total and not lm.coming.failed
    with pytest.raises(Closed):
        lm.warmup(background=True)
