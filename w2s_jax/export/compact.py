"""Constants that take little room in a file: computed, unpacked or filled up with zeros when the file is loaded.

Every runtime here computes what depends on constants alone once, when it loads a file. So a constant may be a short way to
it: the Fourier kernels are a formula, a mel filter bank is its few values, zeros behind the last channel are a ``Pad``, weights
may be stored in 16, 8 or 4 bits. Only standard operators are used.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

#: Constants with fewer values than this stay as they are: the nodes that make them would take more room.
LEAST_VALUES = 256
#: float16 holds no larger values.
HALF_LIMIT = 65_504


class GraphBuilder:
    """Nodes and constants of a graph in the making."""

    def __init__(self, prefix: str = ""):
        self.nodes: list = []
        self.constants: list = []
        self._prefix = prefix
        self._known: dict[tuple, str] = {}

    def constant(self, value: np.ndarray) -> str:
        """The name of a constant; equal ones are stored once."""
        from onnx import numpy_helper

        value = np.asarray(value, order="C")
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._known:
            self._known[key] = f"{self._prefix}c{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(value, self._known[key]))
        return self._known[key]

    def node(self, op_type: str, *inputs: str | np.ndarray, output: str | None = None, domain: str = "", **attributes) -> str:
        """The output's name of one more node; arrays among the inputs become constants, None is an input left out."""
        from onnx import helper

        names = ["" if x is None else x if isinstance(x, str) else self.constant(x) for x in inputs]
        output = output or f"{self._prefix}x{len(self.nodes)}"
        name = f"{self._prefix}{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, names, [output], name, domain=domain, **attributes))
        return output

    def reshape(self, x: str, *shape: int) -> str:
        """``x`` in another shape, of which one size may be -1."""
        return self.node("Reshape", x, np.array(shape))

    def pad(self, x: str, before: Iterable[int], after: Iterable[int]) -> str:
        """Zeros before and after ``x`` along each axis."""
        pads = np.array([*before, *after])
        return self.node("Pad", x, pads) if pads.any() else x


def fourier_values(n_fft: int) -> np.ndarray:
    """Values of ``make_fourier_kernels`` [n_fft, n_fft]: Hann-windowed cosines of all bins, sines but of the first and last."""
    place = np.arange(n_fft)
    table = np.cos(2 * np.pi * place / n_fft).astype(np.float32)
    index = np.arange(n_fft // 2 + 1)[:, None] * place % n_fft
    sines = (index[1:-1] + n_fft // 4) % n_fft  # -sin x = cos(x + 90 degrees)
    return table[np.concatenate([index, sines])] * (np.float32(0.5) - np.float32(0.5) * table)


def make_fourier_kernels(builder: GraphBuilder, n_fft: int) -> str:
    """The Fourier kernels [n_fft, n_fft], n_fft a multiple of 4, from one period of a cosine."""
    table = np.cos(2 * np.pi * np.arange(n_fft) / n_fft).astype(np.float32)

    def count(first: int, end: int) -> str:
        return builder.node("Range", *(np.array(number) for number in (first, end, 1)))

    def wrapped(index: str) -> str:
        return builder.node("Mod", index, np.array(n_fft))

    place = count(0, n_fft)
    cosines = wrapped(builder.node("Mul", builder.reshape(count(0, n_fft // 2 + 1), -1, 1), place))
    sines = wrapped(builder.node("Mul", builder.reshape(count(1, n_fft // 2), -1, 1), place))
    sines = wrapped(builder.node("Add", sines, np.array(n_fft // 4)))
    table = builder.constant(table)
    half = np.array(0.5, np.float32)
    window = builder.node("Sub", half, builder.node("Mul", table, half))
    return builder.node("Mul", builder.node("Gather", table, builder.node("Concat", cosines, sines, axis=0)), window)


def scatter(builder: GraphBuilder, value: np.ndarray) -> str:
    """An array that is mostly zeros, from its other values; flat."""
    places = np.flatnonzero(value)
    places = places.astype(np.uint16 if value.size <= 65_536 else np.int32)
    places = builder.node("Cast", places, to=7)  # 7 is int64
    zeros = builder.node("ConstantOfShape", np.array([value.size]))
    return builder.node("ScatterElements", zeros, places, value.ravel()[np.flatnonzero(value)].astype(np.float32), axis=0)


def unpack(builder: GraphBuilder, values: np.ndarray) -> str:
    """Whole numbers from -8 to 7 as int8, flat; two are stored in a byte."""
    flat = values.ravel().astype(np.uint8) + np.uint8(8)  # wraps to 0..15
    first, second = np.pad(flat, (0, flat.size % 2)).reshape(2, -1)
    both = builder.node("Cast", first + np.uint8(16) * second, to=6)  # 6 is int32
    sixteen = np.array(16, np.int32)
    nibbles = (builder.node(op_type, both, sixteen) for op_type in ("Mod", "Div"))
    numbers = builder.node("Slice", builder.node("Concat", *nibbles, axis=0), np.array([0]), np.array([flat.size]))
    return builder.node("Cast", builder.node("Sub", numbers, np.array(8, np.int32)), to=3)


def round_to_integers(values: np.ndarray, axis: int, largest: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Signed whole numbers and their scales, symmetric per slice of an axis: ``values ≈ numbers * scales``."""
    others = tuple(other for other in range(values.ndim) if other != axis % values.ndim)
    scales = np.abs(values).max(axis=others, keepdims=True) / largest
    scales[scales == 0] = 1
    return np.rint(values / scales).astype(np.int8), scales.astype(np.float32)


def compact(model, weights: str = "fp32") -> None:
    """Store the constants of a float32 graph in little room.

    Args:
        model: a ModelProto, changed in place.
        weights: "fp32" changes no value by more than its last bit; "fp16" and "int8" (per output channel) round the weights of
            layers, which still compute in float32. The front end is exact in each.
    """
    from onnx import TensorProto, numpy_helper

    outputs = _output_axes(model)
    builder, kept = GraphBuilder("w"), []
    for constant in model.graph.initializer:
        if constant.data_type != TensorProto.FLOAT or np.prod(constant.dims) < LEAST_VALUES:
            kept.append(constant)
            continue
        value = numpy_helper.to_array(constant)
        n_fft = value.shape[-1]
        if value.size == n_fft**2 and n_fft % 4 == 0 and _close(value.reshape(n_fft, n_fft), fourier_values(n_fft)):
            made = make_fourier_kernels(builder, n_fft)
        elif np.count_nonzero(value) < value.size / 4:
            made = scatter(builder, value)
        else:
            core = value[tuple(slice(0, _used(value, axis)) for axis in range(value.ndim))]
            if weights == "int8" and constant.name in outputs:
                numbers, scales = round_to_integers(core, outputs[constant.name])
                made = builder.node("Mul", builder.node("Cast", numbers, to=1), scales)  # 1 is float32
            elif weights == "fp16" and np.abs(core).max() < HALF_LIMIT:
                made = builder.node("Cast", core.astype(np.float16), to=1)
            elif core.size < value.size:
                made = builder.constant(core)
            else:
                kept.append(constant)
                continue
            made = builder.pad(made, [0] * value.ndim, np.subtract(value.shape, core.shape))
        builder.node("Reshape", made, np.array(value.shape), output=constant.name)
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *builder.constants])
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*builder.nodes, *nodes])


def _used(value: np.ndarray, axis: int) -> int:
    """How far along an axis the last value is that is not 0, counted from 1."""
    others = tuple(other for other in range(value.ndim) if other != axis)
    return int(np.flatnonzero(value.any(axis=others))[-1]) + 1


def _close(value: np.ndarray, formula: np.ndarray) -> bool:
    return bool(np.abs(value - formula).max() <= 2e-7)  # two float32 factors below 1


def _output_axes(model) -> dict[str, int]:
    """Constants that are weights of layers → the axis of their outputs."""
    axes = {"Conv": 0, "MatMul": -1, "Gemm": -1}
    return {node.input[1]: axes[node.op_type] for node in model.graph.node if node.op_type in axes}
