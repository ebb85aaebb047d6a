"""Operators that ONNX defines as functions of other operators: their bodies, from the schemas of the onnx package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.defs

from jaxinfer.frontend.onnx.values import Value

Schema = Any  # onnx.defs.OpSchema, of whose functions the package's type stubs do not tell


def schema_of(name: str, domain: str, opset: int) -> Schema | None:
    """What the onnx package knows; None for an operator, or an opset, that it does not know."""
    if domain == "" and opset > onnx.defs.onnx_opset_version():
        return None
    try:
        return onnx.defs.get_schema(name, opset, domain)
    except onnx.defs.SchemaError:
        return None


def fixed_body(schema: Schema, opset: int) -> onnx.FunctionProto | None:
    """The body that holds at `opset`, of an operator whose body does not depend on its inputs' types."""
    versions = [version for version in schema.function_opset_versions if version <= opset]
    if not schema.has_function or not versions:
        return None
    return onnx.FunctionProto.FromString(schema.get_function_with_opset_version(max(versions)))


def depends_on_types(schema: Schema, opset: int) -> bool:
    return schema.has_context_dependent_function and any(
        version <= opset for version in schema.context_dependent_function_opset_versions)


def typed_body(
    schema: Schema, opset: int, node: onnx.NodeProto, inputs: Sequence[Value],
) -> onnx.FunctionProto | None:  # fmt: skip
    """The body for inputs of these types and shapes."""
    version = max(v for v in schema.context_dependent_function_opset_versions if v <= opset)
    types = [type_of(value).SerializeToString() for value in inputs]
    text = schema.get_context_dependent_function_with_opset_version(version, node.SerializeToString(), types)
    return onnx.FunctionProto.FromString(text) if text else None


def type_of(value: Value) -> onnx.TypeProto:
    if value is None:
        return onnx.TypeProto()
    if isinstance(value, list):
        return onnx.helper.make_sequence_type_proto(type_of(value[0]) if value else onnx.TypeProto())
    number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
    return onnx.helper.make_tensor_type_proto(number, value.shape)
