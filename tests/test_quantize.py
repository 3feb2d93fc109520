"""int8 on a small network with every kind of operator that the students have; expected values by hand, numpy, onnxruntime."""

import inspect

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs pip install 'w2s-jax[export]'")

from conftest import voice  # noqa: E402

from w2s_jax.errors import W2SError  # noqa: E402
from w2s_jax.export import export_student, quantize  # noqa: E402
from w2s_jax.export import onnx as graph  # noqa: E402
from w2s_jax.metrics import ccc  # noqa: E402

LEAST = inspect.signature(export_student).parameters["min_ccc"].default


@pytest.fixture(scope="module")
def waves():
    """48 pieces of 0.5 to 2.5 s, of different pitch and noise."""
    generator = np.random.default_rng(0)
    pieces = [voice(0.5 + seed / 24, seed, generator.uniform(80, 300)) for seed in range(48)]
    return [(piece + generator.uniform(0, 0.05) * generator.standard_normal(len(piece))).astype(np.float32) for piece in pieces]


@pytest.fixture(scope="module")
def model():
    """Log-mel, a stem, two hard-swishes, two depthwise convolutions, a squeeze-excite, a residual, attention pooling."""
    generator = np.random.default_rng(1)
    weights, nodes = {}, []

    def constant(name, value, kind=np.float32):
        weights[name] = np.asarray(value, kind)
        return name

    def node(op, inputs, output, **attributes):
        nodes.append(onnx.helper.make_node(op, inputs, [output], name=f"{op}:{output}", **attributes))
        return output

    def conv(x, output, kernel, groups=1, bias=True, **attributes):
        fan_in = np.prod(kernel[1:])
        inputs = [x, constant(f"{output}.w", generator.normal(0, np.sqrt(2 / fan_in), kernel))]
        if bias:
            inputs.append(constant(f"{output}.b", generator.normal(0, 0.2, kernel[0])))
        return node("Conv", inputs, output, group=groups, **attributes)

    def reshape(x, output, *shape):
        return node("Reshape", [x, constant(f"{output}.shape", shape, np.int64)], output)

    angles = 2 * np.pi * np.outer(np.arange(1, 9), np.arange(64)) / 64
    basis = np.concatenate([np.cos(angles), np.sin(angles)]) * np.hanning(64)
    constant("fourier.w", basis[:, None, None, :])
    mel = np.concatenate([np.eye(8), np.eye(8)], axis=1)
    constant("mel.w", mel[:, :, None, None])

    node("Conv", [reshape("signal", "row", 1, 1, 1, -1), "fourier.w"], "spectrum", strides=[1, 32])
    node("Mul", ["spectrum", "spectrum"], "power")
    node("Conv", ["power", "mel.w"], "mel")
    node("Log", [node("Max", ["mel", constant("floor", 1e-10)], "floored")], "logarithm")
    node("Mul", [node("Add", ["logarithm", constant("middle", 4.0)], "shifted"), constant("third", 0.3)], "scaled")
    image = reshape("scaled", "image", 1, 1, 8, -1)
    stem = conv(image, "stem", (8, 1, 3, 3), pads=[1, 1, 1, 1])
    swish = node("Mul", [stem, node("HardSigmoid", [stem], "gate", alpha=1 / 6, beta=0.5)], "swish")
    floating = node("Relu", [conv(swish, "floating", (8, 1, 3, 3), 8, pads=[1, 1, 1, 1])], "floating.relu")
    reduced = node("Relu", [conv(node("GlobalAveragePool", [floating], "mean"), "reduce", (8, 8, 1, 1))], "reduce.relu")
    squeeze = node("HardSigmoid", [conv(reduced, "expand", (8, 8, 1, 1))], "squeeze", alpha=1 / 6, beta=0.5)
    narrow = conv(node("Mul", [floating, squeeze], "excited"), "project", (8, 8, 1, 1))
    inner = conv(narrow, "inner", (8, 1, 3, 3), 8, pads=[1, 1, 1, 1])
    inner = node("Mul", [inner, node("HardSigmoid", [inner], "inner.gate", alpha=1 / 6, beta=0.5)], "inner.swish")
    wide = node("Add", [conv(inner, "back", (8, 8, 1, 1)), narrow], "residual")
    last = node("Relu", [conv(wide, "last", (4, 8, 3, 3), pads=[1, 1, 1, 1])], "last.relu")
    value = conv(last, "value", (4, 4, 1, 1), bias=False)
    value = reshape(value, "tokens", 1, 32, 1, -1)
    score = reshape(conv(last, "score", (4, 4, 1, 1), bias=False), "scores", 1, 32, 1, -1)
    below = node("Sub", [score, node("ReduceMax", [score], "top", axes=[3])], "below")
    weight = node("Exp", [below], "weight")
    axes = constant("axes", [3], np.int64)
    total = node("ReduceSum", [node("Mul", [value, weight], "weighted"), axes], "total", keepdims=0)
    mass = node("ReduceSum", [weight, axes], "mass", keepdims=0)
    pooled = reshape(node("Div", [total, mass], "pooled"), "features", 1, 32)
    constant("out.w", generator.normal(0, 0.2, (32, 3)))
    node("Gemm", [pooled, "out.w"], "logits")
    weights["expand.w"] *= 20  # beyond both kinks of its hard sigmoid, as the next two lines have it
    weights["expand.b"] += 1.5
    weights["inner.w"] *= 2
    weights["score.w"] *= 2  # attention as sharp as that of trained students
    network = onnx.helper.make_graph(
        nodes,
        "toy",
        [onnx.helper.make_tensor_value_info("signal", onnx.TensorProto.FLOAT, [1, "time"])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 3])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    made = onnx.helper.make_model(network, opset_imports=[onnx.helper.make_opsetid("", graph.OPSET)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def values(model, name, waves):
    """A tensor of a model for each wave, by onnxruntime."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.append(onnx.ValueInfoProto(name=name))
    one = graph.session(probe)
    return [one.run([name], {"signal": wave[None]})[0] for wave in waves]


def changed(model, **factors):
    """A copy of a model; a constant named ``x.w`` is multiplied by the factor ``x``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for constant in copy.graph.initializer:
        if constant.name.removesuffix(".w") in factors:
            value = onnx.numpy_helper.to_array(constant) * factors[constant.name.removesuffix(".w")]
            constant.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), constant.name))
    return copy


def worst(int8, fp32, waves):
    return ccc(graph.run(int8, waves), graph.run(fp32, waves)).min()


EIGHT = ["reduce", "expand", "project", "inner", "back", "last", "value", "score"]


def test_what_is_quantised(model, waves):
    # not the front end, the first convolution, and the depthwise one on a hard-swish; the other depthwise one follows a Conv
    chosen = quantize._find_nodes(model)
    assert [name.removeprefix("Conv:") for name in chosen if name.startswith("Conv:")] == EIGHT
    int8, _ = quantize.quantize(model, waves[:8])
    weights = {constant.name: constant for constant in int8.graph.initializer}
    eight = [w for w in weights.values() if w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 4]
    assert len(eight) == len(EIGHT)


def test_ranges(model, waves):
    chosen = quantize._find_nodes(model)
    ranges = quantize._measure_ranges(model, chosen, waves[:8], (1.0,))[1.0]
    heard = {}
    for name in ranges:
        found = np.concatenate([value.ravel() for value in values(model, name, waves[:8])])
        heard[name] = min(0, found.min()), max(0, found.max())
    assert heard["expand"][0] < -3 and heard["expand"][1] > 3 and heard["inner"][0] < -3  # or nothing would be cut
    low, high = heard["score"]
    expected = heard | {"expand": (-3, 3), "inner": (-3, heard["inner"][1]), "score": (low, high + (high - low) / 4)}
    for name, ends in expected.items():
        np.testing.assert_allclose(ranges[name], ends, rtol=1e-6, err_msg=name)


def test_what_is_cut_off_was_not_seen(model, waves):
    """Clipping a tensor to its limits changes no output."""
    limits = quantize._find_limits(model)
    assert set(limits) == {"stem", "expand", "inner"}
    clipped = changed(model)
    for name, (low, high) in limits.items():
        at, maker = next((at, node) for at, node in enumerate(clipped.graph.node) if name in node.output)
        maker.output[0] = f"{name}.whole"
        ends = [onnx.numpy_helper.from_array(np.float32(end), f"{name}.{end}") for end in (low, high)]
        clipped.graph.initializer.extend(ends)
        clip = onnx.helper.make_node("Clip", [f"{name}.whole", *(end.name for end in ends)], [name])
        clipped.graph.node.insert(at + 1, clip)
    np.testing.assert_allclose(graph.run(clipped, waves[:4]), graph.run(model, waves[:4]), atol=1e-6)


def test_a_depthwise_convolution_with_uneven_channels(model, waves, monkeypatch):
    """Why it stays in float: one loud channel sets the steps for all, and no sum over channels evens their rounding out."""
    factors = np.ones((8, 1, 1, 1))
    factors[0] = 50
    uneven = changed(model, stem=factors, floating=1 / factors)
    chosen = quantize._find_nodes(uneven)
    assert worst(quantize.quantize(uneven, waves[::2])[0], uneven, waves[1::2]) > 0.98
    monkeypatch.setattr(quantize, "_find_nodes", lambda model: [*chosen, "Conv:floating"])
    assert worst(quantize.quantize(uneven, waves[::2])[0], uneven, waves[1::2]) < 0.9


@pytest.mark.parametrize("stage", ["log-mel", "attention pooling"])
def test_what_must_stay_in_float(model, waves, monkeypatch, stage):
    """With these eight bits too, the export would refuse the file; without them it is far from that."""
    names = [node.name for node in model.graph.node]
    if stage == "log-mel":
        more = ["Conv:spectrum", "Conv:mel"]
    else:
        more = names[names.index("ReduceMax:top") : names.index("Gemm:logits")]
    chosen = quantize._find_nodes(model)
    assert worst(quantize.quantize(model, waves[::2])[0], model, waves[1::2]) > 0.98
    monkeypatch.setattr(quantize, "_find_nodes", lambda model: chosen + more)
    spoilt, choice = quantize.quantize(model, waves[::2])
    assert worst(spoilt, model, waves[1::2]) < LEAST
    assert max(choice["candidates"].values()) < LEAST  # the calibration waves tell as well


def test_the_better_coverage_is_taken(model, waves):
    lines = []
    chosen, choice = quantize.quantize(model, waves[:12], lines.append, coverages=(1.0, 0.9))
    single = {coverage: quantize.quantize(model, waves[:12], coverages=(coverage,))[0] for coverage in (1.0, 0.9)}
    scores = {str(coverage): worst(int8, model, waves[:12]) for coverage, int8 in single.items()}
    assert choice == {"coverage": 1.0, "candidates": scores}
    assert scores["1.0"] > scores["0.9"] + 0.01
    assert chosen == single[1.0]
    assert len(lines) == 2 and "90.00%" in lines[1]


def test_nothing_behind_a_front_end(model):
    bare = changed(model)
    nodes = [node for node in bare.graph.node if node.op_type != "Log"]
    del bare.graph.node[:]
    bare.graph.node.extend(nodes)
    with pytest.raises(W2SError, match="cannot quantise: the graph has no convolutions behind its log-mel front end"):
        quantize.quantize(bare, [])
