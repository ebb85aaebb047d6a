"""`inspect`: what became of a function on its way to the device, in numbers, as a table and as a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import jax

from jaxinfer.compiler import hlo
from jaxinfer.compiler.picture import picture
from jaxinfer.errors import InvalidRequest

# Equations that only hold a jaxpr, which runs where they stand.
WRAPPERS = frozenset({"pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
                      "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"})


@dataclass(frozen=True)
class Inspection:
    """What graph optimisation did to a function of one shape.

    `nodes` are those of the file it came from (None: there is no file). `equations` are primitive operations of its
    jaxpr, inner ones included. `ops` maps an HLO opcode to its count before and after optimisation; `kernels` is what
    is launched, by kind: a fusion is one. `folded` operations depended on constants alone. `flops` and `bytes_accessed`
    are the compiler's own estimate for one call (None: it gives none). Sizes are in bytes; `donated` ones are of
    arguments whose memory the outputs take. `compile_seconds` are few where JAX's cache on disk holds the program.
    """

    name: str
    platform: str
    nodes: int | None
    equations: int
    ops: Mapping[str, tuple[int, int]]
    kernels: Mapping[str, int]
    folded: int
    flops: float | None
    bytes_accessed: float | None
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    donated_bytes: int
    code_bytes: int
    compile_seconds: float

    @property
    def before(self) -> int:
        """HLO operations before optimisation."""
        return sum(before for before, _ in self.ops.values())

    @property
    def after(self) -> int:
        """HLO operations after it, those inside fusions included; fusing may repeat cheap ones."""
        return sum(after for _, after in self.ops.values())

    @property
    def peak_bytes(self) -> int:
        """Memory while it runs: arguments, outputs and temporaries."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes - self.donated_bytes

    def rows(self) -> list[tuple[str, str]]:
        """The table: what, and how much."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kernels.items())
        return [
            *([("nodes in the file", f"{self.nodes:,}")] if self.nodes is not None else []),
            ("equations in the jaxpr", f"{self.equations:,}"),
            ("HLO operations before", f"{self.before:,}"),
            ("HLO operations after", f"{self.after:,}"),
            ("kernels after fusion", f"{sum(self.kernels.values()):,}" + (f" ({kinds})" if kinds else "")),
            ("of constants, folded", f"{self.folded:,}"),
            ("FLOPs", amount(self.flops, "")),
            ("bytes accessed", amount(self.bytes_accessed, "B")),
            ("peak memory", f"{amount(self.peak_bytes, 'B')} (arguments {amount(self.argument_bytes, 'B')}, outputs "
                            f"{amount(self.output_bytes, 'B')}, temporaries {amount(self.temporary_bytes, 'B')})"),
            ("generated code", amount(self.code_bytes, "B")),
            ("compile time", f"{self.compile_seconds:.2f} s"),
        ]

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows())
        lines = [f"{what:<{width}}  {value}" for what, value in self.rows()]
        changed = sorted(self.ops.items(), key=lambda item: -max(item[1]))
        counts = "  ".join(f"{op} {before}→{after}" for op, (before, after) in changed)
        return "\n".join([f"{self.name} on {self.platform}", *lines, f"{'operations':<{width}}  {counts}"])

    def _repr_html_(self) -> str:
        line = lambda what, value: f"<tr><th>{escape(what)}</th><td>{escape(value)}</td></tr>"
        head = f"<tr><th colspan=2>{escape(f'{self.name} on {self.platform}')}</th></tr>"
        return f"<table>{head}{''.join(line(*row) for row in self.rows())}</table>{self.svg()}"

    def svg(self) -> str:
        """The picture: operations before and after, and FLOPs over bytes."""
        return picture(self.name, self.ops, self.flops, self.bytes_accessed)

    def save(self, path: str | Path) -> Path:
        """Write the picture to `path`, an .svg file."""
        path = Path(path)
        path.write_text(self.svg(), encoding="utf-8")
        return path


def inspect(fn: Any, *args: Any, **kwargs: Any) -> Inspection:
    """Compile `fn` for `args` and tell what became of it. Nothing runs.

    `fn` is any function that `jax.jit` takes, jitted already or not; an Endpoint, whose function takes batches; or an
    object with `apply(params, *args)` and `params`, such as an ONNX graph, which may say how many `nodes` its file has
    and how many were `folded` when it was read. `args` are pytrees of arrays or of `jax.ShapeDtypeStruct`s, or of
    anything else that `fn` takes. Raises InvalidRequest where `fn` is nothing of the kind.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    >>> report = inspect(lambda x: x @ x.T * 1.0, x)
    >>> report.flops >= 2 * 64 * 64 * 32, report.ops["multiply"], report.ops["dot"]
    (True, (1, 0), (1, 1))
    """
    function, args = _function(fn, args)
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    traced = jitted.trace(*args, **kwargs)
    lowered = traced.lower()
    before = hlo.stablehlo_ops(lowered.compiler_ir(dialect="stablehlo"))
    unoptimised = hlo.parse(lowered.compiler_ir(dialect="hlo").as_hlo_text())
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    after = hlo.parse(compiled.as_text() or "")
    cost, memory = _cost(compiled), compiled.memory_analysis()
    size = lambda what: int(getattr(memory, f"{what}_size_in_bytes", 0) or 0)
    names = sorted(before | after.ops, key=lambda op: (-before[op], op))
    return Inspection(
        name=_name(fn),
        platform=str(_platform(compiled)),
        nodes=_count(getattr(_graph(fn), "nodes", None)),
        equations=equations(traced.jaxpr),
        ops={op: (before[op], after.ops[op]) for op in names},
        kernels=dict(after.kernels.most_common()),
        folded=unoptimised.constant + (_count(getattr(_graph(fn), "folded", None)) or 0),
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        argument_bytes=size("argument"),
        output_bytes=size("output"),
        temporary_bytes=size("temp"),
        donated_bytes=size("alias"),
        code_bytes=size("generated_code"),
        compile_seconds=seconds,
    )


def equations(jaxpr: Any) -> int:
    """The primitive operations of a jaxpr. One with a body (a loop, a branch) counts, and so does its body, once; of
    a call only the body counts."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a ClosedJaxpr
    return sum((eqn.primitive.name not in WRAPPERS) + sum(map(equations, _bodies(eqn.params.values())))
               for eqn in jaxpr.eqns)


def _bodies(values: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation, or within tuples of them."""
    flat = [inner for value in values for inner in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in flat if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")]


def _graph(fn: Any) -> Any:
    """The graph that an endpoint of an ONNX file serves, or `fn` itself."""
    return getattr(fn, "graph", None) or fn


def _function(fn: Any, args: tuple[Any, ...]) -> tuple[Callable, tuple[Any, ...]]:
    """What to trace: a model's params are its first argument, so that they count as memory and not as constants."""
    apply = getattr(_graph(fn), "apply", None) or getattr(fn, "apply", None)
    if callable(apply) and hasattr(fn, "params"):
        return apply, (fn.params, *args)
    if hasattr(fn, "params"):
        raise InvalidRequest(f"inspect got a {type(fn).__name__}, which has params and no function `apply`; give it a "
                             "function of its graph, and the params: inspect(model.graph.hidden, model.params, run)")
    if callable(fn):
        return fn, args
    raise InvalidRequest(f"inspect got a {type(fn).__name__}; expected a function, or an object with `apply` and "
                         "`params`")


def _cost(compiled: Any) -> dict[str, float]:
    """The compiler's estimates; what it does not know it leaves out, or gives as a negative number."""
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return {key: float(value) for key, value in cost.items() if value >= 0}


def _platform(compiled: Any) -> str:
    devices = {device for sharding in jax.tree.leaves(compiled.input_shardings) for device in sharding.device_set}
    return next((device.platform for device in devices), jax.default_backend())


def _name(fn: Any) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    return str(getattr(fn, "__name__", None) or getattr(fn, "name", None) or type(fn).__name__)


def _count(value: Any) -> int | None:
    """A number, or how many there are in a collection."""
    return len(value) if hasattr(value, "__len__") else value if isinstance(value, int) else None


def amount(value: float | None, unit: str) -> str:
    """A number to three digits in powers of a thousand.

    >>> amount(12_345_678, "B"), amount(12, "B"), amount(None, "B")
    ('12.3 MB', '12 B', 'unknown')
    """
    if value is None:
        return "unknown"
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or prefix == "T":
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    raise AssertionError
