"""ONNX files as pure JAX functions: `load_onnx(path)` gives an OnnxGraph. Needs the extra `jaxinfer[onnx]`."""

from jaxinfer.errors import UnsupportedModel

try:
    import onnx as _onnx  # noqa: F401
except ImportError as error:
    raise UnsupportedModel('reading ONNX files needs the onnx package: pip install "jaxinfer[onnx]"') from error

from jaxinfer.frontend.onnx.model import Input, OnnxGraph, load_onnx

__all__ = ["Input", "OnnxGraph", "load_onnx"]
