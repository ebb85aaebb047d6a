"""The operators, by theme. Importing this package registers them all."""

from jaxinfer.frontend.onnx.ops import (
    activation,
    control,
    convert,
    convolution,
    elementwise,
    gradient,
    index,
    layout,
    learned,
    linear,
    normalise,
    pool,
    quantise,
    random,
    recurrent,
    reduce,
    resize,
    sample,
    sequence,
    shape,
    signal,
    text,
    trees,
)

__all__ = [
    "activation", "control", "convert", "convolution", "elementwise", "gradient", "index", "layout", "learned",
    "linear", "normalise", "pool", "quantise", "random", "recurrent", "reduce", "resize", "sample", "sequence",
    "shape", "signal", "text", "trees",
]  # fmt: skip
