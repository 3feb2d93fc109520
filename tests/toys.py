"""Small ONNX files for tests of what models cost."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path, nodes, weights, shape=("batch", "time"), metadata=None, name="signal", outputs=("y",), own=()):
    """Write a toy; the operators named in ``own`` are those of onnxruntime's domain."""
    constants = [numpy_helper.from_array(np.asarray(array), key) for key, array in weights.items()]
    graph = helper.make_graph(
        [
            helper.make_node(kind, inputs, [output], domain="com.microsoft" if kind in own else "", **attributes)
            for kind, inputs, output, attributes in nodes
        ],
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))],
        [helper.make_empty_tensor_value_info(output) for output in outputs],
        constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=8
    )
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def save_toy(path):
    """1.6 s are [1, 25600]: a strided convolution to 8 channels, a depthwise one, a matrix product, a Gemm."""
    ones = {
        "c": np.ones((8, 1, 64), np.float32), "d": np.ones((8, 1, 3), np.float32), "b": np.ones(8, np.float32),
        "m": np.ones((8, 5), np.float32), "g": np.ones((4, 5), np.float32), "axes": np.array([1]), "scale": np.float32(1),
    }  # fmt: skip
    return save(
        path,
        [
            ("Unsqueeze", ["signal", "axes"], "x", {}),
            ("Conv", ["x", "c", "b"], "conv", {"strides": [32]}),  # 799 frames
            ("Conv", ["conv", "d"], "depthwise", {"group": 8, "pads": [1, 1]}),
            ("Transpose", ["depthwise"], "rows", {"perm": [0, 2, 1]}),
            ("MatMul", ["rows", "m"], "tokens", {}),
            ("ReduceMean", ["tokens"], "mean", {"axes": [1], "keepdims": 0}),
            ("Gemm", ["mean", "g"], "y", {"transB": 1}),
        ],
        ones,
    )


def save_own(path):
    """Operators of onnxruntime alone: 1.6 s are [1, 6400, 1, 4], channels last; 3 taps to 16 channels, a pool, a matrix."""
    one = {"s": np.float32(0.1), "z": np.uint8(128), "image": np.array([1, -1, 1, 4]), "rows": np.array([-1, 16])}
    convolution = {"w": np.ones((16, 4, 3, 1), np.int8), "ws": np.ones(16, np.float32), "wz": np.zeros(16, np.int8)}
    dense = {"g": np.ones((16, 5), np.int8), "gs": np.ones(5, np.float32), "gz": np.zeros(5, np.int8)}
    nodes = [
        ("QuantizeLinear", ["signal", "s", "z"], "q", {}),
        ("Reshape", ["q", "image"], "x", {}),
        ("QLinearConv", ["x", "s", "z", "w", "ws", "wz", "s", "z", "b"], "c", {"channels_last": 1, "kernel_shape": [3, 1]}),
        ("NhwcMaxPool", ["c"], "p", {"kernel_shape": [2, 1], "strides": [2, 1]}),
        ("Reshape", ["p", "rows"], "r", {}),
        ("QGemm", ["r", "s", "z", "g", "gs", "gz"], "y", {}),
    ]
    weights = {**one, **convolution, "b": np.ones(16, np.int32), **dense}
    return save(path, nodes, weights, own=("QLinearConv", "NhwcMaxPool", "QGemm"))
