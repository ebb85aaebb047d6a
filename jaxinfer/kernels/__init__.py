"""Ops: a reference that defines each, faster implementations by platform, and what they own (the page layout)."""

from jaxinfer.kernels.attention import attend, init_pages
from jaxinfer.kernels.dense import layer_norm, matmul, rms_norm, rope
from jaxinfer.kernels.op import Op, tracing
from jaxinfer.kernels.sampling import sample, sample_greedy

__all__ = [
    "Op", "attend", "init_pages", "layer_norm", "matmul", "rms_norm", "rope", "sample", "sample_greedy", "tracing",
]
