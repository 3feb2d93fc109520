"""Static int8: eight-bit convolutions between float ends, with ranges measured on real audio."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Sequence

import numpy as np

from w2s_jax.artifacts import W2SError
from w2s_jax.export.onnx import SIGNAL, drop_dead, run, session
from w2s_jax.metrics import ccc

#: Shares of a tensor's values that its range covers, candidates. A student whose pooling looks at rare peaks needs all of them,
#: one with stray peaks is better off with finer steps; which of both it is, is measured.
COVERAGE = (1.0, 0.9999, 0.999)


def quantize(
    model,
    waves: Sequence[np.ndarray],
    progress: Callable[[str], object] | None = None,
    coverages: Sequence[float] = COVERAGE,
    largest: int = 127,
):
    """Quantise the convolutions behind the front end: activations to 8 bit unsigned, weights to 8 bit signed per channel.

    What stays in float, because eight bits destroy it: power, mel and logarithm, the first convolution (its input spans
    100 dB), and the softmax over time with its weighted sum (weights near 1/frames would round to 0).

    Args:
        model: an fp32 ModelProto as ``onnx.simplify`` leaves it.
        waves: float32 [T] each, real audio of the kind that the model will hear; lengths may differ.
        progress: called with a line of text now and then.
        coverages: the candidates.
        largest: whole number of a weight, 127 or 63 (see ``direct.integer``).

    Returns:
        The QDQ model, and a dict: ``coverage`` (the chosen one), ``candidates`` (coverage → worst CCC on ``waves``).

    Raises:
        W2SError: the graph has no convolution behind a logarithm.
    """
    chosen = _eight_bit_nodes(model)
    if not chosen:
        raise W2SError("cannot quantise: the graph has no convolutions behind its log-mel front end")
    ranges = _ranges(model, chosen, waves, coverages)
    reference = run(model, waves)
    best, results = None, {}
    for coverage in coverages:
        candidate = _quantized(model, chosen, ranges[coverage], largest)
        results[str(coverage)] = score = float(ccc(run(candidate, waves), reference).min())
        if progress:
            progress(f"ranges over {coverage:.2%} of the values give CCC {score:.5f} against fp32")
        if best is None or score > results[str(best[0])]:
            best = coverage, candidate
    return best[1], {"coverage": best[0], "candidates": results}


def _eight_bit_nodes(model) -> list[str]:
    """Names of the Conv nodes to quantise, and of the Relu and MaxPool nodes between them."""
    behind: set[str] = set()
    chosen, first = [], True
    for node in model.graph.node:
        if node.op_type == "Log" or behind & set(node.input):
            behind |= set(node.output)
            if node.op_type == "Conv" and first:
                first = False
            elif node.op_type in ("Conv", "Relu", "MaxPool"):
                chosen.append(node.name)
    return [] if first else chosen


def _ranges(
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
            for coverage, (low, high) in _coverages(values.ravel(), coverages).items():
                known = ranges[coverage][name]
                ranges[coverage][name] = min(known[0], low), max(known[1], high)
    return ranges


def _coverages(values: np.ndarray, coverages: Sequence[float]) -> dict[float, tuple[float, float]]:
    """For each coverage, lowest and highest of the values but a share ``1 - coverage``, taken from the outer end or ends."""
    signed = bool(values.min() < 0)  # after a Relu there is nothing to cut below
    cuts = {coverage: int((1 - coverage) * values.size / (2 if signed else 1)) for coverage in coverages}
    lows = {coverage: cut if signed else 0 for coverage, cut in cuts.items()}
    highs = {coverage: values.size - 1 - cut for coverage, cut in cuts.items()}
    ends = np.partition(values, sorted({*lows.values(), *highs.values()}))
    return {coverage: (float(ends[lows[coverage]]), float(ends[highs[coverage]])) for coverage in coverages}


def _quantized(model, chosen: Sequence[str], ranges: dict[str, tuple[float, float]], largest: int):
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
                op_types_to_quantize=["Conv", "Relu", "MaxPool"],
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
    finally:
        logger.setLevel(level)
    result = quantizer.model.model
    drop_dead(result)  # shorter names: a tenth of the file
    return result
