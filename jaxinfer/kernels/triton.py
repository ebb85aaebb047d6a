"""What our Triton kernels share. A kernel is called on whole arrays, and each of its programs finds its own part.

Triton wants blocks of powers of two: what is none is padded to one by masks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxinfer.kernels.op import platform


def power(n: int) -> int:
    """The least power of two that is no less."""
    return 1 << (n - 1).bit_length()


def call(kernel, tuned, *, grid, out, aliases=None):
    """A kernel in Triton, with (warps, stages of its loop); elsewhere than on a GPU it is interpreted."""
    interpret = platform() != "gpu"
    params = None if interpret else plt.CompilerParams(num_warps=tuned[0], num_stages=tuned[1])
    return pl.pallas_call(kernel, grid=grid, out_shape=out, input_output_aliases=aliases or {}, interpret=interpret,
                          compiler_params=params)


def dot(a, b, **how):
    """A matmul of two blocks, in float32; of float32 without rounding what it is given."""
    exact = a.dtype == jnp.float32
    return plt.dot(a, b, precision=lax.Precision.HIGHEST if exact else None, **how)


def exp2(x):
    """2 to the power of x as the hardware has it: a fifth of a prompt's attention went into CUDA's handling of results
    that are nearly zero, and are zero here."""
    if platform() != "gpu":
        return jnp.exp2(x)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plt.elementwise_inline_asm("ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1,
                                      result_shape_dtypes=[out])[0]


def load(ref, *at, mask, **how):
    """What a block of an array holds; zero where the mask is false."""
    if mask is True:
        return plt.load(ref.at[at], **how)
    shape = jnp.broadcast_shapes(*(x.shape for x in at if getattr(x, "ndim", 0)))
    return plt.load(ref.at[at], mask=jnp.broadcast_to(mask, shape), other=0, **how)


def store(ref, value, *at, mask):
    """Puts a value into a block of an array, where the mask is true."""
    plt.store(ref.at[at], value.astype(ref.dtype), mask=jnp.broadcast_to(mask, value.shape))
