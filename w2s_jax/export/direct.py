"""ONNX graphs that are built from a plan operator by operator, where that is smaller or faster than converting JAX.

``build_int8`` computes in eight bits with onnxruntime's own operators; ``carry_state`` lets a graph take a long recording
piece by piece. Both are for plans like Wav2Small's: log-mel front end, a chain of convolutions with ReLU and max pools, pooling
over time, a dense layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

import numpy as np

from w2s_jax.export.compact import GraphBuilder, fourier_values, make_fourier_kernels, round_to_integers, scatter, unpack
from w2s_jax.export.deploy import TERMS
from w2s_jax.export.onnx import LOGITS, OPSET, SIGNAL, session
from w2s_jax.export.plan import CHANNEL_BLOCK
from w2s_jax.export.quantize import COVERAGE, choose_coverage, cover
from w2s_jax.models.plan import (
    AttentionPooling,
    Convolution,
    Dense,
    Gram,
    Layer,
    Log,
    MaxPool,
    Mel,
    MomentPooling,
    Normalise,
    Plan,
    Spectrum,
    Tokens,
)

FRONT_END = (Normalise, Spectrum, Mel, Log)
#: What may follow the trunk, and what a plan can be besides "int8" then: "chunked" needs one softmax over time, four bits need
#: the large matrices of tokens.
HEADS = {
    (Tokens, AttentionPooling, Dense): ("attention", "tokens"),
    (AttentionPooling, Gram, Dense): ("attention",),
    (Convolution, Tokens, MomentPooling, Dense): (),
}
#: Besides whole blocks of outputs, onnxruntime's fast convolution of eight-bit numbers needs inputs in multiples of this.
INPUTS = 4
#: Tokens of which no sum may overflow, whatever their scores: 17 minutes of Wav2Small's.
SAFE_TOKENS = 1 << 18
#: onnxruntime's own operators.
MICROSOFT = "com.microsoft"
NONE = np.array(0, np.uint8)


class Image(NamedTuple):
    """Eight-bit numbers in a graph: the values are ``(numbers - zero) * scale``; ``channels`` without those of zeros alone."""

    name: str
    scale: np.float32
    zero: np.ndarray
    channels: int


def trunk_of(plan: Plan) -> tuple[Layer, ...]:
    """The convolutions with ReLU and the max pools right behind the front end."""
    return tuple(
        takewhile(
            lambda layer: isinstance(layer, MaxPool) or isinstance(layer, Convolution) and layer.activation == "relu",
            plan.layers[len(FRONT_END) :],
        )
    )


def head_of(plan: Plan) -> tuple[Layer, ...]:
    """The layers behind the trunk."""
    return plan.layers[len(FRONT_END) + len(trunk_of(plan)) :]


def find_properties(plan: Plan | None) -> tuple[str, ...] | None:
    """What graphs of a plan can be built here besides eight bits: values of ``HEADS``; None if none can, or without a plan.

    The weights may be shapes only; so a 1×1 convolution before attention over tokens may still be there (see ``plan.merge``).
    """
    if plan is None or tuple(map(type, plan.layers[: len(FRONT_END)])) != FRONT_END:
        return None
    trunk, head = trunk_of(plan), head_of(plan)
    convolutions = [layer for layer in trunk if isinstance(layer, Convolution)]
    if not convolutions or convolutions[0] is not trunk[0] or not head or getattr(head[-1], "activation", None):
        return None
    if any(second.stride > 1 or second.kernel.shape[1] != first.kernel.shape[0] for first, second in pairwise(convolutions)):
        return None
    if isinstance(head[0], Convolution) and (head[0].activation or head[0].stride > 1 or head[0].kernel.shape[2] > 1):
        return None
    types = tuple(map(type, head))
    return HEADS.get(types[1:] if types[:3] == (Convolution, Tokens, AttentionPooling) else types)


def quantize_direct(
    plan: Plan,
    fp32,
    waves: Sequence[np.ndarray],
    message: Callable[[str], object] | None = None,
    coverages: Sequence[float] = COVERAGE,
    largest: int = 63,
    four_bits: bool = False,
) -> tuple:
    """``build_int8`` with the ranges that suit real audio best.

    Args:
        plan: merged; one for which ``find_properties`` is not None.
        fp32: its fp32 graph, simplified.
        waves: float32 [T] each, real audio like that which the model is for; lengths may differ.
        message: called with a line of text now and then.
        coverages: shares of a tensor's values that its range covers, candidates.
        largest: as for ``build_int8``.
        four_bits: store the matrices of the attention over tokens in four bits.

    Returns:
        The model, and a dict: ``coverage`` (the chosen one), ``candidates`` (coverage → worst CCC on ``waves``).
    """
    ends, moments = measure_ranges(fp32, waves, coverages)
    given = moments if four_bits else None
    return choose_coverage(
        lambda coverage: build_int8(plan, ends[coverage], largest, given), fp32, waves, message, coverages
    )  # fmt: skip


def build_int8(plan: Plan, ends: Sequence[float], largest: int = 63, moments: np.ndarray | None = None):
    """A plan in eight bits, for onnxruntime.

    From the log-mel image to the tokens everything is an eight-bit number. Normalisation, spectrum, mel power, logarithm, the
    softmax over time with its weighted sum and the output layer are float32, because eight bits destroy them (a softmax weight
    is about 1 / tokens). The image lies in memory as [time, mel, channel]; the first convolution has mel bands for channels,
    because with one channel the vector unit would idle.

    Args:
        plan: merged; one for which ``find_properties`` is not None.
        ends: where the ranges of the logarithm and of each ReLU end.
        largest: of the weights' whole numbers. 63 is right everywhere; where two products are added in 16 bits (x86 without
            VNNI), two times 255 · 127 overflows.
        moments: second moments of the tokens [channel · mel, channel · mel]. With them the matrices of the attention pooling
            are stored in four bits, rounded so that they err least on such tokens.

    Returns:
        A ModelProto with input ``signal`` [1, time] and output ``logits`` [1, dimensions].
    """
    builder, ends = GraphBuilder(), iter(ends)
    _, _, mel, _ = plan.layers[: len(FRONT_END)]
    image, mels = _log_mel(builder, plan, next(ends)), mel.matrix.shape[1]
    first = True
    for layer in trunk_of(plan):
        if isinstance(layer, MaxPool):
            sizes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
            image = image._replace(name=builder.node("NhwcMaxPool", image.name, domain=MICROSOFT, **sizes))
            mels = (mels + 1) // 2
        else:
            image = _convolve(builder, image, layer, next(ends), largest, mels if first else None)
            mels, first = -(-mels // layer.stride), False
    head = head_of(plan)
    _finish(builder, head, _pool(builder, head, image, mels, largest, moments))
    return _model(builder, {SIGNAL: (1, "time")}, {LOGITS: (1, head[-1].kernel.shape[1])})


def _convolve(
    builder: GraphBuilder, image: Image, layer: Convolution, end: float, largest: int, bands: int | None = None
) -> Image:  # fmt: skip
    """A convolution with ReLU, whose range ends at ``end``; its channels are filled up with zeros to whole blocks.

    Args:
        bands: of the log-mel image, which has one channel; None for any other image.
    """
    outputs, size, stride = len(layer.kernel), layer.kernel.shape[2], layer.stride
    numbers, scales = round_to_integers(layer.kernel.transpose(0, 1, 3, 2), 0, largest)  # [out, in, time, mel]
    scales = scales.ravel()
    offsets = np.rint(layer.bias / (image.scale * scales.astype(np.float64))).astype(np.int32)
    more, reach = -outputs % CHANNEL_BLOCK, size // 2
    scales = np.pad(scales, (0, more), constant_values=1)
    offsets = builder.pad(builder.constant(offsets), [0], [more])
    attributes = {"kernel_shape": [size] * 2, "pads": [reach] * 4}
    mels = 1
    if bands:
        mels = -(-bands // stride)
        kernel = _band_matrix(builder, numbers[:, 0], bands, mels, stride, more)
        scales, offsets = (builder.node("Tile", x, np.array([mels])) for x in (scales, offsets))
        attributes = {"kernel_shape": [size, 1], "pads": [reach, 0] * 2, "strides": [stride, 1]}
    else:
        kernel = builder.pad(builder.constant(numbers), [0] * 4, [more, -numbers.shape[1] % CHANNEL_BLOCK, 0, 0])
    made = np.float32(end / 255 or 1)  # the range begins at 0: so the convolution is the ReLU as well
    zeros = np.zeros((outputs + more) * mels, np.int8)
    inputs = (image.name, image.scale, image.zero, kernel, scales, zeros, made, NONE, offsets)
    x = builder.node("QLinearConv", *inputs, domain=MICROSOFT, channels_last=1, **attributes)
    if bands:
        x = builder.reshape(x, 1, -1, mels, outputs + more)
    return Image(x, made, NONE, outputs)


def carry_state(model, plan: Plan) -> None:
    """Turn the graph of ``deploy.split_at_softmax`` into one that is called once for each piece of a recording.

    The softmax-weighted mean is a quotient of two sums over time, which go from call to call.

    Args:
        model: a ModelProto with outputs ``value`` and ``score`` [features, tokens], changed in place. Further inputs are:
            ``state`` float32 [3, features]: of the pieces before, the largest score, the sum of the weights and the weighted
            sum; ``runtime.predictor.first_state`` at first. ``first`` and ``last``, int64 [1]: tokens of this piece that count,
            the end not included.
            Its outputs become ``logits`` [1, dimensions] of all pieces up to this one, and ``next``, the new state.
        plan: merged, with attention over time.
    """
    from onnx import TensorProto, helper

    builder = GraphBuilder("t")
    add = builder.node
    along, across = np.array([1]), np.array([0])
    value, score = (add("Slice", name, "first", "last", along) for name in ("value", "score"))
    largest, total, weighted = (
        builder.reshape(add("Slice", "state", np.array([row]), np.array([row + 1]), across), -1, 1) for row in range(3)
    )
    new = add("Max", largest, add("ReduceMax", score, axes=[1], keepdims=1))
    weight = add("Exp", add("Sub", score, new))
    before = add("Exp", add("Sub", largest, new))
    total = add("Add", add("Mul", total, before), add("ReduceSum", weight, along, keepdims=1))
    weighted = add("Add", add("Mul", weighted, before), add("ReduceSum", add("Mul", weight, value), along, keepdims=1))
    add("Transpose", add("Concat", new, total, weighted, axis=1), output="next", perm=[1, 0])
    pooled = builder.reshape(add("Div", weighted, total), 1, -1)
    _finish(builder, head_of(plan), pooled, by_channel=True)
    features = model.graph.output[0].type.tensor_type.shape.dim[0].dim_value
    model.graph.input.extend(
        [
            helper.make_tensor_value_info("state", TensorProto.FLOAT, (3, features)),
            helper.make_tensor_value_info("first", TensorProto.INT64, (1,)),
            helper.make_tensor_value_info("last", TensorProto.INT64, (1,)),
        ]
    )
    del model.graph.output[:]
    for name, shape in ((LOGITS, (1, plan.layers[-1].kernel.shape[1])), ("next", (3, features))):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.constants)


def measure_ranges(
    model, waves: Sequence[np.ndarray], coverages: Sequence[float]
) -> tuple[dict[float, list[float]], np.ndarray]:
    """Where the ranges of the logarithm's and of each ReLU's values end, for each coverage the widest over all waves; and the
    mean of the tokens' second moments [tokens, tokens]. ``model`` is a student's fp32 graph.
    """
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
            for coverage, (_, high) in cover(tensor.ravel(), coverages).items():
                ends[coverage][at] = max(ends[coverage][at], high)
        tokens = values[-1].reshape(-1, values[-1].shape[-1]).astype(np.float64)
        moments = moments + tokens @ tokens.T / tokens.shape[1] / len(waves)
    return ends, moments


def _log_mel(builder: GraphBuilder, plan: Plan, end: float) -> Image:
    """The normalised waveform's natural logarithm of the mel power, [1, time, 1, mel] in eight bits."""
    add = builder.node
    normalise, spectrum, mel, log = plan.layers[: len(FRONT_END)]
    ones = np.ones((1, 1, 1, TERMS), np.float32)
    signal = builder.reshape(SIGNAL, 1, 1, 1, -1)
    samples = add("Cast", add("Size", SIGNAL), to=1)  # 1 is float32

    def mean(x: str) -> str:  # as deploy._exact_mean
        for _ in range(3):
            x = add("Conv", x, ones, strides=[1, TERMS], pads=[0, 0, 0, TERMS - 1])
        return add("Div", add("ReduceSum", x, np.array([3]), keepdims=1), samples)

    signal = add("Sub", signal, mean(signal))
    power = mean(add("Mul", signal, signal))
    signal = add("Div", signal, add("Sqrt", add("Add", power, np.float32(normalise.epsilon))))
    kernels = spectrum.real.T
    n_fft = kernels.shape[1]
    if kernels.shape == (n_fft, n_fft) and np.abs(kernels - fourier_values(n_fft)).max() <= 2e-7:
        made = make_fourier_kernels(builder, n_fft)
    else:  # a checkpoint from elsewhere may have kernels of its own
        made = builder.constant(kernels.astype(np.float32))
    parts = add("Conv", signal, builder.reshape(made, -1, 1, 1, n_fft), strides=[1, spectrum.hop])
    bands = mel.matrix.shape[1] + -mel.matrix.shape[1] % INPUTS
    matrix = np.pad(mel.matrix.T, ((0, bands - mel.matrix.shape[1]), (0, 0))).astype(np.float32)
    power = add("Conv", add("Mul", parts, parts), builder.reshape(scatter(builder, matrix), *matrix.shape, 1, 1))
    logarithm = add("Log", add("Max", power, np.float32(log.floor)))
    # padding has to be exactly 0, a whole number of steps from the floor
    floor = float(np.log(log.floor))
    end = max(end, 1.0)
    zero = round(255 * floor / (floor - end))
    scale = np.float32(max(-floor / zero, end / (255 - zero)))
    zero = np.array(zero, np.uint8)
    numbers = builder.reshape(add("QuantizeLinear", logarithm, scale, zero), bands, -1)
    numbers = add("Transpose", numbers, perm=[1, 0])  # a matrix: of images onnxruntime's is slow
    return Image(builder.reshape(numbers, 1, -1, 1, bands), scale, zero, 1)


def _band_matrix(builder: GraphBuilder, numbers: np.ndarray, inputs: int, outputs: int, stride: int, more: int) -> str:
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
    row = builder.pad(builder.constant(numbers), [0] * 3, [0, 0, width + stride - taps])
    rows = builder.node("Tile", row, np.array([1, 1, outputs]))
    rows = builder.node("Slice", rows, np.array([0]), np.array([outputs * width]), np.array([2]))
    rows = builder.reshape(rows, channels, times, outputs, width)
    rows = builder.node("Slice", rows, np.array([taps // 2]), np.array([taps // 2 + inputs]), np.array([3]))
    rows = builder.pad(rows, [0] * 4, [more, 0, 0, -inputs % INPUTS])
    rows = builder.node("Transpose", rows, perm=[2, 0, 3, 1])
    return builder.reshape(rows, outputs * (channels + more), inputs + -inputs % INPUTS, times, 1)


def _pool(builder: GraphBuilder, head: Sequence[Layer], image: Image, mels: int, largest: int, moments) -> str:
    """The pooling over time of an image [1, time, mels, channels]: → float32 [1, features].

    Features that are pooled as places of an image are ordered (mel, channel), as that image is.
    """
    add = builder.node
    channels = image.channels + -image.channels % CHANNEL_BLOCK

    def layer(weights: np.ndarray, centred: bool = False, moments: np.ndarray | None = None) -> tuple[str, float]:
        """Image times ``weights`` [channel, mel or 1, out] → float32 [time or time · mel, out]; and the bound of its values.

        ``centred`` adds to each output what makes its bounds symmetric.
        """
        rows, outs = weights.shape[:2], weights.shape[2]
        flat = weights.reshape(-1, outs)
        numbers, scales = round_to_integers(flat, 1, largest) if moments is None else _round_together(flat, moments)
        made = builder.constant(numbers) if moments is None else unpack(builder, numbers)
        made = add("Transpose", builder.reshape(made, *rows, outs), perm=[1, 0, 2])
        made = builder.reshape(builder.pad(made, [0] * 3, [0, channels - rows[0], 0]), rows[1] * channels, outs)
        ends = 255 * np.stack([np.minimum(numbers, 0).sum(axis=0), np.maximum(numbers, 0).sum(axis=0)]).astype(np.float64)
        offsets = np.rint(-ends.mean(axis=0) * centred).astype(np.int32)
        bound = np.abs((ends + offsets) * image.scale * scales.ravel()).max()
        x = builder.reshape(image.name, -1, rows[1] * channels)
        zeros = np.zeros(outs, np.int8)
        offsets = builder.reshape(builder.constant(offsets), 1, -1) if centred else None
        inputs = (x, image.scale, NONE, made, scales.ravel(), zeros, *([offsets] if centred else []))
        return add("QGemm", *inputs, domain=MICROSOFT), float(bound)

    def mean(x: str, weight: str | None = None) -> str:
        if weight is None:
            return add("ReduceMean", x, axes=[0], keepdims=1)
        total = add("ReduceSum", weight, np.array([0]), keepdims=1)
        return add("Div", add("ReduceSum", add("Mul", x, weight), np.array([0]), keepdims=1), total)

    if not isinstance(head[0], Convolution):
        pooling = next(layer for layer in head if isinstance(layer, AttentionPooling))
        places = mels if isinstance(head[0], Tokens) else 1  # of an image that are one token
        features = pooling.value.shape[1] * mels // places
        value, score = (matrix.reshape(image.channels, places, -1) for matrix in (pooling.value, pooling.score))
        value, most = layer(value, moments=moments)
        score, bound = layer(score, centred=True, moments=moments)
        value, score = (builder.reshape(x, -1, features) for x in (value, score))
        if not _exp_is_safe(bound, most):
            # onnxruntime's maximum down a column is slow, its pooling is not
            windows = {"kernel_shape": [32, 1], "strides": [32, 1], "pads": [0, 0, 31, 0]}
            top = add("MaxPool", builder.reshape(score, 1, 1, -1, features), **windows)
            top = add("ReduceMax", builder.reshape(top, -1, features), axes=[0], keepdims=1)
            score = add("Sub", score, top)
        return mean(value, add("Exp", score))
    mix, _, pooling, _ = head
    mixed = add("Add", layer(mix.kernel[:, :, 0, 0].T[:, None])[0], mix.bias.astype(np.float32))
    mixed = builder.reshape(mixed, -1, mels * len(mix.kernel))
    average = mean(mixed)
    if not pooling.deviation:
        return average
    distance = add("Sub", mixed, average)
    deviation = add("Sqrt", add("Add", mean(add("Mul", distance, distance)), np.float32(pooling.epsilon)))
    return add("Concat", average, deviation, axis=1)


def _exp_is_safe(score: float, value: float) -> bool:
    """Whether no input makes a sum of exp(score), or of exp(score) · value, overflow in float32, or every exp(score) vanish.

    ``score`` and ``value`` are the largest magnitudes that these can have at all.
    """
    return bool(score + np.log(SAFE_TOKENS * max(1.0, value)) < np.log(np.finfo(np.float32).max))


def _finish(builder: GraphBuilder, head: Sequence[Layer], pooled: str, by_channel: bool = False) -> None:
    """The layers behind the pooling, on what that left: float32 [1, features].

    Features of an image's places are ordered (mel, channel), or (channel, mel) where ``by_channel``.
    """
    add, dense = builder.node, head[-1]
    kernel = dense.kernel
    match head:
        case [AttentionPooling(bias=bias), Gram(), _]:
            x = builder.reshape(pooled, len(bias), -1) if by_channel else add(
                "Transpose", builder.reshape(pooled, -1, len(bias)), perm=[1, 0]
            )  # fmt: skip
            x = add("Add", x, bias[:, None].astype(np.float32))
            square = add("MatMul", x, add("Transpose", x, perm=[1, 0]))
            pooled = builder.reshape(add("Concat", x, square, axis=1), 1, -1)
        case [Convolution() as mix, _, MomentPooling() as pooling, _]:  # pooled (mel, channel); the layer wants (channel, mel)
            parts = 2 if pooling.deviation else 1
            places = np.arange(len(kernel)).reshape(parts, len(mix.kernel), -1).transpose(0, 2, 1)
            kernel = kernel[places.ravel()]
    add("Gemm", pooled, kernel.astype(np.float32), dense.bias.astype(np.float32), output=LOGITS)


def _round_together(weights: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round to numbers from -8 to 7, per column of [in, out], where each rounding makes up for those before it.

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


def _model(builder: GraphBuilder, inputs: dict[str, tuple], outputs: dict[str, tuple]):
    from onnx import TensorProto, helper

    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in part.items()]
        for part in (inputs, outputs)
    ]
    graph = helper.make_graph(builder.nodes, "w2s_jax", *ends, builder.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
