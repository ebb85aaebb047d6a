"""An ONNX file as a Graph without state: parameters, and a pure function from them and the inputs to the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from google.protobuf.message import DecodeError

from jaxinfer.errors import CorruptFile, InvalidRequest, ModelNotFound, UnsupportedModel
from jaxinfer.frontend.onnx.block import Block
from jaxinfer.frontend.onnx.fold import fold
from jaxinfer.frontend.onnx.parse import SMALL, Builder
from jaxinfer.frontend.onnx.run import run_block
from jaxinfer.frontend.onnx.shaping import branching, shaping
from jaxinfer.frontend.onnx.tensors import element_type
from jaxinfer.frontend.onnx.values import Value, floating

OVERRIDABLE_SINCE = 4  # IR version; before, every initializer had to be listed among the inputs


@dataclass(frozen=True)
class Input:
    """What a graph takes or gives under one name.

    `shape` has an integer, a symbolic name or None for each axis; it is None where the file says nothing. `shaping`
    says that the values decide shapes: such an input stays a numpy array outside of `jax.jit`'s arguments. `branching`
    says that they decide which branch of an `If` is taken: traced, both branches must give the same shapes.
    """

    shape: tuple[int | str | None, ...] | None
    dtype: np.dtype
    optional: bool = False
    shaping: bool = False
    branching: bool = False
    kind: str = "tensor"  # or "sequence", "optional"


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A model from an ONNX file. `apply(params, inputs)` is pure: jit, vmap and differentiate it.

    `params` holds the floating-point weights and every large table; what decides shapes stays inside as constants.
    `nodes` counts the file's nodes, subgraphs included, and `folded` those that were computed at load time.
    """

    name: str
    opset: int
    inputs: dict[str, Input]
    outputs: dict[str, Input]
    params: dict[str, np.ndarray] = field(repr=False)
    nodes: int
    folded: int
    block: Block = field(repr=False)

    def apply(self, params: Mapping[str, Value], inputs: Mapping[str, Value]) -> dict[str, Value]:
        """All outputs by name. Integers, booleans and strings given as numpy arrays stay known while JAX traces.

        Raises InvalidRequest for a missing or unknown input, UnsupportedModel where a traced value decides a shape.
        """
        missing = [name for name, it in self.inputs.items() if name not in inputs and not it.optional]
        surplus = sorted(inputs.keys() - self.inputs.keys())
        if missing or surplus:
            problem = f"misses {', '.join(missing)}" if missing else f"does not take {', '.join(surplus)}"
            raise InvalidRequest(f"{self.name} {problem}; its inputs are {', '.join(self.inputs)}")
        scope = {name: _array(value) for name, value in params.items()}
        scope |= {name: value if self.inputs[name].shaping else _moving(value) for name, value in inputs.items()}
        return dict(zip(self.outputs, run_block(self.block, scope), strict=True))


def load_onnx(path: str | Path) -> OnnxGraph:
    """Read an ONNX file; weights in external data files are mapped, not read.

    Raises ModelNotFound, CorruptFile, or UnsupportedModel with every operator that this package lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFound(f"{path}: there is no such file")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CorruptFile(f"{path}: not an ONNX file: {error}") from error
    return from_proto(model, path)


def from_proto(model: onnx.ModelProto, path: Path) -> OnnxGraph:
    """As `load_onnx`, for a message in memory; `path` names it, and its folder holds the external data."""
    if not model.graph.output:
        raise CorruptFile(f"{path}: not an ONNX model: the graph has no outputs")
    builder = Builder(path, model)
    block = builder.main(model.graph)
    given = _inputs(model, block.constants)
    needed, branches = shaping(block), branching(block)
    defaults = {name for name, it in given.items() if it.optional}
    params = {name: value for name, value in block.constants.items()
              if name in defaults or _weight(name, value, needed)}
    rest = {name: value for name, value in block.constants.items() if name not in params}
    block, folded = fold(replace(block, inputs=(), constants=rest))
    inputs = {name: replace(it, shaping=name in needed, branching=name in branches) for name, it in given.items()}
    outputs = {value.name: _described(value) for value in model.graph.output}
    strings = {name: params.pop(name) for name in [*params] if params[name].dtype == object}
    return OnnxGraph(model.graph.name or path.stem, builder.opsets.get("", 0), inputs, outputs, params,
                     _count(model.graph), folded, replace(block, constants=block.constants | strings))


def _weight(name: str, value: np.ndarray, needed: set[str]) -> bool:
    """Whether a constant is a parameter: any float, any large table, but not what decides a shape, nor strings."""
    if value.dtype == object or (name in needed and value.size <= SMALL):
        return False
    return floating(value) or value.size > SMALL


def _inputs(model: onnx.ModelProto, constants: Mapping[str, np.ndarray]) -> dict[str, Input]:
    """An input with an initializer is optional; in old files it is none, as every initializer is listed."""
    fresh = [value for value in model.graph.input if value.name not in constants]
    if model.ir_version < OVERRIDABLE_SINCE:
        return {value.name: _described(value) for value in fresh}
    return {value.name: replace(_described(value), optional=value.name in constants) for value in model.graph.input}


def _described(value: onnx.ValueInfoProto) -> Input:
    kind, described = "tensor", value.type
    while (which := described.WhichOneof("value")) in ("sequence_type", "optional_type"):
        kind = which.removesuffix("_type") if kind == "tensor" else kind
        described = getattr(described, which).elem_type
    if which not in ("tensor_type", "sparse_tensor_type", None):
        raise UnsupportedModel(f"{value.name!r} is a {which}, which is not supported")
    tensor = described.tensor_type if which != "sparse_tensor_type" else described.sparse_tensor_type
    dtype = element_type(tensor.elem_type) if tensor.elem_type else np.dtype(np.float32)
    if not tensor.HasField("shape"):
        return Input(None, dtype, kind=kind)
    return Input(tuple(_size(dimension) for dimension in tensor.shape.dim), dtype, kind=kind)


def _size(dimension: onnx.TensorShapeProto.Dimension) -> int | str | None:
    which = dimension.WhichOneof("value")
    size = getattr(dimension, which) if which else None
    return None if isinstance(size, int) and size < 0 else size or (0 if size == 0 else None)


def _count(graph: onnx.GraphProto) -> int:
    inner = (a.g for node in graph.node for a in node.attribute if a.HasField("g"))
    return len(graph.node) + sum(map(_count, inner))


def _array(value: Value) -> Value:
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _moving(value: Value) -> Value:
    """A float input as JAX's array: numpy would compute with it on the host. Lists and None are what they are."""
    return _array(value) if isinstance(value, np.ndarray) and floating(value) else value
