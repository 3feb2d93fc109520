"""Constants that are made at load, against numpy; onnxruntime makes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")

from w2s_jax.export import compact  # noqa: E402
from w2s_jax.export.onnx import OPSET, session  # noqa: E402

few = settings(max_examples=40, deadline=None)
floats = st.floats(-10, 10, width=32)


def made(make):
    """What the nodes that ``make(pieces)`` adds give."""
    pieces = compact.GraphBuilder()
    name = make(pieces)
    end = onnx.ValueInfoProto(name=name)
    graph = onnx.helper.make_graph(pieces.nodes, "made", [], [end], pieces.constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    return session(model).run([name], {})[0]


@given(arrays.arrays(np.int8, st.integers(1, 99), elements=st.integers(-8, 7)))
@few
def test_four_bits(values):
    found = made(lambda pieces: compact.unpack(pieces, values))
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, values)


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2), elements=st.sampled_from([0, 0, 0, 1.5, -2])))
@few
def test_scattered(values):
    np.testing.assert_array_equal(made(lambda pieces: compact.scatter(pieces, values)), values.ravel())


def test_scattered_where_places_need_more_than_16_bits():
    values = np.zeros(70_000, np.float32)
    values[[3, 69_999]] = 1, 2
    np.testing.assert_array_equal(made(lambda pieces: compact.scatter(pieces, values)), values)


@pytest.mark.parametrize("n_fft", [16, 64, 144, 512])
def test_fourier_kernels_are_those_of_an_fft(n_fft):
    wave = np.random.default_rng(n_fft).normal(size=n_fft)
    window = np.sin(np.pi * np.arange(n_fft) / n_fft) ** 2  # periodic Hann
    spectrum = np.fft.rfft(wave * window)
    kernels = made(lambda pieces: compact.make_fourier_kernels(pieces, n_fft))
    np.testing.assert_allclose(kernels @ wave, [*spectrum.real, *spectrum.imag[1:-1]], atol=2e-6 * n_fft)
    np.testing.assert_allclose(kernels, compact.fourier_values(n_fft), atol=1e-7)


@given(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=floats),
    st.sampled_from([7, 63, 127]),
)
@few
def test_rounded(values, largest):
    numbers, scales = compact.round_to_integers(values, 1, largest)
    assert np.abs(numbers).max() <= largest
    assert scales.shape == (1, values.shape[1])
    assert (np.abs(numbers * scales - values) <= scales * 0.5001).all()


def layer(weights):
    """x [1, in] times a constant."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    rows, columns = weights.shape
    node, constant = helper.make_node("MatMul", ["x", "w"], ["y"]), onnx.numpy_helper.from_array(weights, "w")
    ends = [[helper.make_tensor_value_info(name, kind, [1, size])] for name, size in (("x", rows), ("y", columns))]
    graph = helper.make_graph([node], "layer", *ends, [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def weights_of(model):
    """Row by row, what a layer does to the unit vectors."""
    one = session(model)
    size = one.get_inputs()[0].shape[1]
    return np.concatenate([one.run(None, {"x": row[None]})[0] for row in np.eye(size, dtype=np.float32)])


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 20), st.integers(0, 20))
@few
def test_what_a_layer_computes(seed, used, rows, columns):
    """fp32: nothing changes, whatever zeros there are; fp16: numpy's rounding; int8: half a step at most."""
    values = np.random.default_rng(seed).normal(size=(20, used)).astype(np.float32)
    weights = np.pad(values, ((0, rows), (0, columns)))
    model = layer(weights)
    sizes = {}
    for kind in ("fp32", "fp16", "int8"):
        packed = onnx.ModelProto()
        packed.CopyFrom(model)
        compact.compact(packed, kind)
        onnx.checker.check_model(packed)
        sizes[kind] = packed.ByteSize()
        found = weights_of(packed)
        sparse = np.count_nonzero(weights) < weights.size / 4  # as a mel filter bank, which is never rounded
        if kind == "fp32" or sparse or weights.size < compact.LEAST_VALUES:
            np.testing.assert_array_equal(found, weights)
        elif kind == "fp16":
            np.testing.assert_array_equal(found, weights.astype(np.float16).astype(np.float32))
        else:
            assert (np.abs(found - weights) <= 0.5001 * np.abs(weights).max(axis=0) / 127).all()
    if used >= 30:
        assert sizes["int8"] < 0.6 * sizes["fp16"] + 500 < 0.5 * sizes["fp32"] + 900


def test_values_that_float16_cannot_hold_stay():
    weights = np.full((20, 20), 1e5, np.float32)
    model = layer(weights)
    compact.compact(model, "fp16")
    np.testing.assert_array_equal(weights_of(model), weights)


def test_kernels_of_another_checkpoint_stay():
    """A formula must not replace kernels that only resemble it."""
    kernels = compact.fourier_values(64)
    for change, shorter in ((0, True), (1e-6, False)):
        model = layer(kernels + np.float32(change) * (np.arange(64) == 5))
        before = weights_of(model)
        size = model.ByteSize()
        compact.compact(model)
        np.testing.assert_allclose(weights_of(model), before, atol=1e-7)
        assert (model.ByteSize() < 3000) == shorter and size > 16_000
