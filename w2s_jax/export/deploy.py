"""The inference form of each student: folded parameters, image as (channel, mel, time), nothing that only training needs.

Every folding is exact up to float32 rounding; ``export_student`` proves it against ``student.apply`` on every export.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from w2s_jax.models.frontend import MEL_FLOOR, normalise
from w2s_jax.models.wav2small import Wav2Small, Wav2Small17K

Forward = Callable[[Array], Array]


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


def _trunk(student: Wav2Small | Wav2Small17K, variables: dict, block: int) -> Forward:
    """Waveform [1, T] → the last ReLU image [1, channels, mel, time], as both students share it."""
    params, stats = _float64(variables["params"]["vgg7"]), _float64(variables["batch_stats"]["vgg7"])
    frontend = _float64(variables["frontend"]["logmel"])
    fourier = np.concatenate([frontend["real"], frontend["imag"]], axis=1)
    mel = np.concatenate([frontend["mel"], frontend["mel"]])  # the matrix product also adds re² and im²
    heard = np.abs(fourier).max(axis=0) > 1e-9  # the sine rows of the first and last bin are zero
    fourier, mel = _float32(fourier.T[heard][:, None, None, :], _pointwise(mel[heard]))

    layers = []
    for layer in range(1, 8):
        kernel = params[f"l{layer}"]["conv"]["kernel"].transpose(3, 2, 1, 0)  # [time, mel, in, out] → [out, in, mel, time]
        norm, moments = params[f"l{layer}"]["norm"], stats[f"l{layer}"]["norm"]
        scale = norm["scale"] / np.sqrt(moments["var"] + 1e-5)  # epsilon of ConvBlock
        kernel, bias = kernel * scale[:, None, None, None], norm["bias"] - moments["mean"] * scale
        if layer == 1:
            kernel = kernel * (10 / np.log(10))  # the front end leaves natural logarithms; ln → dB
        outputs = 0 if layer == 7 else -kernel.shape[0] % block
        inputs = 0 if layer == 1 else -kernel.shape[1] % block
        kernel = np.pad(kernel, ((0, outputs), (0, inputs), (0, 0), (0, 0)))
        layers.append(_float32(kernel, np.pad(bias, (0, outputs))[:, None, None]))

    def forward(wave: Array) -> Array:
        # rows along time everywhere: long rows suit every kernel, and no layout ever changes between the operators
        spectrum = _convolve(normalise(wave).reshape(1, 1, 1, -1), fourier, stride=student.hop)
        power = _convolve(spectrum * spectrum, mel)
        x = jnp.log(jnp.maximum(power, MEL_FLOOR)).reshape(1, 1, student.n_mels, -1)
        for layer, (kernel, bias) in enumerate(layers, start=1):
            x = jnp.maximum(_convolve(x, kernel, padding=1) + bias, 0)
            if layer == 3:
                x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
                x = x.transpose(0, 2, 3, 1)  # jax2tf's graph mode pools in this layout only; tf2onnx undoes it
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
                x = x.transpose(0, 3, 1, 2)
        return x

    return forward


def _convolve(x: Array, kernel: np.ndarray, padding: int = 0, stride: int = 1) -> Array:
    """[1, in, height, time] with a kernel [out, in, height, time] → [1, out, height, time / stride]."""
    return lax.conv_general_dilated(
        x, kernel, (1, stride), [(padding, padding)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
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
