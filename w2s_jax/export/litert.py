"""The inference form of a student as TensorFlow Lite (LiteRT) files, float32 and int8, with nothing but builtin operators."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from w2s_jax.errors import W2SError
from w2s_jax.export.onnx import LOGITS, SIGNAL, as_tensorflow, quiet
from w2s_jax.runtime.litert import CHECKSUM, MEMBER, checksum, read

#: Kernels with fewer weights stay float32 in an int8 file, as TensorFlow's own converter has it: they are no part of its size.
LEAST_WEIGHTS = 1024
#: The version of CONV_2D with int8 weights per channel between float32 images.
HYBRID_CONVOLUTION = 5


def convert(forward: Callable, weights, outputs: int, minimum_samples: int, facts: dict[str, str]) -> bytes:
    """A JAX function as a float32 .tflite file.

    Args:
        forward: (weights, float32 [1, T]) → [1, outputs], for every T from ``minimum_samples`` on, as ``deploy`` gives it.
        weights: a tree of arrays.
        outputs: how many.
        minimum_samples: the shortest T.
        facts: what the file says of itself.

    Returns:
        The file's content: input ``signal`` [1, time], of which time is dynamic, output ``logits`` [1, outputs], and the facts
        as ``w2s_jax.json`` in a zip archive behind the network.

    Raises:
        W2SError: the function needs an operator that TensorFlow Lite does not have, or has other outputs.
    """
    with quiet(), _silence_stderr():
        import tensorflow as tf

        graph, leaves = as_tensorflow(forward, weights, minimum_samples)
        signal = tf.TensorSpec([1, None], tf.float32, name=SIGNAL)
        traced = tf.compat.v1.wrap_function(lambda signal: graph(signal, *map(tf.constant, leaves)), [signal])
        (logits,) = traced.outputs
        if logits.shape != (1, outputs):
            raise W2SError(f"expected a function with the outputs [1, {outputs}], got {logits.shape}")
        settled = _settle_shapes(traced, (minimum_samples + 16_003, minimum_samples + 29_009))

        def whole(signal):
            return tf.identity(*tf.graph_util.import_graph_def(settled, {SIGNAL: signal}, [logits.name]), name=LOGITS)

        function = tf.compat.v1.wrap_function(whole, [signal])
        try:
            network = tf.lite.TFLiteConverter.from_concrete_functions([function], function).convert()
        except Exception as error:  # of several classes, with the whole graph as text
            raise W2SError(f"TensorFlow Lite cannot hold this function: {' '.join(str(error).split())[:300]}") from error
    return _describe(network, facts)


def quantize_weights(content: bytes, facts: dict[str, str]) -> bytes:
    """A float32 .tflite file with int8 weights per output channel in the convolutions behind the logarithm.

    The interpreter measures the range of each image at run time and quantises it too ("hybrid" convolutions), so no
    calibration is needed. All before the logarithm stays float32, as does the softmax: a spectrum spans more than 8 bits.
    Depthwise convolutions stay float32: they have few weights, and their hybrid kernel is slower than the float32 one.

    Args:
        content: what ``convert`` returned.
        facts: what the new file says of itself.
    """
    with quiet():
        from tensorflow.lite.python import schema_py_generated as schema
        from tensorflow.lite.tools import flatbuffer_utils
    network, _ = read(content)
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(network))
    (graph,) = model.subgraphs
    codes = [model.operatorCodes[operator.opcodeIndex] for operator in graph.operators]
    logarithm = [code.builtinCode for code in codes].index(schema.BuiltinOperator.LOG)
    for operator, code in list(zip(graph.operators, codes, strict=True))[logarithm:]:
        if code.builtinCode != schema.BuiltinOperator.CONV_2D:
            continue
        kernel = graph.tensors[operator.inputs[1]]  # [out, height, width, in]
        values = np.frombuffer(bytes(model.buffers[kernel.buffer].data), np.float32).reshape(kernel.shape)
        if values.size < LEAST_WEIGHTS:
            continue
        code.version = max(code.version, HYBRID_CONVOLUTION)
        scale = np.abs(values).max(axis=(1, 2, 3)) / 127
        scale[scale == 0] = 1
        kernel.type = schema.TensorType.INT8
        kernel.quantization = schema.QuantizationParametersT()
        kernel.quantization.scale = scale.astype(np.float32)
        kernel.quantization.zeroPoint = np.zeros(len(scale), np.int64)
        kernel.quantization.quantizedDimension = 0
        rounded = np.round(values / scale[:, None, None, None]).astype(np.int8)
        model.buffers[kernel.buffer].data = np.frombuffer(rounded.tobytes(), np.uint8)
    return _describe(bytes(flatbuffer_utils.convert_object_to_bytearray(model)), facts)


def _settle_shapes(function, lengths: tuple[int, int]):
    """The GraphDef of a function whose Reshape targets are constants with one -1 instead of arithmetic on the length.

    With computed targets the interpreter would know no shape before it runs, allocate each image anew and refuse its fast
    kernels: it takes nearly twice as long.
    """
    import tensorflow as tf

    definition = function.graph.as_graph_def()
    reshapes = [node for node in definition.node if node.op == "Reshape"]
    targets = [node.input[1] if ":" in node.input[1] else f"{node.input[1]}:0" for node in reshapes]
    probe = function.prune(f"{SIGNAL}:0", [function.graph.get_tensor_by_name(target) for target in targets])
    for node, first, second in zip(reshapes, *(probe(tf.zeros([1, length])) for length in lengths), strict=True):
        first, second = first.numpy(), second.numpy()
        if np.sum(first != second) <= 1:
            target = tf.make_tensor_proto(np.where(first != second, -1, first), node.attr["Tshape"].type)
            constant = definition.node.add(op="Const", name=f"{node.name}/settled")
            constant.attr["dtype"].type = target.dtype
            constant.attr["value"].tensor.CopyFrom(target)
            node.input[1] = constant.name
    return definition


def _describe(network: bytes, facts: dict[str, str]) -> bytes:
    """The network with its facts behind it; the same content for the same arguments."""
    file = io.BytesIO(network)
    with zipfile.ZipFile(file, "a") as archive:  # ZipInfo's own date is a constant
        archive.writestr(zipfile.ZipInfo(MEMBER), json.dumps({**facts, CHECKSUM: checksum(network)}, ensure_ascii=False))
    return file.getvalue()


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Keep what the converter's C++ writes off the terminal, which no log level stops; what failed comes as an exception."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
