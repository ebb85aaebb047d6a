"""A fingerprint changes with whatever could change a program, and with nothing else."""

import dataclasses
import enum
import functools
import importlib.util
import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxinfer.compiler.fingerprint import LARGEST_ARRAY, Unknown, digest_of, fingerprint, package_source

MODULE = """
import functools, math
import jax, jax.numpy as jnp
import numpy as np
{imports}
SCALE = {scale}
TABLE = np.array([1, {entry}])

def helper(x):
    return x * {factor}

class Widen:
    def __init__(self, by): self.by = by
    def __call__(self, x): return x * self.by + {inner}

def deep(x, y={default}):
    def inner(x): return x + {constant}
    return jax.nn.silu(helper(inner(x))) * SCALE + y + TABLE[0] + math.pi

def made(by):
    def closure(x): return deep(x) + by
    return closure

wide, bound = Widen({by}), Widen({by}).__call__
jitted, partly = jax.jit(helper), functools.partial(deep, y={given})
{rest}
"""
SAME = dict(imports="", scale=2.0, entry=2, factor=3, inner=1, default=0, constant=5, by=7, given=1, rest="")
WHERE = {  # which functions of the module each change reaches
    "scale": {"deep", "made", "partly"}, "entry": {"deep", "made", "partly"},
    "factor": {"deep", "made", "partly", "jitted"},
    "inner": {"wide", "bound"}, "default": {"deep", "made", "partly"}, "constant": {"deep", "made", "partly"},
    "by": {"wide", "bound"}, "given": {"partly"},
}
FUNCTIONS = {"deep": lambda m: m.deep, "made": lambda m: m.made(3), "wide": lambda m: m.wide,
             "bound": lambda m: m.bound, "jitted": lambda m: m.jitted, "partly": lambda m: m.partly}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of a user's from MODULE with some values changed; all have the same name and file."""
    def make(file_says=None, **changed):
        file = tmp_path / "mine.py"
        file.write_text(MODULE.format(**SAME | changed))
        spec = importlib.util.spec_from_file_location("mine", file)
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "mine", made)
        exec(compile(file.read_text(), file, "exec"), made.__dict__)
        if file_says is not None:
            file.write_text(file_says)
        return made
    return make


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_users_function_is_the_same_in_another_process(name, module):
    of = lambda **how: fingerprint(FUNCTIONS[name](module(**how)))
    assert of() == of()
    assert of(file_says="x") != of(file_says="y"), "the file it stands in"


@pytest.mark.parametrize("change", WHERE)
def test_what_a_users_function_refers_to_counts_even_if_its_file_does_not_say_so(change, module):
    """The file is made equal: only code and values can tell."""
    for name, get in FUNCTIONS.items():
        was = fingerprint(get(module(file_says="equal")))
        now = fingerprint(get(module(file_says="equal", **{change: SAME[change] + 1})))
        assert (was != now) == (name in WHERE[change]), name


def test_a_value_that_is_changed_while_the_process_runs_counts(module):
    mine = module()
    was = fingerprint(mine.deep), fingerprint(mine.wide), fingerprint(mine.made(1))
    mine.SCALE, mine.wide.by = 99.0, 99
    assert not {fingerprint(mine.deep), fingerprint(mine.wide), fingerprint(mine.made(2))} & set(was)


def test_a_module_of_the_users_is_what_is_used_of_it(tmp_path, monkeypatch):
    (tmp_path / "helpers_of_mine.py").write_text("A = 1\nB = 1\n")
    (tmp_path / "user_of_helpers.py").write_text("import helpers_of_mine\ndef f(x): return x + helpers_of_mine.A\n")
    monkeypatch.syspath_prepend(tmp_path)
    import user_of_helpers

    was = fingerprint(user_of_helpers.f)
    user_of_helpers.helpers_of_mine.B = 2
    assert fingerprint(user_of_helpers.f) == was
    user_of_helpers.helpers_of_mine.A = 2
    assert fingerprint(user_of_helpers.f) != was


UNTOLD = {
    "an array on a device": "X = jnp.ones(3)\ndef f(x): return x + X",
    "which a function refers to": f"X = np.ones({LARGEST_ARRAY // 8 + 1})\ndef f(x): return x + X",
    "imports something": "def f(x):\n    import mine\n    return mine.helper(x)",
    "_thread.lock": "import threading\nX = threading.Lock()\ndef f(x): return x if X else x",
    "a method of a built-in": "X = [1].append\ndef f(x): return X(x)",
    "by its address": "X = jax.tree.structure({'a': 1}, is_leaf=lambda x: True)\n"
                      "class N: pass\n"
                      "jax.tree_util.register_pytree_node(N, lambda n: ((), object()), lambda a, c: N())\n"
                      "X = jax.tree.structure(N())\ndef f(x): return X",
}


@pytest.mark.parametrize("why", UNTOLD)
def test_what_cannot_be_told_is_refused(why, module):
    with pytest.raises(Unknown, match=why):
        fingerprint(module(rest=UNTOLD[why]).f)


def test_a_function_without_a_file_is_refused():
    space = {"__name__": "a_notebook"}
    exec("f = lambda x: x + 1", space)
    with pytest.raises(Unknown, match="a_notebook, which has no source file"):
        fingerprint(space["f"])
    said = subprocess.run([sys.executable, "-c", "from jaxinfer.compiler.fingerprint import *\n"
                           "try: fingerprint(lambda x: x)\nexcept Unknown as why: print(why)"],
                          env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert "__main__, which has no source file" in said.stdout, said


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Point:
    x: object
    y: object = 0


class Pair(NamedTuple):
    x: object
    y: object = 0


@functools.wraps(jnp.sum)
def disguised(x, by=1):
    return x * by


@functools.wraps(jnp.sum)
def disguised_otherwise(x, by=2):
    return x * by


DIFFERENT = [
    (1, 1.0, True, "1", b"1", None, ..., 1j, -0.0, 0.0, float("nan")),
    ((1, 2), [1, 2], (12,), ((1,), 2), (1, (2,)), {1: 2}, {1, 2}, Pair(1, 2), Point(1, 2), Point(2, 1)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1}),
    (Colour.RED, Colour.BLUE, Colour), (Point, Pair, np.float32, jnp.float32),
    (np.dtype("f4"), np.dtype("f2"), np.dtype(">f4"), np.dtype([("a", "f4")]), jnp.dtype("bfloat16")),
    (np.zeros(3), np.zeros((3, 1)), np.zeros(3, "f4"), np.array([0, 0, 1.0]), np.float64(0)),
    (jax.ShapeDtypeStruct((2,), "f4"), jax.ShapeDtypeStruct((2, 1), "f4"), jax.ShapeDtypeStruct((2,), "f2"),
     jax.ShapeDtypeStruct((2,), "f4", weak_type=True),
     jax.ShapeDtypeStruct((2,), "f4", sharding=SingleDeviceSharding(jax.devices()[0]))),
    (jax.nn.silu, jax.nn.relu, jax.nn.gelu, partial(jax.nn.gelu, approximate=True), jnp.sum, jnp.add, np.add, np.sum),
    (disguised, disguised_otherwise, jnp.sum), (sys.exit, os.listdir, len, print, os, sys),
    (jax.tree.structure((1, 2)), jax.tree.structure([1, 2])),
]


@pytest.mark.parametrize("i", range(len(DIFFERENT)))
def test_different_values_differ(i):
    assert len({fingerprint(value) for value in DIFFERENT[i]}) == len(DIFFERENT[i])
    assert len({fingerprint((value, 1)) for value in DIFFERENT[i]}) == len(DIFFERENT[i])


def test_equal_values_are_equal_however_they_are_shared_and_in_every_process():
    shared = Point(1, (2.0, "x"))
    assert fingerprint([shared, shared]) == fingerprint([Point(1, (2.0, "x")), Point(1, (2.0, "x"))])
    assert fingerprint({"b", "a"}, frozenset({1, 2})) == fingerprint({"a", "b"}, frozenset({2, 1}))
    code = ("from jaxinfer.compiler.fingerprint import *; import jax, jax.numpy as jnp\n"
            "print(fingerprint({'aa', 'b', 'c'}, jax.nn.silu, jnp.float32, {'k': (1, 2.5)}))")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONHASHSEED": "1"}).stdout
    assert said == fingerprint({"aa", "b", "c"}, jax.nn.silu, jnp.float32, {"k": (1, 2.5)}) + "\n"


def test_a_circle_has_an_end():
    a, b = [1], [1]
    a.append(a)
    b.append(b)
    assert fingerprint(a) == fingerprint(b) != fingerprint([1, 1])


def test_our_source_is_code_and_tuning_data_wherever_it_lies(tmp_path):
    (tmp_path / "kernels").mkdir()
    code, data = tmp_path / "graph.py", tmp_path / "kernels" / "tuned.json"
    seen = set()
    for act in (lambda: code.write_text("a"), lambda: code.write_text("b"), lambda: data.write_text("{}"),
                lambda: data.write_text("[]"), lambda: data.rename(tmp_path / "tuned.json"),
                lambda: (tmp_path / "new.py").write_text("")):
        act()
        assert digest_of(tmp_path) not in seen
        seen.add(digest_of(tmp_path))
    (tmp_path / "notes.txt").write_text("no code")
    assert digest_of(tmp_path) in seen and package_source() not in seen


def test_a_devices_own_memory_is_the_same_where_it_has_no_name(monkeypatch):
    """A device that is not here names none: what is compiled for it ahead must be found by the one that is."""
    device = jax.devices()[0]
    here = fingerprint(SingleDeviceSharding(device))
    others = {memory.kind for memory in device.addressable_memories()} - {device.default_memory().kind}
    assert others and here not in {fingerprint(SingleDeviceSharding(device, memory_kind=kind)) for kind in others}
    monkeypatch.setattr(SingleDeviceSharding, "memory_kind", None)
    assert fingerprint(SingleDeviceSharding(device)) == here
