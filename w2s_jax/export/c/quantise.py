"""A student's numbers in eight bits for C, as INT8.md specifies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from w2s_jax.export.c.network import Network, head_matrix
from w2s_jax.export.compact import round_to_integers

#: Largest whole number of a weight: sums are exact, so that eight bits are right on every processor.
LARGEST = 127
#: Biases beyond this are cut off: sums stay below 2^31.
LARGEST_BIAS = 1 << 30


@dataclass(frozen=True)
class Rounded:
    """A convolution: int8 [out, in, mel, time]; int32 [out], added to sums; float32 [out], steps of the result in a sum."""

    kernel: np.ndarray
    bias: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Numbers:
    """What the 8-bit network consists of, besides the float32 front end and output layer.

    Attributes:
        steps: of the log-mel image for 1 of its natural logarithm, float32.
        zero: the step that stands for 0.
        layers: the convolutions.
        head: int8 [DEPTH, columns] of the product of tokens; ``head_scale`` float32 [columns] is a step of it.
    """

    steps: np.float32
    zero: int
    layers: list[Rounded]
    head: np.ndarray
    head_scale: np.ndarray


def quantise(network: Network, ends: Sequence[float]) -> Numbers:
    """Round a network.

    Args:
        network: taken apart.
        ends: where the ranges of the logarithm and of each ReLU end.
    """
    floor, end = float(np.log(network.log.floor)), max(float(ends[0]), 1.0)
    zero = round(255 * floor / (floor - end))  # the padding has to be exactly 0, a whole number of steps from the floor
    scale = np.float32(max(-floor / zero, end / (255 - zero)))
    steps, layers, offset = np.float32(1 / scale), [], zero
    for layer, end in zip(network.before + network.after, ends[1:], strict=True):
        kernel, scales = round_to_integers(layer.kernel, 0, LARGEST)
        scales = scales.ravel().astype(np.float64) * float(scale)
        bias = np.rint(layer.bias / scales) - offset * kernel.astype(np.int64).sum(axis=(1, 2, 3))
        scale, offset = np.float32(end / 255 or 1), 0
        layers.append(
            Rounded(
                kernel, np.clip(bias, -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32), (scales / float(scale)).astype(np.float32)
            )
        )
    head, scales = round_to_integers(head_matrix(network), 1, LARGEST)
    return Numbers(steps, zero, layers, head, (scales.ravel().astype(np.float64) * float(scale)).astype(np.float32))
