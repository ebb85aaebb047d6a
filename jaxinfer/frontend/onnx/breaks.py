"""Where the meaning of an operator changed with the opset, as data: each entry has an implementation of its own.

Other versions of these operators only allowed more element types. The list is checked against the registry by a test.
"""

NEWEST = {"": 28, "ai.onnx.ml": 5, "ai.onnx.preview": 1, "ai.onnx.preview.training": 1}  # read in full

# (operators, the opset that changed them, what changed)
BREAKS: list[tuple[tuple[str, ...], int, str]] = [
    (("Reshape",), 5, "the shape is an input, was an attribute"),
    (("Tile",), 6, "repeats for all axes, was a count and an axis"),
    (("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less"), 7,
     "broadcasts like numpy, was by the attributes `broadcast` and `axis`"),
    (("Gemm",), 7, "C broadcasts like numpy, was by the attribute `broadcast`"),
    (("Upsample",), 7, "one scale per axis, was one for the height and one for the width"),
    (("Upsample",), 9, "the scales are an input, were an attribute"),
    (("Scan",), 9, "scans axes that attributes name, was axis 1 of every row of a batch"),
    (("Slice",), 10, "starts, ends, axes and steps are inputs, were attributes; steps are new"),
    (("TopK",), 10, "k is an input, was an attribute"),
    (("Clip",), 11, "the limits are inputs, were attributes"),
    (("Pad",), 2, "the attribute is called pads, was paddings"),
    (("Pad",), 11, "pads and value are inputs, were attributes"),
    (("Resize",), 11, "coordinates, rounding, cubic and sizes can be chosen; pixel i lay at i / scale before"),
    (("Dropout",), 12, "ratio and training mode are inputs; before, files said nothing or `is_test`"),
    (("Softmax", "LogSoftmax", "Hardmax"), 13, "over one axis, the last unless named; was over all axes from 1 on"),
    (("Squeeze", "Unsqueeze"), 13, "the axes are an input, were an attribute"),
    (("Split",), 13, "the sizes are an input, were an attribute"),
    (("ReduceSum",), 13, "the axes are an input, were an attribute"),
    (("BatchNormalization",), 14, "training is an attribute and gives running statistics, was read off the outputs"),
    (("RoiAlign",), 16, "pixels are taken at their centres unless the file says otherwise, were at their corners"),
    (("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
      "ReduceSumSquare"), 18, "the axes are an input, were an attribute"),
    (("DFT",), 20, "the axis is an input, was an attribute; the second to last unless named"),
    (("GroupNormalization",), 21, "a scale and a bias per channel, was per group"),
]  # fmt: skip
