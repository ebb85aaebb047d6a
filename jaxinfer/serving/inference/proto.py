"""The protocol's messages over gRPC, as the questions and answers that HTTP has too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.errors import InvalidRequest
from jaxinfer.serving.inference.datatypes import (
    BYTES,
    count_of,
    dtype_of,
    from_bytes,
    objects,
    shaped,
    short,
    to_buffer,
)
from jaxinfer.serving.inference.question import Answer, Question, Wanted, options_of, place
from jaxinfer.serving.inference.regions import PARAMETERS, Regions, memory_of
from jaxinfer.serving.inference.schema import CLASSES
from jaxinfer.serving.inference.wire import read_request, write_answer

# Where elements are that are not raw; 16-bit floats always are.
CONTENTS = {"BOOL": "bool_contents", "INT64": "int64_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents",
            "FP64": "fp64_contents", BYTES: "bytes_contents"}
CONTENTS |= {f"{kind.upper()}{bits}": f"{kind}_contents" for kind in ("int", "uint") for bits in (8, 16, 32)}


def read(data: bytes, regions: Regions | None) -> Question:
    """Raises InvalidRequest."""
    message, raw = read_request(data)
    arrays: dict[str, np.ndarray] = {}
    typed, copied = False, 0
    for tensor in message.inputs:
        what, datatype, shape = f"input {short(tensor.name)}", tensor.datatype, list(tensor.shape)
        if tensor.name in arrays:
            raise InvalidRequest(f"{what} is given twice")
        memory = memory_of(what, _parameters(what, tensor.parameters, PARAMETERS), regions)
        if tensor.HasField("contents"):
            arrays[tensor.name] = _from_contents(what, tensor.contents, datatype, shape)
            typed, copied = True, copied + arrays[tensor.name].nbytes
        elif memory is not None:
            arrays[tensor.name] = from_bytes(what, memory, datatype, shape)
        else:
            empty = count_of(what, shape) == 0 and not message.raw_input_contents
            if not raw and not empty:
                raise InvalidRequest(f"{what} has no data: neither contents, nor raw_input_contents, nor shared memory")
            arrays[tensor.name] = from_bytes(what, raw.pop(0) if raw else memoryview(b""), datatype, shape)
    if raw:
        raise InvalidRequest(f"raw_input_contents has {len(raw)} tensors more than inputs that take theirs from it")
    wanted = [_wanted(output, regions) for output in message.outputs]
    options = options_of({name: _value(parameter) for name, parameter in message.parameters.items()})
    return Question(message.model_name, message.model_version, arrays, wanted, not typed, message.id, options, copied)


def write(answer: Answer) -> tuple[bytes, int]:
    """An answer, and how many bytes of tensors were copied into it, and into shared memory. Its tensors are raw if the
    request's were, or if it has one that must be."""
    question, copied = answer.question, answer.nbytes
    raw = question.binary or any(output.tensor.datatype not in CONTENTS for output in answer.outputs)
    message = CLASSES["ModelInferResponse"](model_name=question.model, model_version=str(answer.version),
                                            id=question.id)
    contents = []
    for output in answer.outputs:
        name, datatype, shape = output.tensor
        told = message.outputs.add(name=name, datatype=datatype, shape=shape)
        pieces: list[memoryview] = []
        if output.wanted.memory is not None:
            for key, value in place(output).items():
                setattr(told.parameters[key], "string_param" if isinstance(value, str) else "int64_param", value)
        elif raw:
            pieces = [to_buffer(row) for row in output.rows]
            copied += output.uneven
        else:
            for row in output.rows:
                getattr(told.contents, CONTENTS[datatype]).extend(row.reshape(-1).tolist())
        contents.append(pieces)
    return write_answer(message, contents if raw else []), copied


def _from_contents(what: str, contents: Any, datatype: str, shape: list[int]) -> np.ndarray:
    dtype, count = dtype_of(what, datatype), count_of(what, shape)
    if datatype not in CONTENTS:
        raise InvalidRequest(f"{what} is {datatype}, which must be in raw_input_contents")
    if other := [field.name for field, _ in contents.ListFields() if field.name != CONTENTS[datatype]]:
        raise InvalidRequest(f"{what} is {datatype} and has {other[0]}; its elements must be in {CONTENTS[datatype]}")
    values = getattr(contents, CONTENTS[datatype])
    if len(values) != count:
        raise InvalidRequest(f"{what} has {len(values)} elements; its shape {shape} says {count}")
    if datatype == BYTES:
        return shaped(what, objects(list(values)), shape)
    try:
        return shaped(what, np.array(list(values), dtype), shape)
    except OverflowError as error:
        raise InvalidRequest(f"{what} has a number that {datatype} cannot hold: {error}") from error


def _wanted(output: Any, regions: Regions | None) -> Wanted:
    what = f"output {short(output.name)}"
    told = _parameters(what, output.parameters, PARAMETERS)
    return Wanted(output.name, True, memory_of(what, told, regions), told)


def _parameters(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    if unknown := sorted(given.keys() - set(known)):
        raise InvalidRequest(f"{what} has the unknown parameters {short(unknown)}; known are {', '.join(known)}")
    return {name: _value(parameter) for name, parameter in given.items()}


def _value(parameter: Any) -> Any:
    which = parameter.WhichOneof("choice")
    return None if which is None else getattr(parameter, which)
