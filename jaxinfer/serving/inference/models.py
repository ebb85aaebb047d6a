"""Models as the protocol sees them: tensors with names in, tensors with names out, the batch as their first axis.

Axes: N rows of a tensor, each of them one request to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import jax
import numpy as np

from jaxinfer.compiler.functions import FunctionKey
from jaxinfer.errors import InvalidRequest
from jaxinfer.runtime.encoder import TextEncoder
from jaxinfer.runtime.endpoint import Endpoint
from jaxinfer.runtime.padded import BATCH
from jaxinfer.serving.inference.datatypes import BYTES, DTYPES, datatype_of, short

OPEN = -1  # a size that requests differ in
ONLY = "output"  # the name of a result that has none

Rows = list[np.ndarray]  # a tensor: its rows if the model batches, else itself alone


class Tensor(NamedTuple):
    """What goes in or comes out under one name."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.datatype}{list(self.shape)}"


class Face(Protocol):
    """What the protocol sees of one model."""

    platform: str
    batched: bool  # whether the first axis of all tensors is that of the batch

    @property
    def inputs(self) -> list[Tensor]: ...

    @property
    def outputs(self) -> list[Tensor]: ...

    def request(self, row: Mapping[str, np.ndarray]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call of the model. Raises InvalidRequest."""
        ...

    def result(self, found: Any) -> list[np.ndarray]:
        """What a call returned, as the outputs' arrays."""
        ...

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Raises InvalidRequest if a call failed by the sizes of its arrays."""
        ...


class EndpointFace:
    """A function's leaves and results by their paths in the pytrees; an ONNX file's by its own names and datatypes."""

    def __init__(self, endpoint: Endpoint):
        self.functions, self.graph = endpoint.functions, endpoint.graph
        self.batched = BATCH in endpoint.ladders
        self.platform = "jax" if self.graph is None else "onnx"

    @cached_property
    def inputs(self) -> list[Tensor]:
        batch, leaves = (OPEN,) * self.batched, {leaf.path: leaf for leaf in self.functions.leaves}
        order = leaves if self.graph is None else [name for name in self.graph.inputs if name in leaves]
        dtypes = {name: (leaves if self.graph is None else self.graph.inputs)[name].dtype for name in order}
        return [Tensor(name, datatype_of(name, dtypes[name]), batch + _open(leaves[name].shape)) for name in order]

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The first look traces the function, at two sizes of each axis that requests differ in: what differs between
        them is open."""
        if self.graph is not None:
            return [self._declared_output(name, like) for name, like in self.graph.outputs.items()]
        key = self.functions.checked
        assert key is not None  # every function is checked before it is served
        found, others = self._shapes(key), [self._shapes(other) for other in _around(key)]
        tensors = []
        for i, (name, like) in enumerate(found):
            differs = [any(other is None or other[i][1].shape[axis] != size for other in others)
                       for axis, size in enumerate(like.shape)]
            shape = [OPEN if open else size for open, size in zip(differs, like.shape, strict=True)]
            if self.batched:
                del shape[self.functions.out_batch]
                shape.insert(0, OPEN)
            tensors.append(Tensor(name, datatype_of(name, like.dtype), tuple(shape)))
        return tensors

    def request(self, row: Mapping[str, np.ndarray]) -> tuple[tuple, dict[str, Any]]:
        return jax.tree.unflatten(self.functions.structure, [row[leaf.path] for leaf in self.functions.leaves])

    def result(self, found: Any) -> list[np.ndarray]:
        """Integers of 64 bits are such again, where JAX counted in 32."""
        if self.graph is None:
            return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]
        return [np.asarray(found[tensor.name]).astype(DTYPES[tensor.datatype], copy=False) for tensor in self.outputs]

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        sizes = {dim: size for leaf in self.functions.leaves
                 for dim, size in zip(leaf.shape, row[leaf.path].shape, strict=True) if isinstance(dim, str)}
        try:
            self.functions.outputs(FunctionKey(1 if self.batched else None, tuple(sorted(sizes.items()))))
        except Exception as error:
            told = ", ".join(f"{leaf.path} {list(row[leaf.path].shape)}" for leaf in self.functions.leaves)
            raise InvalidRequest(f"the model does not take these sizes together: {told}: {error}") from error

    def _shapes(self, key: FunctionKey) -> Any:
        """Names, shapes and dtypes of what the function returns; None if it refuses such sizes."""
        try:
            found = jax.tree.leaves_with_path(self.functions.outputs(key))
        except Exception:
            return None
        return [(jax.tree_util.keystr(path, simple=True, separator=".") or ONLY, like) for path, like in found]

    def _declared_output(self, name: str, like: Any) -> Tensor:
        if like.kind != "tensor":
            raise InvalidRequest(f"output {name} is a {like.kind}, for which the Open Inference Protocol has no "
                                 "datatype")
        return Tensor(name, datatype_of(name, like.dtype), (OPEN,) if like.shape is None else _open(like.shape))


class TextFace:
    """An encoder of texts: a vector for each, and the logits of its classes if it has some."""

    platform, batched = "jax", True

    def __init__(self, encoder: TextEncoder):
        graph = encoder.graph
        self.inputs = [Tensor("text", BYTES, (OPEN,))]
        self.outputs = [Tensor("vector", "FP32", (OPEN, graph.width))]
        self.has_logits = graph.head is not None
        if self.has_logits:
            per_token = (OPEN,) * graph.head_per_token
            self.outputs.append(Tensor("logits", "FP32", (OPEN, *per_token, len(graph.labels) or OPEN)))

    def request(self, row: Mapping[str, np.ndarray]) -> tuple[tuple, dict[str, Any]]:
        text: Any = row["text"][()]
        try:
            return (text.decode(),), {}
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"text is no UTF-8: {error}") from error

    def result(self, found: Any) -> list[np.ndarray]:
        return [found.vector, found.logits] if self.has_logits else [found.vector]

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """No text has a size that is too much for the encoder alone."""


_faces: WeakKeyDictionary[Any, Face] = WeakKeyDictionary()


def face_of(name: str, model: Any) -> Face:
    """Raises InvalidRequest for a model that other protocols are for."""
    if model not in _faces:
        kinds = {Endpoint: EndpointFace, TextEncoder: TextFace}
        kind = next((face for kind, face in kinds.items() if isinstance(model, kind)), None)
        if kind is None:
            raise InvalidRequest(f"{name} is a {type(model).__name__}; the Open Inference Protocol is for endpoints, "
                                 "ONNX models and encoders")
        _faces[model] = kind(model)
    return _faces[model]


def requests_of(face: Face, arrays: Mapping[str, np.ndarray], most: int) -> list[tuple[tuple, dict[str, Any]]]:
    """The calls of the model that answer a request for these tensors: one for each row. Raises InvalidRequest."""
    names = [tensor.name for tensor in face.inputs]
    for what, wrong in (("unknown", arrays.keys() - names), ("missing", set(names) - arrays.keys())):
        if wrong:
            raise InvalidRequest(f"inputs are {what}: {short(sorted(wrong))}; there are "
                                 f"{', '.join(map(str, face.inputs))}")
    for tensor in face.inputs:
        array = arrays[tensor.name]
        if (array.dtype.kind == "O") != (tensor.datatype == BYTES) or array.ndim != len(tensor.shape):
            raise InvalidRequest(f"input {tensor.name} is {datatype_of(tensor.name, array.dtype)}{list(array.shape)}; "
                                 f"it must be {tensor.datatype}{list(tensor.shape)}")
    if not face.batched:
        return [face.request(arrays)]
    rows = {len(array) for array in arrays.values()}
    if len(rows) > 1 or not 1 <= max(rows) <= most:
        told = ", ".join(f"{name} {array.shape[0]}" for name, array in arrays.items())
        raise InvalidRequest(f"the inputs' first axis is that of the batch, and is long: {told}; it must be 1 to "
                             f"{most}, the same for all")
    return [face.request({name: array[n, ...] for name, array in arrays.items()}) for n in range(max(rows))]


def columns_of(face: Face, results: Sequence[Any]) -> dict[str, Rows]:
    """Each output's rows."""
    columns = zip(*map(face.result, results), strict=True)
    return dict(zip([tensor.name for tensor in face.outputs], map(list, columns), strict=True))


def _open(shape: Sequence[Any]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else OPEN for size in shape)


def _around(key: FunctionKey) -> list[FunctionKey]:
    """The same with another size of one axis, for each axis that has a name."""
    return [FunctionKey(key.rows, (*key.sizes[:i], (name, size + max(1, size)), *key.sizes[i + 1:]))
            for i, (name, size) in enumerate(key.sizes)]
