"""Our importer as a backend of ONNX's own test suite: every case runs under `jax.jit`, its inputs traced if possible.

Inputs that decide shapes, and strings, stay numpy arrays. Where a graph needs more than its analysis says (a condition
that changes shapes), only its float inputs are traced, then none. `modes` counts the cases by what was traced.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep

from jaxinfer.errors import UnsupportedModel
from jaxinfer.frontend.onnx.model import OnnxGraph, from_proto
from jaxinfer.frontend.onnx.values import floating

modes: collections.Counter[str] = collections.Counter()


class Prepared(BackendRep):
    def __init__(self, graph: OnnxGraph):
        self.graph = graph
        with jax.enable_x64(True):
            self.params = jax.tree.map(jax.numpy.asarray, graph.params)

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        feeds = dict(zip(self.graph.inputs, inputs, strict=False))
        mode, outputs = self.attempt(feeds)
        modes[mode] += 1
        with jax.enable_x64(True):
            return tuple(_host(outputs[name]) for name in self.graph.outputs)

    def attempt(self, feeds: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """What was traced, and the outputs: the first way that the graph accepts."""
        free = {name for name, value in feeds.items() if _numeric(value) and not self.graph.inputs[name].shaping}
        floats = {name for name in free if all(map(floating, jax.tree.leaves(feeds[name])))}
        for mode, traced in (("traced", free), ("floats traced", floats)):
            try:
                if traced and not self.text():
                    return mode, self.compiled(feeds, traced)
            except UnsupportedModel:
                continue
        with jax.enable_x64(True):
            return "concrete", self.graph.apply(self.params, feeds)

    def compiled(self, feeds: dict[str, Any], traced: set[str]) -> dict[str, Any]:
        known = {name: value for name, value in feeds.items() if name not in traced}
        run = jax.jit(lambda params, inputs: self.graph.apply(params, known | inputs))
        with jax.enable_x64(True):
            return run(self.params, {name: feeds[name] for name in traced})

    def text(self) -> bool:
        """Whether an output is made of strings, which no compiled function returns."""
        return any(output.dtype == object for output in self.graph.outputs.values())


def _numeric(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, np.ndarray) and leaf.dtype != object for leaf in leaves)


def _host(value: Any) -> Any:
    return [_host(item) for item in value] if isinstance(value, list) else None if value is None else np.asarray(value)


class JaxinferBackend(Backend):
    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> Prepared:
        return Prepared(from_proto(model, Path(model.graph.name or "model.onnx")))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device == "CPU"


__all__ = ["JaxinferBackend", "modes"]
