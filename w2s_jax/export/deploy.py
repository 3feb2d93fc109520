"""A plan as a JAX function, image as [1, channel, mel, time]: what becomes the fp32 ONNX graph and TensorFlow Lite.

``export_student`` proves it against ``student.apply`` on every export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import hard_sigmoid, hard_swish, relu

from w2s_jax.export.plan import context, fill_channels, fold, merge
from w2s_jax.models.plan import (
    Affine,
    AttentionPooling,
    AveragePool,
    Convolution,
    Dense,
    Gram,
    Layer,
    Log,
    MaxPool,
    Mel,
    MomentPooling,
    Normalise,
    PeakPooling,
    Places,
    Plan,
    Residual,
    Spectrum,
    SqueezeExcite,
    Tokens,
)

#: Numbers that are added one after another where a sum has to be exact.
TERMS = 64
ACTIVATIONS = {"relu": relu, "hard_swish": hard_swish}


def deploy(student: nn.Module, variables: Mapping, filled: str = "none") -> tuple[Callable, Plan | Mapping]:
    """The function to export for a student, and its weights.

    Args:
        student, variables: as ``checkpoint.load_student`` returns them.
        filled: where zeros fill up channels, which changes no result: ``where`` of ``plan.fill_channels``.

    Returns:
        A pure function ``forward(weights, wave)``, float32 [1, T] → logits [1, dimensions], and its weights, a pytree. The
        weights are a plan; of a student that has none ("fold"), they are its variables, and the function is ``student.apply``.
    """
    if not hasattr(student, "fold"):
        return student.apply, variables
    return forward, as_float32(fill_channels(merge(fold(student, variables)), filled))


def as_float32(plan: Plan) -> Plan:
    """The plan with its weights rounded to float32."""
    return jax.tree.map(lambda leaf: np.ascontiguousarray(leaf, np.float32), plan)


def forward(plan: Plan, wave: Array) -> Array:
    """Logits [1, D] of a waveform float32 [1, T].

    The weights are arguments of the conversion, as leaves of ``plan``: as constants, every tool on the way would copy them.
    """
    x = wave.reshape(1, 1, 1, -1)
    for layer in plan.layers:
        x = apply(layer, x)
    return x


def apply(layer: Layer, x: Array) -> Array:
    """One layer in JAX.

    Images are [1, channels, mel, time]. A waveform is one of one channel and band, and power is [1, bins, 1, frames]: rows run
    along time everywhere, which suits every kernel, and no layout ever changes between the operators.
    """
    match layer:
        case Normalise():
            x = x - _exact_mean(x)
            return x / jnp.sqrt(_exact_mean(x * x) + layer.epsilon)
        case Spectrum():
            parts = [_convolve(x, part.T[:, None, None, :], stride=(1, layer.hop)) for part in jax.tree.leaves(layer)]
            return sum(part * part for part in parts)
        case Mel():
            return _pointwise(x, layer.matrix)
        case Log():
            return jnp.log(jnp.maximum(x, layer.floor)).reshape(1, 1, x.shape[1], -1)
        case Affine():
            return x * layer.scale[:, None] + layer.shift[:, None]
        case Convolution(kernel=kernel, stride=stride):
            x = _convolve(x, kernel, kernel.shape[2] // 2, (stride, stride), x.shape[1] // kernel.shape[1])
            x = x + layer.bias[:, None, None]
            return ACTIVATIONS[layer.activation](x) if layer.activation else x
        case MaxPool():
            return _window(jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), -jnp.inf, lax.max, 3)
        case AveragePool():
            return _window(x, 0.0, lax.add, 2) / 4
        case SqueezeExcite():
            return x * hard_sigmoid(apply(layer.expand, apply(layer.reduce, _mean(x, (2, 3)))))
        case Residual():
            y = x
            for inner in layer.layers:
                y = apply(inner, y)
            return y + x
        case Tokens():
            return x.reshape(1, x.shape[1] * x.shape[2], 1, -1)
        case Places():
            return x.reshape(1, x.shape[1], 1, -1)
        case AttentionPooling():
            pooled = _softmax_mean(*values_and_scores(layer, x)).reshape(layer.value.shape[1], -1)
            return pooled if layer.bias is None else pooled + layer.bias[:, None]
        case MomentPooling():
            mean = _mean(x, (3,))
            if not layer.deviation:
                return mean.reshape(1, -1)
            deviation = jnp.sqrt(_mean(jnp.square(x - mean), (3,)) + layer.epsilon)
            return jnp.concatenate([mean.reshape(1, -1), deviation.reshape(1, -1)], axis=1)
        case PeakPooling():
            x = x.mean(axis=2, keepdims=True)
            return x.max(axis=3) + _mean(x, (3,)).reshape(1, -1, 1)
        case Gram():
            return jnp.concatenate([x, x @ x.T], axis=1)
        case Dense():
            x = x.reshape(1, -1) @ layer.kernel + layer.bias
            return ACTIVATIONS[layer.activation](x) if layer.activation else x
        case _:
            raise NotImplementedError(f"export.deploy.apply has no case for {type(layer).__name__}")


def values_and_scores(layer: AttentionPooling, x: Array) -> tuple[Array, Array]:
    """What the pooling averages, and the logarithms of its weights: [1, C, mel, time] → two times [1, F · mel, 1, time]."""
    return tuple(apply(Tokens(), _pointwise(x, matrix)) for matrix in (layer.value, layer.score))


def split_at_softmax(plan: Plan) -> tuple[Callable, Plan, dict[str, int]]:
    """A plan up to its softmax over time, for a piece of a recording.

    Args:
        plan: of convolutions and max pools, then attention over time.

    Returns:
        A pure function ``(weights, signal)`` → ``{"value": [features, tokens], "score": [features, tokens]}``, signal float32
        [1, T] normalised over the whole recording; its weights; and how to cut pieces, in frames. A token is ``stride`` frames
        long. Pieces begin at multiples of it, ``halo`` frames (a multiple too) before the first token that counts, and end as
        much behind the last one, except where the recording begins and ends.
    """
    pooling = [isinstance(layer, AttentionPooling) for layer in plan.layers].index(True)
    part = as_float32(plan.replace(layers=plan.layers[1 : pooling + 1]))

    def forward_piece(part: Plan, signal: Array) -> dict[str, Array]:
        x = forward(part.replace(layers=part.layers[:-1]), signal)
        value, score = values_and_scores(part.layers[-1], x)
        return {"value": value.reshape(value.shape[1], -1), "score": score.reshape(score.shape[1], -1)}

    stride, halo = context(plan.layers)
    return forward_piece, part, {"stride": stride, "halo": halo + -halo % stride}


def _exact_mean(x: Array) -> Array:
    """The mean of [1, 1, 1, T] → [1, 1, 1, 1], added up in a tree.

    Runtimes add float32 one after another, which after ten minutes of samples is off by some 1e-4 of the mean.
    """
    total, ones = x, np.ones((1, 1, 1, TERMS), np.float32)
    for _ in range(3):
        total = _convolve(total, ones, ((0, 0), (0, TERMS - 1)), (1, TERMS))
    return total.sum(axis=3, keepdims=True) / x.shape[3]


def _softmax_mean(value: Array, score: Array) -> Array:
    """Softmax-weighted mean over time, divided once at the end: two times [1, features, 1, time] → [1, features].

    Runtimes lose a share of a long float32 sum, which grows with its length; so the sum is of distances from the plain mean.
    """
    weight = jnp.exp(score - score.max(axis=3, keepdims=True))
    centre = _mean(value, (2, 3))
    distance = ((value - centre) * weight).sum(axis=3) / weight.sum(axis=3)
    return distance.reshape(1, -1) + centre.reshape(1, -1)


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


def _pointwise(x: Array, matrix: Array) -> Array:
    """A matrix [in, out] on the channels of [1, in, height, time], as a 1×1 convolution."""
    return _convolve(x, matrix.T[:, :, None, None])


def _convolve(
    x: Array, kernel: Array, padding: int | Sequence[tuple] = 0, stride: tuple[int, int] = (1, 1), groups: int = 1
) -> Array:
    """[1, in, height, time] with a kernel [out, in / groups, height, time] → [1, out, height / stride, time / stride]."""
    padding = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    return lax.conv_general_dilated(
        x, kernel, stride, padding, dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=groups
    )
