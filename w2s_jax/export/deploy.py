"""The inference form of each student: folded parameters, image as (channel, mel, time), nothing that only training needs.

Every folding is exact up to float32 rounding; ``export_student`` proves it against ``student.apply`` on every export.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import hard_sigmoid, relu

from w2s_jax.models.frontend import MEL_FLOOR, normalise
from w2s_jax.models.mobilenet import Bottleneck, Conv, Fused, MobileNetStudent, Separable, Universal
from w2s_jax.models.wav2small import Wav2Small, Wav2Small17K

Forward = Callable[[Array], Array]

#: The front end leaves natural logarithms; this turns them into dB.
DECIBEL = 10 / np.log(10)


def deploy(student: nn.Module, variables: dict, block: int = 1) -> Forward:
    """The function to export for a student: float32 [1, T] → logits [1, dimensions].

    Args:
        student, variables: as ``checkpoint.load_student`` returns them.
        block: the channels between the trunk's layers are filled with zeros up to a multiple of it, which changes no result.
            onnxruntime's int8 convolution has a fast kernel for multiples of 16 only.

    Returns:
        A pure function. A student without an inference form of its own gets ``student.apply``.
    """
    if isinstance(student, Wav2Small):
        return _wav2small(student, variables, block)
    if isinstance(student, Wav2Small17K):
        return _wav2small_17k(student, variables, block)
    if isinstance(student, MobileNetStudent):
        return _mobilenet(student, variables)
    return lambda wave: student.apply(variables, wave)


def _wav2small(student: Wav2Small, variables: dict, block: int) -> Forward:
    params = _float64(variables["params"])
    trunk = _trunk(student, variables, block)
    mix, pool, adv = params["mix"], params["pool"], params["adv"]
    channels = student.channels
    mels = pool["lin"]["kernel"].shape[0] // channels
    # tokens are ordered (channel, mel): the 1×1 convolution acts on them as this matrix, and folds into both dense layers
    spread = np.kron(mix["kernel"][0, 0], np.eye(mels))
    value = spread @ pool["lin"]["kernel"]
    # a bias in front of a softmax over time changes nothing; weights that sum to one pass a bias through to the output layer
    score = spread @ pool["sof"]["kernel"]
    bias = np.repeat(mix["bias"], mels) @ pool["lin"]["kernel"] + pool["lin"]["bias"]
    value, score, head, head_bias = _float32(
        _pointwise(value), _pointwise(score), adv["kernel"], bias @ adv["kernel"] + adv["bias"]
    )

    def forward(wave: Array) -> Array:
        tokens = trunk(wave).reshape(1, channels * mels, 1, -1)
        return _pool(_convolve(tokens, value), _convolve(tokens, score)) @ head + head_bias

    return forward


def _wav2small_17k(student: Wav2Small17K, variables: dict, block: int) -> Forward:
    params = _float64(variables["params"])
    trunk = _trunk(student, variables, block)
    pool, adv = params["pool"], params["adv"]
    channels = student.channels
    value, score = _float32(_pointwise(pool["lin"]["kernel"]), _pointwise(pool["sof"]["kernel"]))
    bias, head, head_bias = _float32(pool["lin"]["bias"][:, None], adv["kernel"], adv["bias"])

    def forward(wave: Array) -> Array:
        image = trunk(wave)
        mels = image.shape[2]
        values, scores = (_convolve(image, kernel).reshape(1, channels * mels, 1, -1) for kernel in (value, score))
        x = _pool(values, scores).reshape(channels, mels) + bias  # not foldable: the products below are quadratic
        features = jnp.concatenate([x, x @ x.T], axis=1).reshape(1, -1)
        return features @ head + head_bias

    return forward


def _mobilenet(student: MobileNetStudent, variables: dict) -> Forward:
    params, stats = _float64(variables["params"]), _float64(variables["batch_stats"]["trunk"])
    image = _log_mel(student, variables)
    stages = enumerate(student.architecture.stages)
    rows = [(f"stage{stage}_{number}", row) for stage, rows in stages for number, row in enumerate(rows)]
    layers = [
        _layer(params["trunk"]["stem"], stats["stem"], student.architecture.stem, decibel=True),
        *(_row(params["trunk"][name], stats[name], row) for name, row in rows),
    ]
    pool, adv = params["pool"], params["adv"]
    value, score, head, head_bias = _float32(
        _pointwise(pool["lin"]["kernel"]),
        _pointwise(pool["sof"]["kernel"]),
        adv["kernel"],
        pool["lin"]["bias"] @ adv["kernel"] + adv["bias"],
    )

    def forward(wave: Array) -> Array:
        x = image(wave)
        for layer in layers:
            x = layer(x)
        tokens = x.reshape(1, x.shape[1], 1, -1)  # the pooling does not care for the order of the places
        return _pool(_convolve(tokens, value), _convolve(tokens, score)) @ head + head_bias

    return forward


def _row(params: dict, stats: dict, row) -> Forward:
    """One row of a MobileNet's table: ``mobilenet.Block`` with its BatchNorms folded."""

    def folded(name: str, kernel: int = 1, stride: int = 1, activation=None) -> Forward:
        return _layer(params[name], stats[name], Conv(kernel, stride, 0, activation))

    match row:
        case Conv():
            return folded("conv", *row[:2], row.activation)
        case Separable():
            layers = [folded("depthwise", *row[:2], row.activation)]
        case Bottleneck():
            layers = [folded("expand", activation=row.activation), folded("depthwise", *row[:2], row.activation)]
        case Fused():
            layers = [folded("expand", *row[:2], relu)]
        case Universal():
            layers = [folded("before", row.before, 1 if row.middle else row.stride)] if row.before else []
            layers += [folded("expand", activation=relu)]
            layers += [folded("middle", row.middle, row.stride, relu)] if row.middle else []
    if getattr(row, "squeeze", False):
        layers.append(_squeeze(params["squeeze"]))
    layers.append(folded("project"))

    def forward(x: Array) -> Array:
        y = x
        for layer in layers:
            y = layer(y)
        return y + x if row.stride == 1 and y.shape[1] == x.shape[1] else y

    return forward


def _layer(params: dict, stats: dict, row: Conv, decibel: bool = False) -> Forward:
    """``mobilenet.ConvNorm`` with its BatchNorm folded; with ``decibel`` its input is in natural logarithms."""
    kernel, bias = _fold(params["conv"]["kernel"], params["norm"], stats["norm"])
    kernel, bias = _float32(kernel * (DECIBEL if decibel else 1), bias[:, None, None])
    padding = (row.kernel - 1) // 2

    def forward(x: Array) -> Array:
        groups = x.shape[1] // kernel.shape[1]
        x = _convolve(x, kernel, padding, row.stride, groups) + bias
        return x if row.activation is None else row.activation(x)

    return forward


def _squeeze(params: dict) -> Forward:
    """``mobilenet.SqueezeExcite``."""
    (reduce, reduce_bias), (expand, expand_bias) = (
        _float32(_pointwise(params[name]["kernel"][0, 0]), params[name]["bias"][:, None, None]) for name in ("reduce", "expand")
    )

    def forward(x: Array) -> Array:
        # places are counted by a sum: as a number they would be arithmetic on the length, which jax2tf writes out at length
        mean = x.sum(axis=(2, 3), keepdims=True) / (0 * x + 1).sum(axis=(2, 3), keepdims=True)
        gate = jnp.maximum(_convolve(mean, reduce) + reduce_bias, 0)
        return x * hard_sigmoid(_convolve(gate, expand) + expand_bias)

    return forward


def _trunk(student: Wav2Small | Wav2Small17K, variables: dict, block: int) -> Forward:
    """Waveform [1, T] → the last ReLU image [1, channels, mel, time], as both students share it."""
    params, stats = _float64(variables["params"]["vgg7"]), _float64(variables["batch_stats"]["vgg7"])
    image = _log_mel(student, variables)
    layers = []
    for layer in range(1, 8):
        kernel, bias = _fold(params[f"l{layer}"]["conv"]["kernel"], params[f"l{layer}"]["norm"], stats[f"l{layer}"]["norm"])
        if layer == 1:
            kernel = kernel * DECIBEL
        outputs = 0 if layer == 7 else -kernel.shape[0] % block
        inputs = 0 if layer == 1 else -kernel.shape[1] % block
        kernel = np.pad(kernel, ((0, outputs), (0, inputs), (0, 0), (0, 0)))
        layers.append(_float32(kernel, np.pad(bias, (0, outputs))[:, None, None]))

    def forward(wave: Array) -> Array:
        x = image(wave)
        for layer, (kernel, bias) in enumerate(layers, start=1):
            x = jnp.maximum(_convolve(x, kernel, padding=1) + bias, 0)
            if layer == 3:
                x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
                x = x.transpose(0, 2, 3, 1)  # jax2tf's graph mode pools in this layout only; tf2onnx undoes it
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
                x = x.transpose(0, 3, 1, 2)
        return x

    return forward


def _log_mel(student: nn.Module, variables: dict) -> Forward:
    """Waveform [1, T] → natural logarithm of the mel power, [1, 1, mel, time]; the first convolution turns it into dB.

    Rows along time everywhere: long rows suit every kernel, and no layout ever changes between the operators.
    """
    frontend = _float64(variables["frontend"]["logmel"])
    fourier = np.concatenate([frontend["real"], frontend["imag"]], axis=1)
    mel = np.concatenate([frontend["mel"], frontend["mel"]])  # the matrix product also adds re² and im²
    heard = np.abs(fourier).max(axis=0) > 1e-9  # the sine rows of the first and last bin are zero
    fourier, mel = _float32(fourier.T[heard][:, None, None, :], _pointwise(mel[heard]))

    def forward(wave: Array) -> Array:
        spectrum = _convolve(normalise(wave).reshape(1, 1, 1, -1), fourier, stride=(1, student.hop))
        power = _convolve(spectrum * spectrum, mel)
        return jnp.log(jnp.maximum(power, MEL_FLOOR)).reshape(1, 1, student.n_mels, -1)

    return forward


def _fold(kernel: np.ndarray, norm: dict, moments: dict) -> tuple[np.ndarray, np.ndarray]:
    """A convolution [time, mel, in, out] and the BatchNorm after it: kernel [out, in, mel, time] and bias [out]."""
    scale = norm["scale"] / np.sqrt(moments["var"] + 1e-5)  # epsilon of models.norm.BatchNorm
    return kernel.transpose(3, 2, 1, 0) * scale[:, None, None, None], norm["bias"] - moments["mean"] * scale


def _convolve(
    x: Array, kernel: np.ndarray, padding: int = 0, stride: int | tuple[int, int] = 1, groups: int = 1
) -> Array:
    """[1, in, height, time] with a kernel [out, in / groups, height, time] → [1, out, height / stride, time / stride]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        stride if isinstance(stride, tuple) else (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
    )


def _pointwise(kernel: np.ndarray) -> np.ndarray:
    """A dense kernel [in, out] as that of a 1×1 convolution, [out, in, 1, 1]."""
    return kernel.T[:, :, None, None]


def _pool(value: Array, score: Array) -> Array:
    """Softmax-weighted mean over time, divided once at the end: two times [1, features, 1, time] → [1, features]."""
    weight = jnp.exp(score - score.max(axis=3, keepdims=True))
    return ((value * weight).sum(axis=3) / weight.sum(axis=3)).reshape(1, -1)


def _float64(tree: dict) -> dict:
    """Foldings multiply several parameters: do that in double precision, round once."""
    return {key: _float64(leaf) if isinstance(leaf, dict) else np.asarray(leaf, np.float64) for key, leaf in tree.items()}


def _float32(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(array, np.float32) for array in arrays)
