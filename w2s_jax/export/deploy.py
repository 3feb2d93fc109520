"""The inference form of each student: folded parameters, image as (channel, mel, time), nothing that only training needs.

Every folding is exact up to float32 rounding; ``export_student`` proves it against ``student.apply`` on every export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import hard_sigmoid, relu

from w2s_jax.models.cnn14 import CNN14
from w2s_jax.models.frontend import MEL_FLOOR, NORM_EPSILON
from w2s_jax.models.mobilenet import Bottleneck, Conv, Fused, MobileNetStudent, Separable, Universal
from w2s_jax.models.wav2small import Wav2Small, Wav2Small17K

#: (weights, float32 [1, T]) → [1, dimensions]; and of its layers: (weights, x) → y.
Forward = Callable[[Sequence[Array], Array], Array]

#: Numbers that are added one after another where a sum has to be exact.
TERMS = 64
#: onnxruntime's fast convolutions write so many channels at a time.
BLOCK = 16
#: The front end leaves natural logarithms; this turns them into dB.
DECIBEL = 10 / np.log(10)


class Weights(list):
    """The arrays of an inference form, float32. Layers remember places in it instead of arrays, so that the arrays can be
    inputs of a graph while it is converted: as constants, every tool on the way would copy them."""

    def keep(self, array: np.ndarray) -> int:
        """The place of one more array."""
        self.append(np.ascontiguousarray(array, np.float32))
        return len(self) - 1


def deploy(student: nn.Module, variables: dict, filled: str = "none") -> tuple[Forward, list]:
    """The function to export for a student, and its weights.

    Args:
        student, variables: as ``checkpoint.load_student`` returns them.
        filled: where zeros fill up the channels of a Wav2Small's trunk to a multiple of ``BLOCK``, which changes no result:
            "none"; "pool", before and behind the layer that pools; "all", between all layers. Other students' channels are
            left as they are.

    Returns:
        A pure function ``forward(weights, wave)``, float32 [1, T] → logits [1, dimensions], and the weights. A student without
        an inference form of its own gets ``student.apply`` and its variables.
    """
    weights = Weights()
    match student:
        case Wav2Small():
            forward = _wav2small(student, variables, filled, weights)
        case Wav2Small17K():
            forward = _wav2small_17k(student, variables, filled, weights)
        case MobileNetStudent():
            forward = _mobilenet(student, variables, weights)
        case CNN14():
            forward = _cnn14(student, variables, weights)
        case _:
            return student.apply, variables
    return forward, list(weights)


def _wav2small(student: Wav2Small, variables: dict, filled: str, weights: Weights) -> Forward:
    params = float64(variables["params"])
    trunk = _trunk(student, variables, filled, weights)
    mix, adv = params["mix"], params["adv"]
    if student.pooling == "attention":
        parts, finish = _softmax_pooling(student, variables, weights)
        return lambda w, wave: finish(w, _softmax_mean(*parts(w, trunk(w, wave))))

    mixed = _pointwise(mix["kernel"][0, 0], mix["bias"], weights)
    output = _dense(adv, weights)

    def forward(w: Sequence[Array], wave: Array) -> Array:
        tokens = _tokens(mixed(w, trunk(w, wave)))
        mean = _mean(tokens, (3,))
        if student.pooling == "mean":
            return output(w, mean.reshape(1, -1))
        deviation = jnp.sqrt(_mean(jnp.square(tokens - mean), (3,)) + 1e-5)  # as models.pooling has it
        return output(w, jnp.concatenate([mean.reshape(1, -1), deviation.reshape(1, -1)], axis=1))

    return forward


def _wav2small_17k(student: Wav2Small17K, variables: dict, filled: str, weights: Weights) -> Forward:
    trunk = _trunk(student, variables, filled, weights)
    parts, finish = _softmax_pooling(student, variables, weights)
    return lambda w, wave: finish(w, _softmax_mean(*parts(w, trunk(w, wave))))


def _softmax_pooling(student: Wav2Small | Wav2Small17K, variables: dict, weights: Weights) -> tuple[Callable, Forward]:
    """The two halves of a pooling by softmax over time.

    Returns:
        (weights, trunk's image) → values and scores, each [1, features, 1, time]; and (weights, pooled [1, features]) → logits.
    """
    params = float64(variables["params"])
    adv = params["adv"]
    if isinstance(student, Wav2Small):
        pool = attention(student, variables)
        value, score = (_pointwise(pool[part]["kernel"], None, weights) for part in ("lin", "sof"))
        return lambda w, x: (value(w, _tokens(x)), score(w, _tokens(x))), _attention_output(pool, adv, weights)
    lin, sof = params["pool"]["lin"], params["pool"]["sof"]
    value, score = (_pointwise(part["kernel"], None, weights) for part in (lin, sof))
    bias, output = weights.keep(lin["bias"][:, None]), _dense(adv, weights)

    def finish(w: Sequence[Array], x: Array) -> Array:
        x = x.reshape(student.channels, -1) + w[bias]  # not foldable: the products are quadratic
        return output(w, jnp.concatenate([x, x @ x.T], axis=1).reshape(1, -1))

    return lambda w, x: (_tokens(value(w, x)), _tokens(score(w, x))), finish


def in_chunks(student: nn.Module, variables: dict, filled: str = "none") -> tuple[Callable, list, dict[str, int]]:
    """A student up to its softmax over time, for a piece of a recording.

    Args:
        student: a Wav2Small or Wav2Small17K that pools by attention.
        variables, filled: as for ``deploy``.

    Returns:
        A pure function ``(weights, signal)`` → ``{"value": [features, tokens], "score": [features, tokens]}``, signal float32
        [1, T] normalised over the whole recording; its weights; and how to cut pieces, in frames. A token is ``stride`` frames
        long. Pieces begin at multiples of it, ``halo`` frames (a multiple too) before the first token that counts, and end as
        much behind the last one, except where the recording begins and ends.
    """
    weights = Weights()
    trunk = _trunk(student, variables, filled, weights, normalised=True)
    parts, _ = _softmax_pooling(student, variables, weights)

    def forward(w: Sequence[Array], signal: Array) -> dict[str, Array]:
        value, score = parts(w, trunk(w, signal))
        return {"value": value.reshape(value.shape[1], -1), "score": score.reshape(score.shape[1], -1)}

    reach = student.kernel // 2
    stride = 2 * student.stride
    halo = student.stride * (2 * student.after * reach + 1 + (student.before - 1) * reach) + reach
    return forward, list(weights), {"stride": stride, "halo": halo + -halo % stride}


def _mobilenet(student: MobileNetStudent, variables: dict, weights: Weights) -> Forward:
    params, stats = float64(variables["params"]), float64(variables["batch_stats"]["trunk"])
    stages = enumerate(student.architecture.stages)
    rows = [(f"stage{stage}_{number}", row) for stage, rows in stages for number, row in enumerate(rows)]
    stem = partial(_layer, scale=DECIBEL)
    layers = [
        _log_mel(student, variables, weights),
        stem(params["trunk"]["stem"], stats["stem"], student.architecture.stem, weights),
        *(_row(params["trunk"][name], stats[name], row, weights) for name, row in rows),
    ]
    pool = _attention(params["pool"], params["adv"], weights)

    def forward(w: Sequence[Array], x: Array) -> Array:
        for layer in layers:
            x = layer(w, x)
        return pool(w, x.reshape(1, x.shape[1], 1, -1))  # the pooling does not care for the order of the places

    return forward


def _row(params: dict, stats: dict, row, weights: Weights) -> Forward:
    """One row of a MobileNet's table: ``mobilenet.Block`` with its BatchNorms folded."""

    def folded(name: str, kernel: int = 1, stride: int = 1, activation=None) -> Forward:
        return _layer(params[name], stats[name], Conv(kernel, stride, 0, activation), weights)

    match row:
        case Conv():
            return folded("conv", row.kernel, row.stride, row.activation)
        case Separable():
            layers = [folded("depthwise", row.kernel, row.stride, row.activation)]
        case Bottleneck():
            layers = [
                folded("expand", activation=row.activation),
                folded("depthwise", row.kernel, row.stride, row.activation),
            ]
        case Fused():
            layers = [folded("expand", row.kernel, row.stride, relu)]
        case Universal():
            layers = [folded("before", row.before, 1 if row.middle else row.stride)] if row.before else []
            layers += [folded("expand", activation=relu)]
            layers += [folded("middle", row.middle, row.stride, relu)] if row.middle else []
    if getattr(row, "squeeze", False):
        layers.append(_squeeze(params["squeeze"], weights))
    layers.append(folded("project"))

    def forward(w: Sequence[Array], x: Array) -> Array:
        y = x
        for layer in layers:
            y = layer(w, y)
        return y + x if row.stride == 1 and y.shape[1] == x.shape[1] else y

    return forward


def _squeeze(params: dict, weights: Weights) -> Forward:
    """``mobilenet.SqueezeExcite``."""
    reduce, expand = (_pointwise(params[name]["kernel"][0, 0], params[name]["bias"], weights) for name in ("reduce", "expand"))
    return lambda w, x: x * hard_sigmoid(expand(w, relu(reduce(w, _mean(x, (2, 3))))))


def _cnn14(student: CNN14, variables: dict, weights: Weights) -> Forward:
    params, stats = float64(variables["params"]), float64(variables["batch_stats"])
    image = _log_mel(student, variables, weights)
    scale = params["norm"]["scale"] / np.sqrt(stats["norm"]["var"] + 1e-5)
    shift = params["norm"]["bias"] - stats["norm"]["mean"] * scale
    # per mel band, and padded with zeros afterwards: the first convolution cannot take it over
    scale, shift = (weights.keep(row[:, None]) for row in (scale * DECIBEL, shift))
    names = [f"{block}_{layer}" for block in range(1, 7) for layer in (1, 2)]
    layers = [
        _layer({"conv": params[f"conv{name}"], "norm": params[f"norm{name}"]}, {"norm": stats[f"norm{name}"]},
               Conv(3, 1, 0, relu), weights)
        for name in names
    ]  # fmt: skip
    dense, output = _dense(params["dense"], weights), _dense(params["adv"], weights)

    def forward(w: Sequence[Array], wave: Array) -> Array:
        x = image(w, wave) * w[scale] + w[shift]
        for name, layer in zip(names, layers, strict=True):
            x = layer(w, x)
            if name.endswith("_2") and name != names[-1]:
                x = _window(x, 0.0, lax.add, 2) / 4
        x = x.mean(axis=2, keepdims=True)
        features = x.max(axis=3) + _mean(x, (3,)).reshape(1, -1, 1)
        return output(w, relu(dense(w, features.reshape(1, -1))))

    return forward


def attention(student: Wav2Small, variables: dict) -> dict:
    """The attention pooling of a Wav2Small with the 1×1 convolution before it folded in, as ``AttentionPooling``'s parameters.

    ``lin`` and ``sof`` are on tokens of the trunk, ordered (channel, mel). ``sof`` has no bias: it would change nothing.
    """
    params = float64(variables["params"])
    mix, lin, sof = params["mix"], params["pool"]["lin"], params["pool"]["sof"]
    mels = lin["kernel"].shape[0] // student.channels
    spread = np.kron(mix["kernel"][0, 0], np.eye(mels))
    bias = np.repeat(mix["bias"], mels) @ lin["kernel"] + lin["bias"]
    return {"lin": {"kernel": spread @ lin["kernel"], "bias": bias}, "sof": {"kernel": spread @ sof["kernel"]}}


def trunk_layers(student: Wav2Small | Wav2Small17K, variables: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernel [out, in, mel, time] and bias [out] of each convolution of the trunk, float64.

    BatchNorm is folded in; the first one expects natural logarithms.
    """
    params, stats = variables["params"]["vgg7"], variables["batch_stats"]["vgg7"]
    names = [f"l{layer}" for layer in range(1, student.before + student.after + 1)]
    return [
        _folded(float64(params[name]), float64(stats[name]), DECIBEL if name == "l1" else 1) for name in names
    ]  # fmt: skip


def _trunk(
    student: Wav2Small | Wav2Small17K, variables: dict, filled: str, weights: Weights, normalised: bool = False
) -> Forward:
    """Waveform [1, T] → the last ReLU image [1, channels, mel, time], as both students share it."""
    image = _log_mel(student, variables, weights, normalised)
    depth = student.before + student.after
    # layers whose outputs are filled up; the last one's are the tokens
    full = {"none": set(), "pool": {student.before} - {depth}, "all": set(range(1, depth))}[filled]
    layers = [
        _convolution(
            kernel,
            bias,
            Conv(student.kernel, student.stride if layer == 1 else 1, 0, relu),
            weights,
            inputs=BLOCK if layer - 1 in full else 1,
            outputs=BLOCK if layer in full else 1,
        )
        for layer, (kernel, bias) in enumerate(trunk_layers(student, variables), start=1)
    ]

    def forward(w: Sequence[Array], wave: Array) -> Array:
        x = image(w, wave)
        for number, layer in enumerate(layers, start=1):
            x = layer(w, x)
            if number == student.before:
                x = _window(jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), -jnp.inf, lax.max, 3)
        return x

    return forward


def front_end(variables: dict) -> tuple[np.ndarray, np.ndarray]:
    """Fourier kernels [rows, n_fft] and the mel matrix [rows, mel] that turns their squared outputs into mel power, float64."""
    frontend = float64(variables["frontend"]["logmel"])
    fourier = np.concatenate([frontend["real"], frontend["imag"]], axis=1)
    mel = np.concatenate([frontend["mel"], frontend["mel"]])  # the matrix product also adds re² and im²
    heard = np.abs(fourier).max(axis=0) > 1e-9  # the sine rows of the first and last bin are zero
    return fourier.T[heard], mel[heard]


def _log_mel(student: nn.Module, variables: dict, weights: Weights, normalised: bool = False) -> Forward:
    """Waveform [1, T] → natural logarithm of the mel power, [1, 1, mel, time]; the next layer has to turn it into dB.

    Rows along time from here on: long rows suit every kernel, and no layout ever changes between the operators.
    """
    fourier, mel = front_end(variables)
    fourier, mel = weights.keep(fourier[:, None, None, :]), _pointwise(mel, None, weights)
    ones = None if normalised else weights.keep(np.ones((1, 1, 1, TERMS)))

    def forward(w: Sequence[Array], wave: Array) -> Array:
        wave = wave.reshape(1, 1, 1, -1)
        if ones is not None:  # as models.frontend.normalise has it
            wave = wave - _exact_mean(wave, w[ones])
            wave = wave / jnp.sqrt(_exact_mean(wave * wave, w[ones]) + NORM_EPSILON)
        spectrum = _convolve(wave, w[fourier], stride=(1, student.hop))
        return jnp.log(jnp.maximum(mel(w, spectrum * spectrum), MEL_FLOOR)).reshape(1, 1, student.n_mels, -1)

    return forward


def _exact_mean(x: Array, ones: Array) -> Array:
    """The mean of [1, 1, 1, T] → [1, 1, 1, 1], added up in a tree.

    Runtimes add float32 one after another, which after ten minutes of samples is off by some 1e-4 of the mean.
    """
    total = x
    for _ in range(3):
        total = _convolve(total, ones, ((0, 0), (0, TERMS - 1)), (1, TERMS))
    return total.sum(axis=3, keepdims=True) / x.shape[3]


def _folded(params: dict, stats: dict, scale: float = 1) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [out, in, mel, time] and bias [out] of a convolution and its BatchNorm; ``scale`` is that of the input."""
    factor = params["norm"]["scale"] / np.sqrt(stats["norm"]["var"] + 1e-5)  # epsilon of models.norm.BatchNorm and nn.BatchNorm
    kernel = params["conv"]["kernel"].transpose(3, 2, 1, 0)  # [time, mel, in, out] → [out, in, mel, time]
    return kernel * (scale * factor)[:, None, None, None], params["norm"]["bias"] - stats["norm"]["mean"] * factor


def _layer(params: dict, stats: dict, row: Conv, weights: Weights, scale: float = 1) -> Forward:
    """Convolution, BatchNorm and activation, the BatchNorm folded; ``scale`` is that of the input."""
    return _convolution(*_folded(params, stats, scale), row, weights)


def _convolution(
    kernel: np.ndarray, bias: np.ndarray, row: Conv, weights: Weights, inputs: int = 1, outputs: int = 1
) -> Forward:  # fmt: skip
    """Convolution and activation; zeros fill input and output channels up to multiples of ``inputs`` and ``outputs``."""
    more = -len(kernel) % outputs
    kernel = np.pad(kernel, ((0, more), (0, -kernel.shape[1] % inputs), (0, 0), (0, 0)))
    kernel, bias = weights.keep(kernel), weights.keep(np.pad(bias, (0, more))[:, None, None])

    def forward(w: Sequence[Array], x: Array) -> Array:
        groups = x.shape[1] // w[kernel].shape[1]
        x = _convolve(x, w[kernel], (row.kernel - 1) // 2, (row.stride, row.stride), groups) + w[bias]
        return x if row.activation is None else row.activation(x)

    return forward


def _attention(pool: dict, adv: dict, weights: Weights) -> Forward:
    """Attention pooling of tokens [1, C, 1, places], and the output layer → [1, dimensions]."""
    value, score = (_pointwise(pool[part]["kernel"], None, weights) for part in ("lin", "sof"))
    output = _attention_output(pool, adv, weights)
    return lambda w, tokens: output(w, _softmax_mean(value(w, tokens), score(w, tokens)))


def _attention_output(pool: dict, adv: dict, weights: Weights) -> Forward:
    # weights that sum to one pass a bias through to the output layer
    return _dense({"kernel": adv["kernel"], "bias": pool["lin"]["bias"] @ adv["kernel"] + adv["bias"]}, weights)


def _softmax_mean(value: Array, score: Array) -> Array:
    """Softmax-weighted mean over time, divided once at the end: two times [1, features, 1, time] → [1, features].

    Runtimes lose a share of a long float32 sum, which grows with its length; so the sum is of distances from the plain mean.
    """
    weight = jnp.exp(score - score.max(axis=3, keepdims=True))
    centre = _mean(value, (2, 3))
    distance = ((value - centre) * weight).sum(axis=3) / weight.sum(axis=3)
    return distance.reshape(1, -1) + centre.reshape(1, -1)


def _tokens(image: Array) -> Array:
    """[1, channels, mel, time] → [1, channels · mel, 1, time]."""
    return image.reshape(1, image.shape[1] * image.shape[2], 1, -1)


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean over axes whose sizes depend on the length, which are kept as 1.

    The places are counted by a sum: as a number they would be arithmetic on the length, which jax2tf writes out at length. The
    pass ``average_pool`` makes one operator of it.
    """
    return x.sum(axis=axes, keepdims=True) / (0 * x + 1).sum(axis=axes, keepdims=True)


def _window(x: Array, initial: float, reduce: Callable, size: int) -> Array:
    """Reduce windows of an image [1, C, mel, time], size × size with stride 2."""
    x = x.transpose(0, 2, 3, 1)  # jax2tf's graph mode pools in this layout only; tf2onnx undoes it
    x = lax.reduce_window(x, initial, reduce, (1, size, size, 1), (1, 2, 2, 1), "VALID")
    return x.transpose(0, 3, 1, 2)


def _pointwise(kernel: np.ndarray, bias: np.ndarray | None, weights: Weights) -> Forward:
    """A dense layer [in, out] on the channels of [1, in, height, time], as a 1×1 convolution."""
    kernel = weights.keep(kernel.T[:, :, None, None])
    if bias is None:
        return lambda w, x: _convolve(x, w[kernel])
    bias = weights.keep(bias[:, None, None])
    return lambda w, x: _convolve(x, w[kernel]) + w[bias]


def _dense(params: dict, weights: Weights) -> Forward:
    kernel, bias = weights.keep(params["kernel"]), weights.keep(params["bias"])
    return lambda w, x: x @ w[kernel] + w[bias]


def _convolve(
    x: Array, kernel: Array, padding: int | Sequence[tuple] = 0, stride: tuple[int, int] = (1, 1), groups: int = 1
) -> Array:
    """[1, in, height, time] with a kernel [out, in / groups, height, time] → [1, out, height / stride, time / stride]."""
    padding = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    return lax.conv_general_dilated(
        x, kernel, stride, padding, dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=groups
    )


def float64(tree: dict) -> dict:
    """Foldings multiply several parameters: do that in double precision, round once."""
    return {key: float64(leaf) if isinstance(leaf, dict) else np.asarray(leaf, np.float64) for key, leaf in tree.items()}
