"""The house rules: which room may import which, and what importing costs. DESIGN.md's "Rooms", as data."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# One room a line: its floor, and the modules or folders of `jaxinfer` that are in it.
ROOMS = [
    (0, {"alignment", "errors", "events", "home", "request"}),
    (1, {"graph"}),
    (2, {"kernels", "taps"}),
    (3, {"graphs"}),
    (4, {"frontend"}),
    (4, {"compiler"}),
    (4, {"scheduler"}),
    (5, {"runtime"}),
    (6, {"serving"}),
    (6, {"testing"}),
    (7, {"__init__", "cli", "progress"}),
]
FLOOR = {name: floor for floor, room in ROOMS for name in room}
ROOM = {name: number for number, (_, room) in enumerate(ROOMS) for name in room}
MODELS_MAY_IMPORT = {"jax", "numpy"} | sys.stdlib_module_names
MODELS_MAY_IMPORT_OF_US = {"graphs", "graph", "kernels", "taps"}
PRIVATE = "jax._src"
MOST_PUBLIC_NAMES = 15


# --- the checker: a tree of files in, sentences about what is wrong out ---


def modules(root: Path) -> dict[str, Path]:
    """Dotted names and files of `jaxinfer` under `root`; the folder `graphs` is installed as `jaxinfer.graphs`."""
    found = {}
    for folder, prefix in ((root / "jaxinfer", ("jaxinfer",)), (root / "graphs", ("jaxinfer", "graphs"))):
        for file in sorted(folder.rglob("*.py")):
            found[".".join(prefix + file.relative_to(folder).with_suffix("").parts)] = file
    return found


def imports(name: str, node: ast.AST, known: dict[str, Path]) -> list[tuple[str, int]]:
    """What a module imports anywhere under `node`, and where: dotted names, a package as its `__init__`."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [(alias.name, child.lineno) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = name.split(".")[: -child.level] if child.level else []
            source = ".".join(base + ([child.module] if child.module else []))
            for alias in child.names:
                inner = f"{source}.{alias.name}"
                is_module = inner in known or f"{inner}.__init__" in known or inner == PRIVATE
                found.append((inner if is_module else source, child.lineno))
    return [(f"{target}.__init__" if f"{target}.__init__" in known else target, line) for target, line in found]


def room_of(module: str) -> str | None:
    """The folder or file of `jaxinfer` that a dotted name is in; None for somebody else's."""
    parts = module.split(".")
    return None if parts[0] != "jaxinfer" else parts[1] if len(parts) > 1 else "__init__"


def runs_at_import(tree: ast.Module) -> ast.Module:
    """The module without what does not run when it is imported: bodies of functions, and `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            if "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = [ast.Pass()]
            return self.generic_visit(node)

    return Strip().visit(tree)


def violations(root: Path) -> list[str]:
    """Every import under `root` that the house forbids."""
    known, wrong, at_import = modules(root), [], {}
    private = set()
    for name, file in known.items():
        here, tree = room_of(name), ast.parse(file.read_text())
        if here not in FLOOR:
            wrong.append(f"{name} is in no room: give {here!r} a floor")
            continue
        for target, line in imports(name, tree, known):
            there, top = room_of(target), target.split(".")[0]
            if f"{target}.".startswith(f"{PRIVATE}."):
                private.add(name)
            if there is not None:
                if there not in FLOOR:
                    wrong.append(f"{name}:{line} imports {target}, which is in no room")
                elif ROOM[here] != ROOM[there] and FLOOR[there] >= FLOOR[here]:
                    wrong.append(f"{name}:{line} (floor {FLOOR[here]}) imports {target} (floor {FLOOR[there]})")
            if here == "graphs" and (there not in MODELS_MAY_IMPORT_OF_US if there else top not in MODELS_MAY_IMPORT):
                wrong.append(f"{name}:{line} is a model and imports {target}")
            if here == "scheduler" and top in ("jax", "jaxlib"):
                wrong.append(f"{name}:{line} decides about requests and imports {target}")
        private |= {name for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == PRIVATE}
        inside = {target for target, _ in imports(name, runs_at_import(tree), known)}
        at_import[name] = {t for t in inside if t != name and t in known and ROOM.get(room_of(t)) == ROOM[here]}
    if len(private) > 1:
        wrong.append(f"{PRIVATE} is used in {len(private)} files, one may: {sorted(private)}")
    try:
        TopologicalSorter(at_import).prepare()
    except CycleError as error:
        wrong.append("modules import each other in a circle: " + " <- ".join(error.args[1]))
    return wrong


# --- this house ---


def test_every_import_goes_down_or_stays_in_its_room():
    assert violations(ROOT) == []


def test_the_checker_has_seen_the_whole_house():
    seen = {room_of(name) for name in modules(ROOT)}
    assert {"errors", "graph", "kernels", "graphs", "frontend", "compiler", "scheduler", "runtime", "cli"} <= seen


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_jaxinfer_imports_no_jax():
    assert in_a_fresh_process("import sys, jaxinfer; print('jax' in sys.modules)") == "False"


def test_importing_the_whole_scheduler_imports_no_jax():
    names = [name.removesuffix(".__init__") for name in modules(ROOT) if name.startswith("jaxinfer.scheduler")]
    assert in_a_fresh_process(f"import sys, {', '.join(names)}; print('jax' in sys.modules)") == "False"


def test_the_public_names_are_few_and_all_there():
    import jaxinfer

    assert 0 < len(jaxinfer.__all__) <= MOST_PUBLIC_NAMES
    assert all(hasattr(jaxinfer, name) for name in jaxinfer.__all__)
    assert set(jaxinfer.__all__) <= set(dir(jaxinfer))


def test_every_folder_of_the_package_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name.rsplit(".", 1)[0] for name in modules(ROOT)}
    assert folders == set(packages)


# --- the checker on houses with one thing wrong ---

SOUND = {
    "jaxinfer/__init__.py": "from jaxinfer import errors",
    "jaxinfer/errors.py": "import os",
    "jaxinfer/graph.py": "import jax\nfrom jaxinfer.errors import Wrong",
    "jaxinfer/kernels/__init__.py": "from jaxinfer.kernels.dense import matmul\nfrom . import norm",
    "jaxinfer/kernels/dense.py": "import jax, jax._src.core\nfrom jaxinfer.graph import Run",
    "jaxinfer/kernels/norm.py": "from .dense import matmul\ndef late():\n    from jaxinfer.kernels import norm",
    "jaxinfer/scheduler/__init__.py": "from jaxinfer.errors import Wrong",
    "jaxinfer/cli.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jaxinfer",
    "graphs/__init__.py": "",
    "graphs/decoder.py": "import math, numpy, jax\nfrom jaxinfer.kernels import rms\nfrom jaxinfer.graphs import rope",
    "graphs/rope.py": "from __future__ import annotations",
}

KERNEL, PLAN, MODEL = "jaxinfer/kernels/dense.py", "jaxinfer/scheduler/__init__.py", "graphs/decoder.py"
PLANTED = {
    "import upwards": ("jaxinfer/graph.py", "from jaxinfer.kernels import matmul", "graph:1 (floor 1) imports"),
    "import in a function": ("jaxinfer/graph.py", "def f():\n    import jaxinfer.kernels.dense", "graph:2 (floor 1)"),
    "relative import": ("jaxinfer/graph.py", "from . import kernels", "imports jaxinfer.kernels.__init__ (floor 2)"),
    "relative import from a folder": (KERNEL, "from ..scheduler import plan", "imports jaxinfer.scheduler.__init__"),
    "import sideways": (PLAN, "import jaxinfer.compiler.cache", "(floor 4) imports jaxinfer.compiler.cache (floor 4)"),
    "import of the package": ("jaxinfer/errors.py", "import jaxinfer", "imports jaxinfer.__init__ (floor 7)"),
    "import of a public name": ("jaxinfer/errors.py", "from jaxinfer import load", "imports jaxinfer.__init__ (fl"),
    "module without a floor": ("jaxinfer/helpers.py", "", "jaxinfer.helpers is in no room"),
    "import from nowhere": ("jaxinfer/cli.py", "import jaxinfer.helpers", "jaxinfer.helpers, which is in no room"),
    "circle in a room": (KERNEL, "from jaxinfer.kernels import norm", "in a circle"),
    "circle through the folder": (KERNEL, "from jaxinfer.kernels import matmul", "in a circle"),
    "model that imports a library": (MODEL, "import flax.linen", "is a model and imports flax.linen"),
    "model that imports a low room": (MODEL, "import jaxinfer.errors", "is a model and imports jaxinfer.errors"),
    "model that imports a high room": (MODEL, "import jaxinfer.runtime", "is a model and imports jaxinfer.runtime"),
    "scheduler with arrays": (PLAN, "def f():\n    import jax.numpy", "decides about requests and imports jax.numpy"),
    "private JAX in a second file": ("jaxinfer/graph.py", "from jax._src import core", "in 2 files"),
    "private JAX by name": ("jaxinfer/graph.py", "from jax import _src", "in 2 files"),
    "private JAX by attribute": ("jaxinfer/graph.py", "import jax\njax._src.core.f()", "in 2 files"),
}


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_sound_house_passes(tmp_path):
    assert violations(build(tmp_path, SOUND)) == []


@pytest.mark.parametrize("what", PLANTED)
def test_the_checker_finds_the(what, tmp_path):
    file, text, message = PLANTED[what]
    wrong = violations(build(tmp_path, SOUND | {file: text}))
    assert any(message in sentence for sentence in wrong), wrong
