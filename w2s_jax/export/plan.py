"""From a student to a plan, and from plan to plan: the same function in a form that suits a target.

Every reader starts from ``merge(fold(student, variables))``, and rounds the weights once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import jax
import numpy as np

from w2s_jax.models.plan import AttentionPooling, Convolution, Dense, Layer, MaxPool, Mel, Plan, Spectrum, Tokens

#: onnxruntime's fast convolutions write so many channels at a time.
CHANNEL_BLOCK = 16


def fold(student, variables: Mapping) -> Plan:
    """A student's plan, its BatchNorms and constant factors folded in.

    Args:
        student: with a method ``fold``, as all of ``models.STUDENTS`` have; see ``models.plan``.
        variables: as ``checkpoint.load_student`` returns them.

    Returns:
        The plan, its weights float64: foldings multiply several parameters, which is rounded once, by whoever reads the plan.
    """
    return student.fold(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(variables)))


def merge(plan: Plan) -> Plan:
    """The same function with fewer operators.

    Rows of the spectrum that are always zero (the sines of the first and of the last bin) are dropped, and mel sums add up re²
    and im². A 1×1 convolution before attention over tokens becomes part of its matrices; the bias of the pooled values passes
    through weights that sum to one, so it becomes part of a dense layer behind.
    """
    return plan.replace(layers=tuple(reduce(_merge, plan.layers, [])))


def _merge(done: list[Layer], layer: Layer) -> list[Layer]:
    """One more layer behind those that are merged already."""
    match done, layer:
        case [*front, Spectrum(real=real, imag=np.ndarray() as imag) as spectrum], Mel(matrix=matrix):
            kernels = np.concatenate([real, imag], axis=1)
            used = np.abs(kernels).max(axis=0) > 1e-9
            matrix = np.concatenate([matrix, matrix])[used]
            return [*front, spectrum.replace(real=kernels[:, used], imag=None), Mel(matrix)]
        case [*front, Convolution(kernel=kernel, bias=bias, stride=1, activation=None), Tokens()], AttentionPooling() if (
            kernel.shape[2] == 1
        ):
            mels = len(layer.value) // len(kernel)  # tokens are ordered (channel, mel)
            spread = np.kron(kernel[:, :, 0, 0].T, np.eye(mels))
            through = np.repeat(bias, mels) @ layer.value + layer.bias
            return [*front, Tokens(), AttentionPooling(spread @ layer.value, spread @ layer.score, through)]
        case [*front, AttentionPooling(bias=np.ndarray() as bias) as pooling], Dense() if len(bias) == len(layer.kernel):
            dense = layer.replace(bias=bias @ layer.kernel + layer.bias)
            return [*front, pooling.replace(bias=None), dense]
    return [*done, layer]


def fill_channels(plan: Plan, where: str) -> Plan:
    """The same function; where one convolution follows another, zeros fill up channels to a multiple of ``CHANNEL_BLOCK``.

    Args:
        plan: what is no plain chain of convolutions and max pools is left as it is, as are 1×1 convolutions.
        where: "none"; "pool", where a max pool is between the two convolutions; "all".
    """
    if where == "none":
        return plan
    layers = list(plan.layers)
    for at, layer in enumerate(layers):
        pooled = at + 1 < len(layers) and isinstance(layers[at + 1], MaxPool)
        behind = at + 2 if pooled else at + 1
        if behind < len(layers) and (where == "all" or pooled) and _are_a_chain(layer, layers[behind]):
            more = -len(layer.bias) % CHANNEL_BLOCK
            widths = ((0, more), (0, 0), (0, 0), (0, 0))
            layers[at] = layer.replace(kernel=np.pad(layer.kernel, widths), bias=np.pad(layer.bias, (0, more)))
            kernel = np.pad(layers[behind].kernel, (widths[1], widths[0], *widths[2:]))
            layers[behind] = layers[behind].replace(kernel=kernel)
    return plan.replace(layers=tuple(layers))


def _are_a_chain(first: Layer, second: Layer) -> bool:
    """Whether both are convolutions, larger than 1×1, of which the second reads all that the first writes."""
    if not (isinstance(first, Convolution) and isinstance(second, Convolution)):
        return False
    return first.kernel.shape[2] > 1 and second.kernel.shape[2] > 1 and second.kernel.shape[1] == len(first.kernel)


def context(layers: tuple[Layer, ...]) -> tuple[int, int]:
    """How convolutions and max pools reach over time: frames per output column, and how far an output sees to each side."""
    stride, reach = 1, 0
    for layer in layers:
        match layer:
            case Convolution(kernel=kernel):
                reach += stride * (kernel.shape[3] // 2)
                stride *= layer.stride
            case MaxPool():
                reach += stride
                stride *= 2
    return stride, reach
