"""An endpoint reads torch's tensors where they lie."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16"])
def test_a_tensor_is_read_where_it_lies_and_no_byte_is_copied(dtype):
    """It is changed after its request was launched, and before the device reads it."""
    launched, go = threading.Event(), threading.Event()

    def hold():
        launched.set()
        go.wait(10)
        return np.ones((), jnp.dtype(dtype))

    call = lambda x: x * jax.pure_callback(hold, jax.ShapeDtypeStruct((), dtype))
    x = torch.ones(16, dtype=getattr(torch, dtype))
    with ji.endpoint(call, example=np.zeros(16, jnp.dtype(dtype)), max_batch=1) as f:
        reply = f.submit(x)
        assert launched.wait(10)
        x.fill_(7)
        go.set()
        assert reply.result(10).tolist() == [7] * 16
        assert reply.bytes_copied == f.stats.bytes_copied == 0 and f.stats.bytes_in == x.nbytes
