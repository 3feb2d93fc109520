"""Parameters and multiply-accumulates of an ONNX file, whoever made it, counted from its graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.measure import make_feeds
from w2s_jax.runtime.session import onnxruntime_errors, open_session

#: Operators of products → where their two operands are.
_OPERANDS = {
    "Conv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3), "ConvTranspose": (0, 1),
    "MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "Gemm": (0, 1), "QGemm": (0, 3), "FusedConv": (0, 1),
}  # fmt: skip
_NOT_COUNTED = ("LSTM", "GRU", "RNN", "Einsum", "Attention", "DFT", "STFT")
#: Operators of onnxruntime's own domain without products of two tensors; any other may hide some.
_PLAIN = (
    "NhwcMaxPool", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSoftmax", "QLinearSigmoid", "QLinearLeakyRelu",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QuantizeLinear", "DequantizeLinear", "Gelu",
    "FastGelu", "BiasGelu", "QuickGelu",
)  # fmt: skip
#: Types of weights, as numbers of onnx.TensorProto: FLOAT, UINT8, INT8, INT32, FLOAT16, DOUBLE, BFLOAT16, UINT4, INT4.
_WEIGHTS = (1, 2, 3, 6, 10, 11, 16, 21, 22)


def count(file: str | Path, seconds: float = 5.0) -> dict:
    """Count parameters and multiply-accumulates of an ONNX file.

    Every convolution and matrix product is counted by the shapes that it really has for ``seconds`` of audio. What depends on
    constants alone is computed when the file is loaded: it is not counted, and weights are those that come out of it.

    Returns:
        ``parameters`` (the number that the file's metadata gives, or else that of the weights that enter its computation),
        ``macs``, and ``uncounted``: operators with products that were not counted, "Conv in Loop" for one in a body.

    Raises:
        UsageError: onnx is not installed, no such file, or another kind of network.
        W2SError: the file is damaged.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_extra("onnx", "export") from error
    try:
        model = onnx.load(str(file))
    except FileNotFoundError as error:
        raise UsageError(f"no model at {file}: no such file") from error
    except Exception as error:  # protobuf's exceptions share no base
        raise W2SError(f"{file} is damaged or not an ONNX model") from error
    graph = model.graph
    stored = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in graph.initializer}
    constants, alive = set(stored), []
    for node in graph.node:  # in the order of computation
        if all(name in constants or not name for name in node.input) and not _bodies(node) and "Random" not in node.op_type:
            constants.update(node.output)
        else:
            alive.append(node)
    products = [node for node in alive if node.op_type in _OPERANDS]
    entering = {name for node in alive for at, name in enumerate(node.input) if name in constants and not _scales(node, at)}
    operands = {node.input[at] for node in products for at in _OPERANDS[node.op_type]}
    wanted = (entering | operands | {node.output[0] for node in products}) - set(stored)
    macs = 0
    for values in _run(model, wanted, file, seconds):
        shapes = {name: np.shape(value) for name, value in values.items()} | {name: dims for name, (dims, _) in stored.items()}
        macs += sum(_macs(node, shapes) for node in products)
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype) for name in entering - set(stored)}
    types |= {name: kind for name, (_, kind) in stored.items()}
    # a scalar is a setting, not a weight; int64 are shapes and indices
    weights = sum(math.prod(shapes[name]) for name in entering if shapes[name] and types[name] in _WEIGHTS)
    return {
        "parameters": recorded_parameters({prop.key: prop.value for prop in model.metadata_props}) or weights,
        "macs": macs,
        "uncounted": sorted(set(_uncounted(alive))),
    }


def recorded_parameters(metadata: Mapping[str, str]) -> int | None:
    """The number of parameters in a file's metadata, if it is there."""
    return int(metadata["parameters"]) if metadata.get("parameters", "").isdigit() else None


def _run(model, wanted: set[str], file: str | Path, seconds: float) -> Iterator[dict[str, np.ndarray]]:
    """Values of the tensors ``wanted`` for noise, by name; once, or for each chunk. ``model`` gets them as outputs."""
    import onnx

    graph = model.graph
    more = sorted(wanted - {value.name for value in (*graph.input, *graph.output)})
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    outputs = [value.name for value in graph.output]
    session, path = open_session(model.SerializeToString())
    for feed in make_feeds(session, path, seconds):
        with onnxruntime_errors(f"{file} failed"):
            values = session.run(outputs, feed)
        yield dict(zip(outputs, values, strict=True)) | feed


def _scales(node, at: int) -> bool:
    """Whether an input of a quantised operator is a scale or a zero point: one number for a tensor or a channel."""
    if node.op_type in ("ConvInteger", "MatMulInteger"):
        return at >= 2
    bias = {"QLinearConv": 8, "QGemm": 6}.get(node.op_type)
    return ("Linear" in node.op_type or node.op_type == "QGemm") and at not in (0, 3, bias)


def _bodies(node) -> list:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _uncounted(nodes, where: str = "") -> Iterator[str]:
    for node in nodes:
        known = node.op_type in _OPERANDS
        foreign = node.domain not in ("", "ai.onnx") and node.op_type not in _PLAIN
        if where if known else foreign or node.op_type in _NOT_COUNTED:
            yield node.op_type + where
        for body in _bodies(node):
            yield from _uncounted(body.node, f" in {node.op_type}{where}")


def _macs(node, shapes: dict[str, tuple]) -> int:
    left, right = (shapes[node.input[at]] for at in _OPERANDS[node.op_type])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    if "Conv" in node.op_type:  # weights are [out, in / groups, …], also where onnxruntime's QLinearConv has its channels last
        return math.prod(shapes[node.output[0]]) * math.prod(right[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(shapes[node.output[0]]) * left[-2 if transposed else -1]
