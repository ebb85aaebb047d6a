"""Matrix products: MatMul, Gemm, Einsum."""

from __future__ import annotations

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.ops.elementwise import scalar
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, namespace


@op("MatMul")
def matmul(node: Node, a: Value, b: Value) -> Value:
    return namespace(a, b).matmul(a, b)


@op("Gemm", since=7)
def gemm(
    node: Node, a: Value, b: Value, c: Value = None, *,
    alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
) -> Value:  # fmt: skip
    """alpha * A B + beta * C, either matrix transposed first."""
    y = namespace(a, b).matmul(a.T if transA else a, b.T if transB else b)
    y = y if alpha == 1 else y * scalar(alpha, y)
    if c is None:
        return y
    return y + (c if beta == 1 else c * scalar(beta, c))


@op("Gemm")
def gemm_1(
    node: Node, a: Value, b: Value, c: Value, *,
    alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0, broadcast: int = 0,
) -> Value:  # fmt: skip
    return gemm(node, a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)


@op("Einsum", since=12)
def einsum(node: Node, *values: Value, equation: str) -> Value:
    return namespace(*values).einsum(equation.replace(" ", ""), *values)
