"""From protobuf messages to Blocks: every node finds the rule that runs it, or is listed as a problem."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend.onnx import ops as ops  # registers the operators
from jaxinfer.frontend.onnx.block import Block, Node
from jaxinfer.frontend.onnx.breaks import NEWEST
from jaxinfer.frontend.onnx.functions import depends_on_types, fixed_body, schema_of, typed_body
from jaxinfer.frontend.onnx.ops.gradient import TRAINING, between
from jaxinfer.frontend.onnx.registry import Rule, lookup
from jaxinfer.frontend.onnx.run import run_block
from jaxinfer.frontend.onnx.tensors import read_sparse, read_tensor
from jaxinfer.frontend.onnx.values import Value, floating

SMALL = 1024  # elements; a larger constant of a subgraph is kept beside the main graph's
ONNX = ("", "ai.onnx")


def domain_of(name: str) -> str:
    return "" if name in ONNX else name


@dataclass(frozen=True)
class Frame:
    """Where a node stands: the opsets that hold, the attributes of the function around it, and what names mean."""

    opsets: Mapping[str, int]
    bound: Mapping[str, AttributeProto] | None = None
    names: ChainMap[str, str] = field(default_factory=ChainMap[str, str])
    defined: ChainMap[str, bool] = field(default_factory=ChainMap[str, bool])

    def inner(self) -> Frame:
        return replace(self, names=self.names.new_child(), defined=self.defined.new_child())


class Builder:
    """Builds the Blocks of one model. `lifted` collects large constants of subgraphs, `problems` what is missing."""

    def __init__(self, path: Path, model: onnx.ModelProto):
        self.path = path
        self.functions = {(domain_of(f.domain), f.name, f.overload): f for f in model.functions}
        self.lifted: dict[str, np.ndarray] = {}
        self.problems: dict[str, list[str]] = {}
        self.opsets = {domain_of(entry.domain): entry.version for entry in model.opset_import}

    def main(self, graph: GraphProto) -> Block:
        """The main graph, with all large constants. Raises UnsupportedModel that lists all problems."""
        block = self.block(graph, Frame(self.opsets), top=True)
        if self.problems:
            lines = [f"{what}: {_some(nodes)}" for what, nodes in sorted(self.problems.items())]
            raise UnsupportedModel(f"{self.path}: {len(lines)} kinds of node are not supported, nothing was loaded:\n  "
                                   + "\n  ".join(lines))
        return replace(block, constants=block.constants | self.lifted)

    def block(self, graph: GraphProto, frame: Frame, top: bool = False) -> Block:
        inputs = tuple(value.name for value in graph.input)
        frame.defined.update(dict.fromkeys(inputs, True))
        constants: dict[str, np.ndarray] = {}
        for tensor in graph.initializer:
            self.keep(tensor.name, read_tensor(tensor, self.path), constants, frame, top)
        for sparse in graph.sparse_initializer:
            self.keep(sparse.values.name, read_sparse(sparse, self.path), constants, frame, top)
        nodes = self.nodes(graph.node, constants, frame, top)
        outputs = tuple(self.read(value.name, frame, f"the outputs of {graph.name!r}") for value in graph.output)
        return Block(graph.name, inputs, outputs, nodes, constants)

    def nodes(self, protos: Any, constants: dict[str, np.ndarray], frame: Frame, top: bool) -> tuple[Node, ...]:
        nodes: list[Node] = []
        for proto in protos:
            if proto.op_type == "Constant" and domain_of(proto.domain) == "":
                self.keep(proto.output[0], self.constant(proto, frame), constants, frame, top)
            else:
                nodes.append(self.node(proto, frame, nodes))
                frame.defined.update(dict.fromkeys(proto.output, True))
        return tuple(nodes)

    def keep(self, name: str, value: np.ndarray, constants: dict[str, np.ndarray], frame: Frame, top: bool) -> None:
        """A constant: of the block itself, or, if it is a subgraph's weight, of the main graph under a free name."""
        frame.defined[name] = True
        if top or frame.bound is not None or value.size <= 1 or not (floating(value) or value.size > SMALL):
            constants[name] = value
            return
        free = name
        while free in self.lifted or (free != name and free in frame.defined):
            free += "'"
        self.lifted[free] = value
        frame.names[name] = free

    def read(self, name: str, frame: Frame, where: str) -> str:
        if name and name not in frame.defined:
            raise CorruptFile(f"{self.path}: {where} reads {name!r}, which nothing before it computes")
        return frame.names.get(name, name)

    def node(self, proto: NodeProto, frame: Frame, before: list[Node]) -> Node:
        domain, where = domain_of(proto.domain), f"node {proto.name or ', '.join(proto.output)!r} ({proto.op_type})"
        inputs = tuple(self.read(name, frame, where) for name in proto.input)
        local = self.functions.get((domain, proto.op_type, proto.overload))
        version = frame.opsets.get(domain, 1 if local is not None else 0)
        rule, body, attributes = lookup(proto.op_type, domain, version), None, {}
        if local is not None:
            body = self.function(local, proto, frame)
        elif rule is not None and self.current(proto, domain, version):
            attributes = self.attributes(proto, rule, frame, f"{_named(proto, domain)}-{version}")
            if (domain, proto.op_type) == (TRAINING, "Gradient"):
                attributes["body"] = between(before, attributes["xs"] + attributes.get("zs", []), attributes["y"])
        else:
            rule, body = self.defined_by_onnx(proto, domain, version, frame)
        rule = rule or Rule(lambda node, *inputs: None, version)
        return Node(proto.op_type, proto.name, version, inputs, tuple(proto.output), rule, attributes, body)

    def current(self, proto: NodeProto, domain: str, version: int) -> bool:
        """Whether the operator means at `version` what it meant at the newest opset that this package knows."""
        if version <= NEWEST.get(domain, version):
            return True
        schema = schema_of(proto.op_type, domain, version)
        return domain == "" and version <= onnx.defs.onnx_opset_version() and schema is not None and (
            schema.since_version <= NEWEST[domain])

    def defined_by_onnx(
        self, proto: NodeProto, domain: str, version: int, frame: Frame,
    ) -> tuple[Rule | None, Block | None]:  # fmt: skip
        """By the function that ONNX gives as the operator's meaning, where we have no implementation."""
        schema = schema_of(proto.op_type, domain, version)
        if schema is not None and (function := fixed_body(schema, version)) is not None:
            return None, self.function(function, proto, frame, schema)
        if schema is not None and depends_on_types(schema, version):
            return Rule(self.late(proto, schema, version, frame), version), None
        self.problems.setdefault(f"{_named(proto, domain)}-{version}", []).append(proto.name or ", ".join(proto.output))
        return None, None

    def function(self, function: FunctionProto, call: NodeProto, frame: Frame, schema: Any = None) -> Block:
        """A function's body for the attributes of one call, those that it leaves out at their defaults."""
        defaults = {a.name: a for a in function.attribute_proto}
        if schema is not None:
            defaults |= {name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
        bound = defaults | {a.name: self.dereferenced(a, frame) for a in call.attribute}
        opsets = {**frame.opsets, **{domain_of(entry.domain): entry.version for entry in function.opset_import}}
        inside = Frame(opsets, {name: a for name, a in bound.items() if a is not None})
        inside.defined.update(dict.fromkeys(function.input, True))
        constants: dict[str, np.ndarray] = {}
        nodes = self.nodes(function.node, constants, inside, top=False)
        outputs = tuple(name if name in inside.defined else "" for name in function.output)  # some on demand only
        return Block(function.name, tuple(function.input), outputs, nodes, constants)

    def late(self, proto: NodeProto, schema: Any, version: int, frame: Frame):
        """A function whose body depends on its inputs' types, which are known when the graph is traced."""
        bodies: dict[str, Block] = {}
        call = self.resolved(proto, frame)

        def run(node: Node, *inputs: Value) -> tuple[Value, ...]:
            key = repr([None if x is None else (str(x.dtype), x.shape) for x in inputs])
            if key not in bodies:
                function = typed_body(schema, version, call, inputs)
                if function is None:
                    raise node.error(f"ONNX gives no definition for inputs of types {key}")
                bodies[key] = self.function(function, call, frame, schema)
                if self.problems:
                    raise node.error(f"its definition needs {', '.join(self.problems)}, which is not supported")
            return tuple(run_block(bodies[key], {}, *inputs))

        return run

    def constant(self, proto: NodeProto, frame: Frame) -> np.ndarray:
        attribute = self.dereferenced(proto.attribute[0], frame) if len(proto.attribute) == 1 else None
        if attribute is None:
            raise CorruptFile(f"{self.path}: the Constant {proto.name or proto.output[0]!r} has no single value")
        value = self.value(attribute, frame)
        dtype = {AttributeProto.FLOAT: np.float32, AttributeProto.FLOATS: np.float32, AttributeProto.INT: np.int64,
                 AttributeProto.INTS: np.int64, AttributeProto.STRING: object, AttributeProto.STRINGS: object}
        return np.asarray(value, dtype.get(attribute.type))

    def attributes(self, proto: NodeProto, rule: Rule, frame: Frame, kind: str) -> dict[str, Any]:
        given = {a.name: self.dereferenced(a, frame) for a in proto.attribute}
        values = {name: self.value(a, frame) for name, a in given.items() if a is not None}
        for name in sorted(values.keys() - rule.attributes):
            self.problems.setdefault(f"{kind} with the attribute {name!r}", []).append(proto.name or proto.output[0])
        return {name: value for name, value in values.items() if name not in ("consumed_inputs",)}

    def dereferenced(self, attribute: AttributeProto, frame: Frame) -> AttributeProto | None:
        """What an attribute that refers to one of the function around it stands for; None if that was not given."""
        return (frame.bound or {}).get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute

    def resolved(self, proto: NodeProto, frame: Frame) -> NodeProto:
        """The node with the values of attributes that refer to the function around it."""
        copy = NodeProto()
        copy.CopyFrom(proto)
        del copy.attribute[:]
        for attribute in proto.attribute:
            if (given := self.dereferenced(attribute, frame)) is not None:
                copy.attribute.add().CopyFrom(given)
                copy.attribute[-1].name = attribute.name
        return copy

    def value(self, attribute: AttributeProto, frame: Frame) -> Any:
        text = lambda data: data.decode(errors="surrogateescape")
        match attribute.type:
            case AttributeProto.STRING:
                return text(attribute.s)
            case AttributeProto.STRINGS:
                return [text(data) for data in attribute.strings]
            case AttributeProto.TENSOR:
                return read_tensor(attribute.t, self.path)
            case AttributeProto.SPARSE_TENSOR:
                return read_sparse(attribute.sparse_tensor, self.path)
            case AttributeProto.GRAPH:
                return self.block(attribute.g, frame.inner())
            case AttributeProto.FLOATS | AttributeProto.INTS:
                return list(attribute.floats or attribute.ints)
        return onnx.helper.get_attribute_value(attribute)


def _named(proto: NodeProto, domain: str) -> str:
    return f"{domain}.{proto.op_type}" if domain else proto.op_type


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return "nodes " + ", ".join(repr(name) for name in names[:most]) + rest
