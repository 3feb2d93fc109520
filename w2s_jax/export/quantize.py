"""Static int8: eight-bit convolutions between float ends, with ranges measured on real audio."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Sequence

import numpy as np

from w2s_jax.errors import W2SError
from w2s_jax.export.onnx import SIGNAL, add_to_output_bias, drop_dead, find_producers, run, session
from w2s_jax.metrics import ccc

#: Shares of a tensor's values that its range covers, candidates. A student whose pooling looks at rare peaks needs all of them,
#: one with stray peaks is better off with finer steps; which of both it is, is measured. 0.999 cut off what trained MobileNets
#: look at (experiments/README.md).
COVERAGE = (1.0, 0.9999)
#: What the scores of a softmax get above the highest of the calibration audio, as a share of their range.
HEADROOM = 0.25


def quantize(
    model,
    waves: Sequence[np.ndarray],
    message: Callable[[str], object] | None = None,
    coverages: Sequence[float] = COVERAGE,
    largest: int = 63,
):
    """Quantise the convolutions behind the front end: activations to 8 bit unsigned, weights to 7 or 8 bit signed per channel.

    What stays in float, because eight bits destroy it: power, mel and logarithm, the first convolution (its input spans
    100 dB), and the softmax over time with its weighted sum (weights near 1/frames would round to 0).

    What stays in float, because eight bits gain nothing: hard-swish and the gates of squeeze-excite (onnxruntime has no
    eight-bit hard sigmoid), and depthwise convolutions right behind a hard-swish. These would have to round their input for
    themselves, which takes longer than they save, and no sum over channels evens out their rounding errors (measured:
    experiments/README.md).

    Ranges follow what the next operator makes of a value: a hard sigmoid and a hard-swish see no difference beyond their kinks,
    so ranges end there; the softmax lives by its highest scores, so these get room for clips with higher ones.

    Args:
        model: an fp32 ModelProto as ``onnx.simplify`` leaves it.
        waves: float32 [T] each, real audio like that which the model is for; lengths may differ.
        message: called with a line of text now and then.
        coverages: the candidates.
        largest: whole number of a weight, 63 or 127 (see ``direct.build_int8``).

    Returns:
        The QDQ model, and a dict: ``coverage`` (the chosen one), ``candidates`` (coverage → worst CCC on ``waves``).

    Raises:
        W2SError: the graph has no convolution behind a logarithm.
    """
    chosen = _find_nodes(model)
    if not chosen:
        raise W2SError("cannot quantise: the graph has no convolutions behind its log-mel front end")
    ranges = _measure_ranges(model, chosen, waves, coverages)
    return choose_coverage(
        lambda coverage: _insert_qdq(model, chosen, ranges[coverage], largest), model, waves, message, coverages
    )  # fmt: skip


def choose_coverage(
    make: Callable,
    fp32,
    waves: Sequence[np.ndarray],
    message: Callable[[str], object] | None,
    coverages: Sequence[float],
) -> tuple:
    """Of the models that ``make`` builds, one for each coverage, that with the best CCC with ``fp32``, worst dimension, on
    ``waves``; and ``quantize``'s dict.

    Rounding errors of weights add up to a shift of the outputs, most of all in students that have hardly been trained; the bias
    of the output layer takes its mean over ``waves`` back (arXiv 1906.04721, section 4.2).
    """
    reference = run(fp32, waves)
    best, results = None, {}
    for coverage in coverages:
        candidate = make(coverage)
        outputs = run(candidate, waves)
        shift = (reference - outputs).mean(axis=0)
        add_to_output_bias(candidate, shift)
        results[str(coverage)] = score = float(ccc(outputs + shift, reference).min())
        if message:
            message(f"ranges over {coverage:.2%} of the values give CCC {score:.5f} against fp32")
        if best is None or score > results[str(best[0])]:
            best = coverage, candidate
    return best[1], {"coverage": best[0], "candidates": results}


def _find_nodes(model) -> list[str]:
    """Names of the Conv nodes to quantise, and of the Relu and MaxPool nodes between them."""
    shapes = {constant.name: constant.dims for constant in model.graph.initializer}
    eight = ("Conv", "Relu", "MaxPool")
    makers: dict[str, str] = {}  # tensor behind the logarithm → operator that made it
    chosen, first = [], True
    for node in model.graph.node:
        if node.op_type == "Log" or makers.keys() & set(node.input):
            makers |= dict.fromkeys(node.output, node.op_type)
            if node.op_type == "Conv" and first:
                first = False
            elif node.op_type == "Conv" and shapes[node.input[1]][1] == 1 and makers[node.input[0]] not in (*eight, "Add"):
                continue  # depthwise, on float values; onnxruntime adds eight-bit tensors as they are
            elif node.op_type in eight:
                chosen.append(node.name)
    return [] if first else chosen


def _measure_ranges(
    model, chosen: Sequence[str], waves: Sequence[np.ndarray], coverages: Sequence[float]
) -> dict[float, dict[str, tuple[float, float]]]:
    """For each coverage, tensor → (low, high): the widest over all waves of the range that covers that share of a wave."""
    import onnx

    probe = type(model)()
    probe.CopyFrom(model)
    names = sorted({name for node in model.graph.node if node.name in chosen for name in (node.input[0], node.output[0])})
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    one = session(probe)
    ranges = {coverage: dict.fromkeys(names, (0.0, 0.0)) for coverage in coverages}  # zero padding must be exact: 0 is inside
    for wave in waves:
        for name, values in zip(names, one.run(names, {SIGNAL: wave[None]}), strict=True):
            for coverage, (low, high) in cover(values.ravel(), coverages).items():
                known = ranges[coverage][name]
                ranges[coverage][name] = min(known[0], low), max(known[1], high)
    limits, scores = _find_limits(model), _find_scores(model)
    for coverage in coverages:
        for name, (low, high) in ranges[coverage].items():
            least, most = limits.get(name, (-np.inf, np.inf))
            room = HEADROOM * (high - low) if name in scores else 0.0
            ranges[coverage][name] = max(low, least), min(high + room, most)
    return ranges


def _find_limits(model) -> dict[str, tuple[float, float]]:
    """For what a hard sigmoid reads, the part that it tells apart; without an upper end if a hard-swish reads it."""
    limits = {}
    for gate in model.graph.node:
        if gate.op_type == "HardSigmoid":
            given = {attribute.name: attribute.f for attribute in gate.attribute}
            slope, offset = given.get("alpha", 0.2), given.get("beta", 0.5)  # ONNX's defaults
            others = [node for node in model.graph.node if gate.input[0] in node.input and node is not gate]
            if all(node.op_type == "Mul" and gate.output[0] in node.input for node in others):
                limits[gate.input[0]] = -offset / slope, np.inf if others else (1 - offset) / slope
    return limits


def _find_scores(model) -> set[str]:
    """The outputs of convolutions that a softmax, written out as exp(x - max), compares."""
    producers = find_producers(model)
    scores = set()
    for node in model.graph.node:
        if node.op_type == "Exp":
            while node is not None and node.op_type in ("Exp", "Sub", "Reshape"):
                name = node.input[0]
                node = producers.get(name)
            scores.add(name)
    return scores


def cover(values: np.ndarray, coverages: Sequence[float]) -> dict[float, tuple[float, float]]:
    """For each coverage, lowest and highest of the values but a share ``1 - coverage``, taken from the outer end or ends."""
    signed = bool(values.min() < 0)  # after a Relu there is nothing to cut below
    cuts = {coverage: int((1 - coverage) * values.size / (2 if signed else 1)) for coverage in coverages}
    lows = {coverage: cut if signed else 0 for coverage, cut in cuts.items()}
    highs = {coverage: values.size - 1 - cut for coverage, cut in cuts.items()}
    ends = np.partition(values, sorted({*lows.values(), *highs.values()}))
    return {coverage: (float(ends[lows[coverage]]), float(ends[highs[coverage]])) for coverage in coverages}


def _insert_qdq(model, chosen: Sequence[str], ranges: dict[str, tuple[float, float]], largest: int):
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    source = type(model)()
    source.CopyFrom(model)
    data = {name: tuple(np.array(end, np.float32) for end in ends) for name, ends in ranges.items()}
    logger = logging.getLogger()
    level = logger.level
    try:  # the quantiser advises on preprocessing, which `simplify` has done
        logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            quantizer = QDQQuantizer(
                source,
                per_channel=True,
                reduce_range=largest < 127,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,  # signed activations miss the fast kernels by far
                tensors_range=TensorsData(CalibrationMethod.MinMax, data),
                nodes_to_quantize=list(chosen),
                nodes_to_exclude=[],
                op_types_to_quantize=sorted({node.op_type for node in model.graph.node if node.name in chosen}),
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
    finally:
        logger.setLevel(level)
    result = quantizer.model.model
    drop_dead(result)  # shorter names: a tenth of the file
    return result
