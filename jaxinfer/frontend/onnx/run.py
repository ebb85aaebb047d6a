"""The interpreter: run the nodes of a Block one after another on numpy arrays, jax arrays or tracers."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxinfer.errors import JaxinferError
from jaxinfer.frontend.onnx.block import Block, Node
from jaxinfer.frontend.onnx.values import Value

Scope = ChainMap[str, Value]


def run_block(block: Block, outer: Scope | Mapping[str, Value], *inputs: Value) -> list[Value]:
    """The values of `block.outputs`. `outer` holds what a subgraph may read from the graphs around it."""
    scope: Scope = ChainMap(dict(zip(block.inputs, inputs, strict=False)), block.constants, outer)  # type: ignore[arg-type]
    for name in block.inputs[len(inputs) :]:
        scope[name] = None
    with np.errstate(all="ignore"):
        for node in block.nodes:
            scope.update(zip(node.outputs, run_node(node, scope), strict=False))
    return [scope[name] if name else None for name in block.outputs]


def run_node(node: Node, scope: Scope) -> Sequence[Value]:
    """The outputs of one node. An error that an op did not foresee carries a note that names the node."""
    inputs = [scope[name] if name else None for name in node.inputs]
    try:
        with jax.named_scope(node.op):  # compiled kernels carry the names of the operators that they came from
            if node.body is not None:
                return run_block(node.body, {}, *inputs)
            outputs = node.rule.run(node, *inputs, **_callable(node.attributes, scope))
    except JaxinferError:
        raise
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise node.error("needs values that are only known when the compiled function runs; leave the graph inputs "
                         "that they come from out of jit's arguments (as numpy arrays)") from error
    except Exception as error:
        shapes = ", ".join(str(getattr(value, "shape", type(value).__name__)) for value in inputs)
        error.add_note(f"in ONNX {node.label}, on inputs of shape {shapes}")
        raise
    return [_plain(value) for value in (outputs if isinstance(outputs, tuple) else (outputs,))]


def _plain(value: Value) -> Value:
    """numpy's scalars as arrays of rank 0, so that they keep their dtype."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def _callable(attributes: Mapping[str, Any], scope: Scope) -> dict[str, Any]:
    """Subgraphs become functions from inputs to a list of outputs, which see the scope around them."""
    bound = lambda value: partial(run_block, value, scope) if isinstance(value, Block) else value
    return {name: bound(value) for name, value in attributes.items()}
