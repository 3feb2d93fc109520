"""What a student computes in inference, as data: a plan is a sequence of typed layers with their weights.

A student's method ``fold`` makes its plan from its variables, with every BatchNorm and every constant factor folded in. What
leaves JAX and the count of operations read plans and nothing else: a new student is one ``fold``, and a new export target one
function that interprets the layers below.

A layer maps what the one before it returns. Images are [channels, mel, time], without a batch axis; the convolutions' kernels
are [out, in, mel, time], all other matrices [in, out]. Layers are pytrees of their arrays (float64 from ``export.plan.fold``).
``fold`` uses nothing but operators and methods of arrays, so that ``jax.eval_shape`` can trace it without any weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import struct

from w2s_jax import NORM_EPSILON, SAMPLING_RATE
from w2s_jax.models.frontend import MEL_FLOOR
from w2s_jax.models.norm import EPSILON

#: A natural logarithm of power times this is in dB.
DECIBEL = float(10 / np.log(10))


@struct.dataclass
class Normalise:
    """Waveform [T] → zero mean and unit variance; ``epsilon`` is added to the variance."""

    epsilon: float = struct.field(pytree_node=False, default=NORM_EPSILON)


@struct.dataclass
class Spectrum:
    """Waveform [T] → power spectrum [bins, frames], frames = 1 + (T - n_fft) // hop: (frame · real)² + (frame · imag)².

    Both matrices are windowed Fourier kernels [n_fft, bins]. Without ``imag`` it is (frame · real)² alone.
    """

    real: np.ndarray
    imag: np.ndarray | None
    hop: int = struct.field(pytree_node=False)


@struct.dataclass
class Mel:
    """Power spectrum [bins, frames] → mel power [bands, frames], by ``matrix`` [bins, bands]."""

    matrix: np.ndarray


@struct.dataclass
class Log:
    """Mel power [bands, frames] → its natural logarithm, not below that of ``floor``, as an image [1, bands, frames]."""

    floor: float = struct.field(pytree_node=False, default=MEL_FLOOR)


@struct.dataclass
class Affine:
    """Image · ``scale`` + ``shift``, both [mel]."""

    scale: np.ndarray
    shift: np.ndarray


@struct.dataclass
class Convolution:
    """Convolution [in, mel, time] → [out, ⌈mel/stride⌉, ⌈time/stride⌉], plus bias, activation.

    ``kernel`` is [out, in / groups, k, k], k odd, with k // 2 zeros on all sides of the image; how many groups follows from the
    channels of the image. ``bias`` is [out]; ``activation`` is None, "relu" or "hard_swish" (x · relu6(x + 3) / 6).
    """

    kernel: np.ndarray
    bias: np.ndarray
    stride: int = struct.field(pytree_node=False, default=1)
    activation: str | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class MaxPool:
    """Maxima of 3×3 windows, stride 2: [C, mel, time] → [C, ⌈mel/2⌉, ⌈time/2⌉]; the padding of 1 never is a maximum."""


@struct.dataclass
class AveragePool:
    """Means of 2×2 windows, stride 2: [C, mel, time] → [C, ⌊mel/2⌋, ⌊time/2⌋]."""


@struct.dataclass
class SqueezeExcite:
    """Each channel of an image times a gate: hard sigmoid of ``expand`` of ``reduce`` (1×1) of all channels' means."""

    reduce: Convolution
    expand: Convolution


@struct.dataclass
class Residual:
    """An image plus what ``layers`` make of it."""

    layers: tuple[Layer, ...]


@struct.dataclass
class Tokens:
    """Image [C, mel, time] → [C · mel, 1, time]: each frame is one token."""


@struct.dataclass
class Places:
    """Image [C, mel, time] → [C, 1, mel · time]: each place is one token; their order does not matter."""


@struct.dataclass
class AttentionPooling:
    """Image [C, mel, time] → [F, mel]: the sum over time of value(x) · softmax over time of score(x), plus bias.

    ``value`` and ``score`` are matrices [C, F] for the channels of each place; ``bias`` is [F], or None.
    """

    value: np.ndarray
    score: np.ndarray
    bias: np.ndarray | None


@struct.dataclass
class MomentPooling:
    """Tokens [C, 1, time] → [C, 1], the mean over time; with ``deviation`` → [2 · C, 1], followed by √(variance + epsilon)."""

    deviation: bool = struct.field(pytree_node=False)
    epsilon: float = struct.field(pytree_node=False, default=EPSILON)


@struct.dataclass
class PeakPooling:
    """Image [C, mel, time] → [C, 1]: of the means over mel, the largest over time plus their mean over time."""


@struct.dataclass
class Gram:
    """X [C, mel] → [X, X·Xᵀ], [C, mel + C]."""


@struct.dataclass
class Dense:
    """What comes, flattened to [in], times ``kernel`` [in, out] plus ``bias`` [out]; ``activation`` is None or "relu"."""

    kernel: np.ndarray
    bias: np.ndarray
    activation: str | None = struct.field(pytree_node=False, default=None)


Layer = (
    Normalise | Spectrum | Mel | Log | Affine | Convolution | MaxPool | AveragePool | SqueezeExcite | Residual | Tokens | Places
    | AttentionPooling | MomentPooling | PeakPooling | Gram | Dense
)  # fmt: skip


@struct.dataclass
class Plan:
    """A student in inference: waveform float32 [T] at 16 kHz, T ≥ ``minimum_samples`` → logits [D]. It prints as a table."""

    layers: tuple[Layer, ...]
    minimum_samples: int = struct.field(pytree_node=False)

    def trace(self, samples: int = 5 * SAMPLING_RATE) -> Iterator[tuple[int, Layer, tuple[int, ...], int]]:
        """Every layer for a waveform of so many samples: how many residuals it is in, itself, shape of its output, its MACs.

        A multiply-accumulate (MAC) is one of a convolution, zeros of the padding included, or of a matrix product; sums and
        activations are not counted. A residual comes before the layers in it and has no MACs of its own.
        """
        return _trace(self.layers, (samples,), 0)

    def macs(self, samples: int = 5 * SAMPLING_RATE) -> int:
        """Multiply-accumulates for a waveform of so many samples."""
        return sum(macs for *_, macs in self.trace(samples))

    def __str__(self) -> str:
        rows = [("layer", "output for 5 s", "parameters", "MACs")]
        for depth, layer, shape, macs in self.trace():
            parameters = 0 if isinstance(layer, Residual) else count(layer)
            rows.append(("  " * depth + _describe(layer), " × ".join(map(str, shape)), f"{parameters:,}", f"{macs:,}"))
        rows.append(("all", "", f"{count(self):,}", f"{self.macs():,}"))
        left, middle, *right = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            f"{name:<{left}}  {shape:<{middle}}  {parameters:>{right[0]}}  {macs:>{right[1]}}"
            for name, shape, parameters, macs in rows
        )


def _trace(layers: tuple[Layer, ...], shape: tuple[int, ...], depth: int) -> Iterator[tuple[int, Layer, tuple[int, ...], int]]:
    for layer in layers:
        before, (shape, macs) = shape, measure(layer, shape)
        yield depth, layer, shape, macs
        if isinstance(layer, Residual):
            yield from _trace(layer.layers, before, depth + 1)


def measure(layer: Layer, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The shape of a layer's output for an input of that shape, and its multiply-accumulates; none of a residual itself."""
    match layer:
        case Normalise() | Affine():
            return shape, 0
        case Spectrum(real=real, imag=imag):
            frames = 1 + (shape[0] - real.shape[0]) // layer.hop
            return (real.shape[1], frames), frames * math.prod(real.shape) * (1 if imag is None else 2)
        case Mel(matrix=matrix):
            return (matrix.shape[1], shape[1]), shape[1] * math.prod(matrix.shape)
        case Log():
            return (1, *shape), 0
        case Convolution(kernel=kernel):
            mel, time = (-(-size // layer.stride) for size in shape[1:])
            return (kernel.shape[0], mel, time), mel * time * math.prod(kernel.shape)
        case MaxPool():
            return (shape[0], (shape[1] + 1) // 2, (shape[2] + 1) // 2), 0
        case AveragePool():
            return (shape[0], shape[1] // 2, shape[2] // 2), 0
        case SqueezeExcite():
            return shape, math.prod(layer.reduce.kernel.shape) + math.prod(layer.expand.kernel.shape)
        case Residual():
            return functools.reduce(lambda shape, inner: measure(inner, shape)[0], layer.layers, shape), 0
        case Tokens():
            return (shape[0] * shape[1], 1, shape[2]), 0
        case Places():
            return (shape[0], 1, shape[1] * shape[2]), 0
        case AttentionPooling(value=value):
            return (value.shape[1], shape[1]), 2 * shape[1] * shape[2] * math.prod(value.shape)
        case MomentPooling():
            return (shape[0] * (2 if layer.deviation else 1), 1), 0
        case PeakPooling():
            return (shape[0], 1), 0
        case Gram():
            return (shape[0], shape[1] + shape[0]), shape[0] ** 2 * shape[1]
        case Dense(kernel=kernel):
            return (kernel.shape[1],), math.prod(kernel.shape)
        case _:
            raise NotImplementedError(f"models.plan.measure has no case for {type(layer).__name__}")


def _describe(layer: Layer) -> str:
    """A layer in a few words: kernel size, stride and activation where it has them."""
    name = type(layer).__name__
    if isinstance(layer, Convolution):
        size, stride = layer.kernel.shape[2], f"/{layer.stride}" if layer.stride > 1 else ""
        name = f"{name} {size}×{size}{stride}"
    return f"{name} {layer.activation}" if getattr(layer, "activation", None) else name


def count(tree: Plan | Layer) -> int:
    """Parameters of a plan or of a layer."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def fold_log_mel(student, variables: Mapping) -> list[Layer]:
    """The front end that all students share: waveform → natural logarithm of the mel power; dB are ``DECIBEL`` times that."""
    frontend = variables["frontend"]["logmel"]
    return [Normalise(), Spectrum(frontend["real"], frontend["imag"], student.hop), Mel(frontend["mel"]), Log()]


def fold_batch_norm(params: Mapping, stats: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """The factor and the shift [C] that a BatchNorm is in inference."""
    factor = params["scale"] / (stats["var"] + EPSILON) ** 0.5
    return factor, params["bias"] - stats["mean"] * factor


def fold_convolution(
    kernel: np.ndarray, norm: Mapping, stats: Mapping, stride: int, activation: str | None, scale: float = 1.0
) -> Convolution:
    """A convolution with the BatchNorm behind it folded in.

    Args:
        kernel: [time, mel, in, out], as Flax has it.
        norm, stats: of the BatchNorm, as Flax has them.
        stride, activation: as in ``Convolution``.
        scale: of the input, which is to be multiplied by it.
    """
    factor, shift = fold_batch_norm(norm, stats)
    return Convolution(kernel.transpose(3, 2, 1, 0) * (scale * factor)[:, None, None, None], shift, stride, activation)


def fold_attention(params: Mapping) -> AttentionPooling:
    """``pooling.AttentionPooling``. A softmax over time does not see the bias of its scores."""
    return AttentionPooling(params["lin"]["kernel"], params["sof"]["kernel"], params["lin"]["bias"])
