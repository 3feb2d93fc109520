"""Graphs of the Wav2Small family that are built operator by operator, where that is smaller or faster than converting them.

``integer`` computes in eight bits with onnxruntime's own operators; ``chunked`` hears a long recording piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from w2s_jax.export import deploy
from w2s_jax.export.compact import Pieces, fourier, fourier_values, rounded, scattered, unpacked
from w2s_jax.export.onnx import LOGITS, OPSET, SIGNAL, session
from w2s_jax.export.quantize import COVERAGE, best_coverage, covered
from w2s_jax.models.frontend import MEL_FLOOR, NORM_EPSILON
from w2s_jax.models.wav2small import Wav2Small, Wav2Small17K

#: Besides whole blocks of outputs, onnxruntime's fast convolution of eight-bit numbers needs inputs in multiples of this.
INPUTS = 4
#: Tokens of which no sum may overflow, whatever their scores: 17 minutes of Wav2Small's.
SAFE_TOKENS = 1 << 18
#: onnxruntime's own operators.
MICROSOFT = "com.microsoft"
NONE = np.array(0, np.uint8)


class Image(NamedTuple):
    """Eight-bit numbers in a graph: the values are ``(numbers - zero) * scale``."""

    name: str
    scale: np.float32
    zero: np.ndarray


def fits(student) -> bool:
    """Whether a student is one whose graphs are built here."""
    return isinstance(student, Wav2Small | Wav2Small17K)


def quantize_direct(
    student,
    variables: dict,
    fp32,
    waves: Sequence[np.ndarray],
    progress: Callable[[str], object] | None = None,
    coverages: Sequence[float] = COVERAGE,
    largest: int = 63,
    four_bits: bool = False,
) -> tuple:
    """``integer`` with the ranges that suit real audio best.

    Args:
        student, variables: of the Wav2Small family.
        fp32: its fp32 graph, simplified.
        waves: float32 [T] each, real audio of the kind that the model will hear; lengths may differ.
        progress: called with a line of text now and then.
        coverages: shares of a tensor's values that its range covers, candidates.
        largest: as for ``integer``.
        four_bits: store the layers of a Wav2Small's attention pooling in four bits.

    Returns:
        The model, and a dict: ``coverage`` (the chosen one), ``candidates`` (coverage → worst CCC on ``waves``).
    """
    ends, moments = _measured(fp32, waves, coverages)
    given = moments if four_bits else None
    return best_coverage(
        lambda coverage: integer(student, variables, ends[coverage], largest, given), fp32, waves, progress, coverages
    )  # fmt: skip


def integer(student, variables: dict, ends: Sequence[float], largest: int = 63, moments: np.ndarray | None = None):
    """A Wav2Small in eight bits, for onnxruntime.

    From the log-mel image to the tokens everything is an eight-bit number. Normalisation, spectrum, mel power, logarithm, the
    softmax over time with its weighted sum and the output layer are float32, because eight bits destroy them (a softmax weight
    is about 1 / tokens). The image lies in memory as [time, mel, channel]; the first convolution has mel bands for channels,
    because with one channel the vector unit would idle.

    Args:
        student, variables: of the Wav2Small family.
        ends: where the ranges of the logarithm and of each ReLU end.
        largest: of the weights' whole numbers. 63 is right everywhere; where two products are added in 16 bits (x86 without
            VNNI), two times 255 · 127 overflows.
        moments: second moments of the tokens [channel · mel, channel · mel]. With them the layers of the attention pooling are
            stored in four bits, rounded so that they err least on such tokens.

    Returns:
        A ModelProto with input ``signal`` [1, time] and output ``logits`` [1, dimensions].
    """
    pieces = Pieces()
    image = _log_mel(pieces, student, variables, ends[0])
    channels = student.channels + -student.channels % deploy.BLOCK
    mels = 1 + (student.n_mels - 1) // student.stride
    reach = student.kernel // 2
    layers = zip(deploy.trunk_layers(student, variables), ends[1:], strict=True)
    for number, ((kernel, bias), end) in enumerate(layers, start=1):
        numbers, scales = rounded(kernel.transpose(0, 1, 3, 2), 0, largest)  # [out, in, time, mel]
        scales = scales.ravel()
        offsets = np.rint(bias / (image.scale * scales.astype(np.float64))).astype(np.int32)
        more = channels - len(scales)
        scales = np.pad(scales, (0, more), constant_values=1)
        offsets = pieces.padded(pieces.constant(offsets), [0], [more])
        attributes = {"kernel_shape": [student.kernel] * 2, "pads": [reach] * 4}
        if number == 1:
            kernel = _banded(pieces, numbers[:, 0], student.n_mels, mels, student.stride, more)
            scales, offsets = (pieces.node("Tile", x, np.array([mels])) for x in (scales, offsets))
            attributes = {"kernel_shape": [student.kernel, 1], "pads": [reach, 0] * 2, "strides": [student.stride, 1]}
        else:
            kernel = pieces.padded(pieces.constant(numbers), [0] * 4, [more, channels - numbers.shape[1], 0, 0])
        made = np.float32(end / 255 or 1)  # the range begins at 0: so the convolution is the ReLU as well
        zeros = np.zeros(channels * (mels if number == 1 else 1), np.int8)
        inputs = (image.name, image.scale, image.zero, kernel, scales, zeros, made, NONE, offsets)
        x = pieces.node("QLinearConv", *inputs, domain=MICROSOFT, channels_last=1, **attributes)
        if number == 1:
            x = pieces.reshape(x, 1, -1, mels, channels)
        if number == student.before:
            x = pieces.node("NhwcMaxPool", x, domain=MICROSOFT, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
            mels = (mels + 1) // 2
        image = Image(x, made, NONE)
    pooled = _pooled(pieces, student, variables, image, mels, channels, largest, moments)
    _finish(pieces, student, variables, pooled)
    return _model(pieces, {SIGNAL: (1, "time")}, {LOGITS: (1, student.dimensions)})


def chunked(model, student, variables: dict) -> None:
    """Turn the graph of ``deploy.in_chunks`` into one that is called once for each piece of a recording.

    The softmax-weighted mean is a quotient of two sums over time, which go from call to call.

    Args:
        model: a ModelProto with outputs ``value`` and ``score`` [features, tokens], changed in place. Further inputs are:
            ``state`` float32 [3, features]: of the pieces before, the largest score, the sum of the weights and the weighted
            sum; ``runtime.predictor.first_state`` at first. ``first`` and ``last``, int64 [1]: tokens of this piece that count,
            the end not included.
            Its outputs become ``logits`` [1, dimensions] of all pieces up to this one, and ``next``, the new state.
        student, variables: of the Wav2Small family.
    """
    from onnx import TensorProto, helper

    pieces = Pieces("t")
    add = pieces.node
    along, across = np.array([1]), np.array([0])
    value, score = (add("Slice", name, "first", "last", along) for name in ("value", "score"))
    largest, total, weighted = (
        pieces.reshape(add("Slice", "state", np.array([row]), np.array([row + 1]), across), -1, 1) for row in range(3)
    )
    new = add("Max", largest, add("ReduceMax", score, axes=[1], keepdims=1))
    weight = add("Exp", add("Sub", score, new))
    before = add("Exp", add("Sub", largest, new))
    total = add("Add", add("Mul", total, before), add("ReduceSum", weight, along, keepdims=1))
    weighted = add("Add", add("Mul", weighted, before), add("ReduceSum", add("Mul", weight, value), along, keepdims=1))
    add("Transpose", add("Concat", new, total, weighted, axis=1), output="next", perm=[1, 0])
    pooled = pieces.reshape(add("Div", weighted, total), 1, -1)
    _finish(pieces, student, variables, pooled, by_channel=True)
    features = model.graph.output[0].type.tensor_type.shape.dim[0].dim_value
    model.graph.input.extend(
        [
            helper.make_tensor_value_info("state", TensorProto.FLOAT, (3, features)),
            helper.make_tensor_value_info("first", TensorProto.INT64, (1,)),
            helper.make_tensor_value_info("last", TensorProto.INT64, (1,)),
        ]
    )
    del model.graph.output[:]
    for name, shape in ((LOGITS, (1, student.dimensions)), ("next", (3, features))):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    model.graph.node.extend(pieces.nodes)
    model.graph.initializer.extend(pieces.constants)


def _measured(model, waves: Sequence[np.ndarray], coverages: Sequence[float]) -> tuple[dict[float, list[float]], np.ndarray]:
    """Where the ranges of the logarithm's and of each ReLU's values end, for each coverage the widest over all waves; and the
    mean of the tokens' second moments [tokens, tokens]. ``model`` is a student's fp32 graph."""
    import onnx

    probe = type(model)()
    probe.CopyFrom(model)
    names = [node.output[0] for op_type in ("Log", "Relu") for node in model.graph.node if node.op_type == op_type]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    one = session(probe)
    ends = {coverage: [0.0] * len(names) for coverage in coverages}
    moments = 0
    for wave in waves:
        values = one.run(names, {SIGNAL: wave[None]})
        for at, tensor in enumerate(values):
            for coverage, (_, high) in covered(tensor.ravel(), coverages).items():
                ends[coverage][at] = max(ends[coverage][at], high)
        tokens = values[-1].reshape(-1, values[-1].shape[-1]).astype(np.float64)
        moments = moments + tokens @ tokens.T / tokens.shape[1] / len(waves)
    return ends, moments


def _log_mel(pieces: Pieces, student, variables: dict, end: float) -> Image:
    """The normalised waveform's natural logarithm of the mel power, [1, time, 1, mel] in eight bits."""
    add = pieces.node
    ones = np.ones((1, 1, 1, deploy.TERMS), np.float32)
    signal = pieces.reshape(SIGNAL, 1, 1, 1, -1)
    samples = add("Cast", add("Size", SIGNAL), to=1)  # 1 is float32

    def mean(x: str) -> str:  # as deploy._exact_mean
        for _ in range(3):
            x = add("Conv", x, ones, strides=[1, deploy.TERMS], pads=[0, 0, 0, deploy.TERMS - 1])
        return add("Div", add("ReduceSum", x, np.array([3]), keepdims=1), samples)

    signal = add("Sub", signal, mean(signal))
    power = mean(add("Mul", signal, signal))
    signal = add("Div", signal, add("Sqrt", add("Add", power, np.float32(NORM_EPSILON))))
    kernels, mel = deploy.front_end(variables)
    if kernels.shape[0] == kernels.shape[1] and np.abs(kernels - fourier_values(student.n_fft)).max() <= 2e-7:
        made = fourier(pieces, student.n_fft)
    else:  # a checkpoint from elsewhere may have kernels of its own
        made = pieces.constant(kernels.astype(np.float32))
    spectrum = add("Conv", signal, pieces.reshape(made, -1, 1, 1, student.n_fft), strides=[1, student.hop])
    bands = student.n_mels + -student.n_mels % INPUTS
    mel = np.pad(mel.T, ((0, bands - student.n_mels), (0, 0))).astype(np.float32)
    power = add("Conv", add("Mul", spectrum, spectrum), pieces.reshape(scattered(pieces, mel), *mel.shape, 1, 1))
    logarithm = add("Log", add("Max", power, np.float32(MEL_FLOOR)))
    # padding has to be exactly 0, a whole number of steps from the floor
    floor = float(np.log(MEL_FLOOR))
    end = max(end, 1.0)
    zero = round(255 * floor / (floor - end))
    scale = np.float32(max(-floor / zero, end / (255 - zero)))
    zero = np.array(zero, np.uint8)
    numbers = pieces.reshape(add("QuantizeLinear", logarithm, scale, zero), bands, -1)
    numbers = add("Transpose", numbers, perm=[1, 0])  # a matrix: of images onnxruntime's is slow
    return Image(pieces.reshape(numbers, 1, -1, 1, bands), scale, zero)


def _banded(pieces: Pieces, numbers: np.ndarray, inputs: int, outputs: int, stride: int, more: int) -> str:
    """A convolution over mel with one channel as a matrix from mel bands to (mel band, channel).

    Args:
        numbers: int8 [channels, time, mel].
        inputs, outputs: mel bands before and after.
        stride: over mel.
        more: zeros that fill up the channels.

    Returns:
        int8 [outputs · channels, inputs and zeros, time, 1]. The rows of a banded matrix are shifted copies of one another; a
        row that is ``stride`` too long, repeated without end and cut into rows of the right length, is just that.
    """
    channels, times, taps = numbers.shape
    width = inputs + taps - 1
    row = pieces.padded(pieces.constant(numbers), [0] * 3, [0, 0, width + stride - taps])
    rows = pieces.node("Tile", row, np.array([1, 1, outputs]))
    rows = pieces.node("Slice", rows, np.array([0]), np.array([outputs * width]), np.array([2]))
    rows = pieces.reshape(rows, channels, times, outputs, width)
    rows = pieces.node("Slice", rows, np.array([taps // 2]), np.array([taps // 2 + inputs]), np.array([3]))
    rows = pieces.padded(rows, [0] * 4, [more, 0, 0, -inputs % INPUTS])
    rows = pieces.node("Transpose", rows, perm=[2, 0, 3, 1])
    return pieces.reshape(rows, outputs * (channels + more), inputs + -inputs % INPUTS, times, 1)


def _pooled(pieces: Pieces, student, variables: dict, image: Image, mels: int, channels: int, largest: int, moments) -> str:
    """The pooling over time of an image [1, time, mels, channels]: → float32 [1, features], (mel, channel) as the image."""
    params = deploy.float64(variables["params"])
    add = pieces.node

    def layer(weights: np.ndarray, centred: bool = False, moments: np.ndarray | None = None) -> tuple[str, float]:
        """Image times ``weights`` [channel, mel or 1, out] → float32 [time or time · mel, out]; and the bound of its values.

        ``centred`` adds to each output what makes its bounds symmetric.
        """
        rows, outs = weights.shape[:2], weights.shape[2]
        flat = weights.reshape(-1, outs)
        numbers, scales = rounded(flat, 1, largest) if moments is None else _rounded_together(flat, moments)
        made = pieces.constant(numbers) if moments is None else unpacked(pieces, numbers)
        made = add("Transpose", pieces.reshape(made, *rows, outs), perm=[1, 0, 2])
        made = pieces.reshape(pieces.padded(made, [0] * 3, [0, channels - rows[0], 0]), rows[1] * channels, outs)
        ends = 255 * np.stack([np.minimum(numbers, 0).sum(axis=0), np.maximum(numbers, 0).sum(axis=0)]).astype(np.float64)
        offsets = np.rint(-ends.mean(axis=0) * centred).astype(np.int32)
        bound = np.abs((ends + offsets) * image.scale * scales.ravel()).max()
        x = pieces.reshape(image.name, -1, rows[1] * channels)
        zeros = np.zeros(outs, np.int8)
        offsets = pieces.reshape(pieces.constant(offsets), 1, -1) if centred else None
        inputs = (x, image.scale, NONE, made, scales.ravel(), zeros, *([offsets] if centred else []))
        return add("QGemm", *inputs, domain=MICROSOFT), float(bound)

    def mean(x: str, weight: str | None = None) -> str:
        if weight is None:
            return add("ReduceMean", x, axes=[0], keepdims=1)
        total = add("ReduceSum", weight, np.array([0]), keepdims=1)
        return add("Div", add("ReduceSum", add("Mul", x, weight), np.array([0]), keepdims=1), total)

    features = mels * student.channels
    pooling = getattr(student, "pooling", "attention")
    if pooling == "attention":
        if isinstance(student, Wav2Small):
            pool = deploy.attention(student, variables)
            value, score = (pool[name]["kernel"].reshape(student.channels, mels, features) for name in ("lin", "sof"))
        else:
            value, score = (params["pool"][name]["kernel"][:, None] for name in ("lin", "sof"))
        value, most = layer(value, moments=moments)
        score, bound = layer(score, centred=True, moments=moments)
        value, score = (pieces.reshape(x, -1, features) for x in (value, score))
        if not _exp_is_safe(bound, most):
            # onnxruntime's maximum down a column is slow, its pooling is not
            top = add(
                "MaxPool", pieces.reshape(score, 1, 1, -1, features), kernel_shape=[32, 1], strides=[32, 1], pads=[0, 0, 31, 0]
            )
            top = add("ReduceMax", pieces.reshape(top, -1, features), axes=[0], keepdims=1)
            score = add("Sub", score, top)
        return mean(value, add("Exp", score))
    kernel, bias = params["mix"]["kernel"][0, 0], params["mix"]["bias"].astype(np.float32)
    mixed = add("Add", layer(kernel[:, None])[0], bias)
    mixed = pieces.reshape(mixed, -1, features)
    average = mean(mixed)
    if pooling == "mean":
        return average
    distance = add("Sub", mixed, average)
    deviation = add("Sqrt", add("Add", mean(add("Mul", distance, distance)), np.float32(1e-5)))  # as models.pooling has it
    return add("Concat", average, deviation, axis=1)


def _exp_is_safe(score: float, value: float) -> bool:
    """Whether no input makes a sum of exp(score), or of exp(score) · value, overflow in float32, or every exp(score) vanish.

    ``score`` and ``value`` are the largest magnitudes that these can have at all.
    """
    return bool(score + np.log(SAFE_TOKENS * max(1.0, value)) < np.log(np.finfo(np.float32).max))


def _finish(pieces: Pieces, student, variables: dict, pooled: str, by_channel: bool = False) -> None:
    """The output layer, on what the pooling leaves, float32 [1, features]: (channel, mel) ``by_channel``, or (mel, channel)."""
    params = deploy.float64(variables["params"])
    add, adv = pieces.node, params["adv"]
    if isinstance(student, Wav2Small17K):
        x = pieces.reshape(pooled, student.channels, -1) if by_channel else add(
            "Transpose", pieces.reshape(pooled, -1, student.channels), perm=[1, 0]
        )  # fmt: skip
        x = add("Add", x, params["pool"]["lin"]["bias"][:, None].astype(np.float32))
        square = add("MatMul", x, add("Transpose", x, perm=[1, 0]))
        pooled = pieces.reshape(add("Concat", x, square, axis=1), 1, -1)
    elif student.pooling == "attention":
        adv["bias"] = deploy.attention(student, variables)["lin"]["bias"] @ adv["kernel"] + adv["bias"]
    elif not by_channel:  # the image is (mel, channel), the layer wants (channel, mel)
        parts = 2 if student.pooling == "statistics" else 1
        places = np.arange(len(adv["kernel"])).reshape(parts, student.channels, -1).transpose(0, 2, 1)
        adv["kernel"] = adv["kernel"][places.ravel()]
    add("Gemm", pooled, adv["kernel"].astype(np.float32), adv["bias"].astype(np.float32), output=LOGITS)


def _rounded_together(weights: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``rounded`` to numbers from -8 to 7, per column of [in, out], where each rounding makes up for those before it.

    What rounding one input's weights does to the outputs is taken back, as far as the inputs correlate, by those not rounded
    yet (GPTQ, arXiv 2210.17323). Of several scales that one is taken whose roundings, alone, err least.

    Args:
        weights: float64 [in, out].
        moments: second moments of the inputs [in, in].
    """
    weights = weights.copy()
    power = np.diag(moments)
    highest = np.abs(weights).max(axis=0)
    highest[highest == 0] = 7  # a column of zeros; any scale will do
    candidates = highest / 7 * np.linspace(0.5, 1, 26)[:, None]
    errors = [
        (power[:, None] * (weights - scale * np.clip(np.rint(weights / scale), -8, 7)) ** 2).sum(axis=0) for scale in candidates
    ]
    scales = np.take_along_axis(candidates, np.argmin(errors, axis=0)[None], axis=0)[0].astype(np.float32)
    order = np.argsort(-power)  # the loudest first: the others make up for them
    damped = moments + 0.01 * power.mean() * np.eye(len(moments))
    root = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    numbers = np.zeros(weights.shape, np.int8)
    for at, row in enumerate(order):
        numbers[row] = np.clip(np.rint(weights[row] / scales), -8, 7)
        error = (weights[row] - numbers[row] * scales) / root[at, at]
        weights[order[at + 1 :]] -= np.outer(root[at, at + 1 :], error)
    return numbers, scales[None]


def _model(pieces: Pieces, inputs: dict[str, tuple], outputs: dict[str, tuple]):
    from onnx import TensorProto, helper

    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in part.items()]
        for part in (inputs, outputs)
    ]
    graph = helper.make_graph(pieces.nodes, "w2s_jax", *ends, pieces.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
