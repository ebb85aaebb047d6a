"""The protocol's messages over HTTP: JSON, and behind it the bytes of tensors (the binary tensor data extension)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.errors import InvalidRequest
from jaxinfer.serving.inference.datatypes import from_bytes, from_json, short, to_buffer, to_json
from jaxinfer.serving.inference.question import Answer, Question, Wanted, options_of, place
from jaxinfer.serving.inference.regions import PARAMETERS, Regions, memory_of

SMALL = 2**16  # bytes: pieces that are copied together, which costs less than to send each by itself
FIELDS = {"a request": {"id", "parameters", "inputs", "outputs"},
          "an input": {"name", "shape", "datatype", "parameters", "data"}, "an output": {"name", "parameters"}}
KNOWN = {"an input": {"binary_data_size", *PARAMETERS}, "an output": {"binary_data", *PARAMETERS}}


def read(model: str, version: str, body: memoryview, header: int | None, regions: Regions | None) -> Question:
    """A request: JSON in the first `header` bytes of the body (None: in all of it), and tensors' bytes behind it, one
    after the other, to the end. Raises InvalidRequest."""
    if header is not None and header > len(body):
        raise InvalidRequest(f"Inference-Header-Content-Length is {header}, and the body has {len(body)} bytes")
    said = _object("a request", _json(bytes(body[:header])))
    rest = _Rest(body[header:] if header is not None else body[:0])
    parameters = _parameters("a request", said)
    arrays: dict[str, np.ndarray] = {}
    copied = 0
    for one in _list(said, "inputs"):
        tensor = _object("an input", one)
        name = _name("an input", tensor)
        if name in arrays:
            raise InvalidRequest(f"input {name} is given twice")
        arrays[name] = _array(f"input {name}", tensor, rest, regions)
        copied += arrays[name].nbytes * ("data" in tensor)
    if rest.left:
        raise InvalidRequest(f"{rest.left} bytes follow the last tensor's data; binary_data_size of each input must be "
                             "the bytes of its data, in their order")
    id, binary = said.get("id", ""), parameters.pop("binary_data_output", False)
    if not isinstance(id, str) or not isinstance(binary, bool):
        raise InvalidRequest(f"id is {short(id)} and binary_data_output {short(binary)}; they must be a string and a "
                             "bool")
    wanted = [_wanted(_object("an output", one), binary, regions) for one in _list(said, "outputs")]
    return Question(model, version, arrays, wanted, binary, id, options_of(parameters), copied)


def write(answer: Answer) -> tuple[bytes, list[memoryview], int]:
    """The JSON of an answer, the bytes behind it where they lie, and how many were copied. Writes the outputs that go
    into shared memory."""
    tensors, pieces, copied = [], [], 0
    for output in answer.outputs:
        told: dict[str, Any] = dict(zip(("name", "datatype", "shape"), output.tensor, strict=True))
        if output.wanted.memory is not None:
            told["parameters"] = place(output)
            copied += output.nbytes
        elif output.wanted.binary:
            told["parameters"] = {"binary_data_size": output.nbytes}
            pieces += map(to_buffer, output.rows)
            copied += output.uneven
        else:
            told["data"] = to_json(output.rows)
            copied += output.nbytes
        tensors.append(told)
    head: dict[str, Any] = {"model_name": answer.question.model, "model_version": str(answer.version)}
    if answer.question.id:
        head["id"] = answer.question.id
    return json.dumps(head | {"outputs": tensors}, separators=(",", ":")).encode(), pieces, copied


def grouped(pieces: Sequence[bytes | memoryview]) -> tuple[list[bytes | memoryview], int]:
    """Small pieces that follow each other as one, large ones as they are; and the bytes that were copied."""
    groups: list[bytes | memoryview] = []
    small: list[bytes | memoryview] = []
    copied = 0

    def close() -> None:
        nonlocal copied
        if len(small) > 1:
            groups.append(b"".join(small))
            copied += len(groups[-1])
        else:
            groups.extend(small)
        small.clear()

    for piece in pieces:
        if len(piece) < SMALL:
            small.append(piece)
            continue
        close()
        groups.append(piece)
    close()
    return groups, copied


class _Rest:
    """What of a body no tensor has taken yet."""

    def __init__(self, data: memoryview):
        self._data = data

    @property
    def left(self) -> int:
        return len(self._data)

    def take(self, what: str, size: Any) -> memoryview:
        if type(size) is not int or not 0 <= size <= self.left:
            raise InvalidRequest(f"{what} has binary_data_size {short(size)}; {self.left} bytes of the body are left "
                                 "behind the JSON (whose length is in Inference-Header-Content-Length) and the tensors "
                                 "before this one")
        taken, self._data = self._data[:size], self._data[size:]
        return taken


def _array(what: str, tensor: Mapping[str, Any], rest: _Rest, regions: Regions | None) -> np.ndarray:
    datatype: Any = tensor.get("datatype")
    shape: Any = tensor.get("shape")
    parameters = _parameters("an input", tensor)
    memory, binary = memory_of(what, parameters, regions), "binary_data_size" in parameters
    if ("data" in tensor) + binary + (memory is not None) != 1:
        raise InvalidRequest(f"{what} must have its elements in one place: in data, behind the JSON (parameter "
                             "binary_data_size), or in shared memory")
    if "data" in tensor:
        return from_json(what, tensor["data"], datatype, shape)
    data = rest.take(what, parameters["binary_data_size"]) if binary else memory
    assert data is not None
    return from_bytes(what, data, datatype, shape)


def _wanted(output: Mapping[str, Any], binary: bool, regions: Regions | None) -> Wanted:
    name, parameters = _name("an output", output), _parameters("an output", output)
    binary = parameters.get("binary_data", binary)
    if not isinstance(binary, bool):
        raise InvalidRequest(f"output {name} has binary_data {short(binary)}; it must be a bool")
    told = {key: parameters[key] for key in PARAMETERS if key in parameters}
    return Wanted(name, binary, memory_of(f"output {name}", parameters, regions), told)


def _json(text: bytes) -> Any:
    """Python's own JSON, which knows NaN and Infinity, as this protocol's clients do."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the request is no JSON: {short(str(error))}; tensors' bytes may follow it if its length "
                             "is in Inference-Header-Content-Length") from error


def _object(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} is {short(value)}; it must be an object")
    if unknown := sorted(value.keys() - FIELDS[what]):
        raise InvalidRequest(f"{what} has the unknown fields {short(unknown)}; known are {sorted(FIELDS[what])}")
    return value


def _list(said: Mapping[str, Any], field: str) -> list[Any]:
    value = said.get(field, [])
    if not isinstance(value, list):
        raise InvalidRequest(f"{field} is {short(value)}; it must be a list")
    return value


def _name(what: str, tensor: Mapping[str, Any]) -> str:
    name = tensor.get("name")
    if not isinstance(name, str) or not 0 < len(name) < 256:
        raise InvalidRequest(f"{what} has the name {short(name)}; it must be a string of 1 to 255 characters")
    return name


def _parameters(what: str, said: Mapping[str, Any]) -> dict[str, Any]:
    parameters = said.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"the parameters of {what} are {short(parameters)}; they must be an object")
    if unknown := sorted(parameters.keys() - KNOWN.get(what, parameters.keys())):
        raise InvalidRequest(f"{what} has the unknown parameters {short(unknown)}; known are {sorted(KNOWN[what])}")
    return parameters
