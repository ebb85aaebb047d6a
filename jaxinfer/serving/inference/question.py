"""A request of the protocol, however it came, and how it is answered: row by row through the model's own batcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from jaxinfer import events
from jaxinfer.errors import Closed, InvalidRequest, ModelNotFound, RequestFailed, StepFailed
from jaxinfer.runtime.registry import ModelVersion
from jaxinfer.serving.aside import aside, begun_aside, withdraw
from jaxinfer.serving.inference.datatypes import short
from jaxinfer.serving.inference.models import OPEN, Face, Rows, Tensor, columns_of, face_of, requests_of
from jaxinfer.serving.openai.models import find as find_handle
from jaxinfer.serving.site import Site

LARGE = 2**18  # bytes that are looked at in another thread than the event loop's
ATTEMPTS = 3  # weights that change between two rows of a request
MICROSECONDS = 1e6


class Wanted(NamedTuple):
    """An output that is asked for: as bytes, or into `memory` of the client's, which its parameters `told` name."""

    name: str
    binary: bool = True
    memory: memoryview | None = None
    told: Mapping[str, Any] = {}


@dataclass
class Question:
    """`arrays` by name; the outputs that are `wanted` (none: all, as bytes or not). `version` is a number, a label, or
    empty: what is stable. `options` are those of a call of the model. `copied` counts bytes on their way so far."""

    model: str
    version: str
    arrays: dict[str, np.ndarray]
    wanted: list[Wanted] = field(default_factory=list)
    binary: bool = True
    id: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    copied: int = 0

    @cached_property
    def nbytes(self) -> int:
        """Of texts their own."""
        size = lambda array: sum(map(len, array.flat)) if array.dtype == object else array.nbytes
        return sum(map(size, self.arrays.values()))


class Output(NamedTuple):
    """A tensor that goes out, as the rows it consists of."""

    tensor: Tensor  # with its true shape
    rows: Rows
    wanted: Wanted

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def uneven(self) -> int:
        """The bytes of rows that must be copied to lie together."""
        return sum(row.nbytes for row in self.rows if not row.flags.c_contiguous)


@dataclass
class Answer:
    """The outputs, and the `version` of the weights that made all of them. `copied` counts bytes so far."""

    question: Question
    version: int
    outputs: list[Output]
    copied: int

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    def leaves(self, protocol: str, copied: int) -> None:
        """It is about to go out, for which so many bytes more were copied."""
        events.emit(events.TensorsServed(self.question.model, protocol, self.question.nbytes, self.nbytes,
                                         self.copied + copied))


def find(site: Site, name: str, version: str) -> ModelVersion:
    """The version of a model with this number or label. Raises ModelNotFound, or Problem for one that is being loaded,
    or could not be."""
    if not is_number(version) or name not in site.registry:
        return find_handle(site, f"{name}@{version}").version
    serving = site.registry.serving(name)
    if int(version) not in serving:
        raise ModelNotFound(f"{name} has no version {version}; loaded are {sorted(serving)}")
    return serving[int(version)]


def is_number(version: str) -> bool:
    return version.isascii() and version.isdigit() and len(version) < 19


def options_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call from a request's parameters, which are all understood or refused. The first priority is
    the lowest number; the timeout is in microseconds."""
    if unknown := sorted(parameters.keys() - {"priority", "timeout"}):
        raise InvalidRequest(f"parameters are unknown: {short(unknown)}; those of a request are priority and timeout "
                             "(in microseconds), over HTTP also binary_data_output")
    options = {name: parameters[name] for name in ("priority", "timeout") if name in parameters}
    if any(type(value) is not int or abs(value) >= 2**63 for value in options.values()):
        raise InvalidRequest(f"parameters are {short(options)}; priority and timeout must be integers of 64 bits")
    if timeout := options.pop("timeout", 0):
        options["timeout"] = timeout / MICROSECONDS
    return options


async def answer(site: Site, question: Question) -> Answer:
    """Ask the model. A version that is closed meanwhile is asked no more, if another has its label.

    Raises InvalidRequest, ModelNotFound, Rejected, Expired, StepFailed or Closed.
    """
    most = site.settings.request_timeout
    question.options["timeout"] = min(question.options.get("timeout", most), most)
    while True:
        version = find(site, question.model, question.version)
        try:
            return await _ask(version, face_of(question.model, version.model), question)
        except Closed:
            if find(site, question.model, question.version) is version:
                raise


async def _ask(version: ModelVersion, face: Face, question: Question) -> Answer:
    slow = (question.nbytes > LARGE or "outputs" not in vars(face)  # which are found by a trace
            or any(OPEN in tensor.shape[face.batched:] for tensor in face.inputs))  # the first of its sizes costs one
    prepare = partial(_queue, version.model, face, question)
    for _ in range(ATTEMPTS):
        replies = await begun_aside(prepare, withdraw) if slow else prepare()
        try:
            results = [reply.result() if reply.done() else await reply for reply in replies]
        except StepFailed:
            row = {name: array[0, ...] if face.batched else array for name, array in question.arrays.items()}
            await aside(partial(face.check, row))
            raise
        finally:
            withdraw(replies)
        numbers = {reply.version for reply in replies}
        if len(numbers) == 1:
            break
    else:
        raise RequestFailed(f"the weights of {question.model} changed within this request {ATTEMPTS} times; ask again")
    number = numbers.pop()
    if is_number(question.version) and number != int(question.version):
        raise ModelNotFound(f"version {question.version} of {question.model} was replaced while this request waited")
    columns = columns_of(face, results)
    copied = question.copied + sum(reply.bytes_copied for reply in replies)
    return Answer(question, number, _outputs(face, columns, question), copied)


async def by_size(nbytes: int, work: Callable[[], Any]) -> Any:
    """Work on so many bytes: in another thread than the event loop's if it takes long."""
    return await aside(work) if nbytes > LARGE else work()


def _queue(model: Any, face: Face, question: Question) -> list[Any]:
    """In the event loop where that is sure to be quick."""
    _check_wanted(face, question.wanted)
    return model.submit_all(requests_of(face, question.arrays, model.max_waiting), **question.options)


def _check_wanted(face: Face, wanted: Sequence[Wanted]) -> None:
    names = [output.name for output in wanted]
    if wrong := sorted(set(names) - {tensor.name for tensor in face.outputs}):
        raise InvalidRequest(f"outputs are unknown: {short(wrong)}; there are {', '.join(map(str, face.outputs))}")
    if len(set(names)) < len(names):
        raise InvalidRequest(f"outputs are asked for twice: {short(sorted(names))}")


def _outputs(face: Face, columns: Mapping[str, Rows], question: Question) -> list[Output]:
    datatypes = {tensor.name: tensor.datatype for tensor in face.outputs}
    outputs = []
    for wanted in question.wanted or [Wanted(name, question.binary) for name in columns]:
        rows = columns[wanted.name]
        if len({row.shape for row in rows}) > 1:
            raise InvalidRequest(f"output {wanted.name} has another shape for each row of this request; ask one by one")
        shape = ((len(rows),) * face.batched) + rows[0].shape
        outputs.append(Output(Tensor(wanted.name, datatypes[wanted.name], shape), rows, wanted))
    return outputs


def place(output: Output) -> dict[str, Any]:
    """Write a tensor into the client's memory, or raise InvalidRequest. Its parameters in the answer."""
    memory, size = output.wanted.memory, output.nbytes
    assert memory is not None
    if size > len(memory):
        raise InvalidRequest(f"output {output.tensor} has {size} bytes, and its place in shared memory {len(memory)}")
    target, at = np.frombuffer(memory, np.uint8), 0
    for row in output.rows:
        target[at: at + row.nbytes].view(row.dtype).reshape(row.shape)[...] = row
        at += row.nbytes
    return {**output.wanted.told, "shared_memory_byte_size": size}

