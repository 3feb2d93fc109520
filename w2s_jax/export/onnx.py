"""One route from a JAX function to a small ONNX file: jax2tf's graph mode, tf2onnx, and a few checked graph passes."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.install import pip_install
from w2s_jax.runtime.predictor import LOGITS, SIGNAL, open_session

OPSET = 17
#: What a graph pass may change in an output, as a share of the largest output if that is above 1. Reordered float32 sums
#: differ by less, a wrong rewrite by much more.
PASS_LIMIT = 2e-5


def require_tools() -> None:
    """Check that this environment can export.

    Raises:
        UsageError: jax is too new for tf2onnx, or the extra is not installed; names the way.
    """
    try:
        import jax
    except ImportError as error:
        raise missing_extra(error.name or "jax", "export") from error
    version = tuple(int(part) for part in re.findall(r"\d+", jax.__version__)[:2])
    if version >= (0, 7):
        raise UsageError(
            f"jax {jax.__version__} cannot export: jax2tf's graph mode, the only form that tf2onnx reads, ended with jax 0.6; "
            f"make another environment with {pip_install('export', here=False)} and export there: a student directory "
            "(model.safetensors, config.json) is plain arrays and can be carried over"
        )
    with quiet():
        for package in ("tensorflow", "tf2onnx", "onnx"):
            try:
                __import__(package)
            except ImportError as error:
                raise missing_extra(error.name or package, "export") from error


def as_tensorflow(forward: Callable, weights, minimum_samples: int) -> tuple[Callable, list]:
    """A JAX function in TensorFlow's own operators.

    Args:
        forward: (weights, float32 [1, T]) → anything, for every T from ``minimum_samples`` on.
        weights: a tree of arrays.
        minimum_samples: the shortest T.

    Returns:
        (signal, *arrays of ``weights``) → the same, and those arrays. They are arguments and no constants, or jax2tf,
        TensorFlow and tf2onnx would copy and rewrite them again and again (80 million of CNN14 needed more than 20 GB).
    """
    import jax
    from jax.experimental import jax2tf

    leaves, tree = jax.tree.flatten(weights)
    function = jax2tf.convert(
        lambda signal, *leaves: forward(jax.tree.unflatten(tree, leaves), signal),
        # n is at least 1: so the frame count is provably positive
        polymorphic_shapes=[f"(1, n + {minimum_samples - 1})", *[None] * len(leaves)],
        native_serialization=False,
        enable_xla=False,
    )
    return function, leaves


def convert(forward: Callable, weights, outputs: int | dict[str, tuple], minimum_samples: int):
    """A JAX function as an ONNX model.

    Args:
        forward: (weights, float32 [1, T]) → [1, outputs], for every T from ``minimum_samples`` on.
        weights: a tree of arrays.
        outputs: how many; or, if ``forward`` gives a dict of arrays, the shape of each.
        minimum_samples: the shortest T.

    Returns:
        An ``onnx.ModelProto`` with input ``signal`` [1, time] and output ``logits`` [1, outputs]; only time is dynamic. What
        does not depend on the input is computed already.
    """
    shapes = outputs if isinstance(outputs, dict) else {LOGITS: (1, outputs)}
    with quiet():
        import onnx
        import tensorflow as tf
        import tf2onnx

        graph, leaves = as_tensorflow(forward, weights, minimum_samples)
        names = [f"weight{index}" for index in range(len(leaves))]
        signature = [
            tf.TensorSpec([1, None], tf.float32, name=SIGNAL),
            *(tf.TensorSpec(leaf.shape, leaf.dtype, name=name) for name, leaf in zip(names, leaves, strict=True)),
        ]

        def named(*inputs):
            result = graph(*inputs)
            return result if isinstance(outputs, dict) else {LOGITS: result}

        function = tf.function(named, input_signature=signature, autograph=False)
        model, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    values = {name: onnx.numpy_helper.from_array(np.asarray(leaf), name) for name, leaf in zip(names, leaves, strict=True)}
    ends = [end for end in model.graph.input if end.name not in values]
    model.graph.initializer.extend(values[end.name] for end in model.graph.input if end.name in values)
    del model.graph.input[:]
    model.graph.input.extend(ends)
    fold_constants(model)
    shapes = {SIGNAL: (1, "time"), **shapes}
    if others := {value.name for value in (*model.graph.input, *model.graph.output)} ^ set(shapes):
        raise W2SError(f"tf2onnx gave the graph other ends than {', '.join(shapes)}: {', '.join(sorted(others))}")
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shapes[value.name]))
    model.graph.name = "w2s_jax"
    standard = [domain for domain in model.opset_import if domain.domain == ""]
    del model.opset_import[:]  # tf2onnx declares domains of which it used nothing
    model.opset_import.extend(standard)
    return model


def simplify(model, waves: Sequence[np.ndarray], more: dict[str, np.ndarray] | None = None):
    """Apply every graph pass that leaves the outputs as they are.

    Args:
        model: what ``convert`` returned; its shortest input is below 16,003 samples.
        waves: float32 [T] each, on which a pass is judged.
        more: a value for each other input.

    Returns:
        The smaller model, and ``{pass name: largest change of an output with it and those before it}``, one figure for all if
        they are right together. A pass over ``PASS_LIMIT`` is left out of the model and shows in the dict with its change.
    """
    more = more or {}
    before = run(model, waves, more)
    largest = max(1.0, float(np.abs(before).max()))

    def rewritten(*passes) -> tuple:
        candidate = type(model)()
        candidate.CopyFrom(model)
        for rewrite in passes:
            rewrite(candidate)
        return candidate, float(np.abs(run(candidate, waves, more) - before).max() / largest)

    passes = (
        _named(settle_shapes, more),
        join_reshapes,
        _named(drop_identities, more),
        relu_from_max,
        scale_into_conv,
        bias_into_conv,
        padding_into_pool,
        hard_sigmoid,
        average_pool,
        drop_dead,
    )
    candidate, change = rewritten(*passes)
    if change <= PASS_LIMIT:
        return candidate, {rewrite.__name__: change for rewrite in passes}
    changes = {}
    for rewrite in passes:  # one at a time, to leave out the one that is wrong
        candidate, changes[rewrite.__name__] = rewritten(rewrite)
        if changes[rewrite.__name__] <= PASS_LIMIT:
            model = candidate
    return model, changes


def _named(rewrite: Callable, more: dict[str, np.ndarray]) -> Callable:
    return functools.wraps(rewrite)(lambda model: rewrite(model, more))


def session(model):
    """An onnxruntime session (CPU, one thread) for a ModelProto, with the settings of ``Predictor``."""
    return open_session(model.SerializeToString())[0]


def run(model, waves: Sequence[np.ndarray], more: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Logits of a model for each wave: list of [T] → [len(waves), outputs]; ``more`` are its other inputs."""
    one = session(model)
    return np.concatenate([one.run([LOGITS], {SIGNAL: wave[None], **(more or {})})[0] for wave in waves])


def fold_constants(model) -> None:
    """Compute what does not depend on the input: the transposed and reshaped weights."""
    from onnx import numpy_helper

    known = {constant.name for constant in model.graph.initializer}
    constant = []
    for node in model.graph.node:
        if node.input and all(name in known for name in node.input if name):
            known |= set(node.output)
            constant.append(node)
    if not constant:
        return
    made = {name for node in constant for name in node.output}
    rest = [node for node in model.graph.node if not made & set(node.output)]
    read = {name for node in rest for name in node.input} | {value.name for value in model.graph.output}
    wanted = sorted(made & read)
    part = type(model)()
    part.CopyFrom(model)
    for field, kept in (("node", constant), ("input", []), ("output", []), ("value_info", [])):
        del getattr(part.graph, field)[:]
        getattr(part.graph, field).extend(kept)
    part.graph.output.extend(type(model.graph.output[0])(name=name) for name in wanted)
    values = session(part).run(wanted, {})
    del model.graph.node[:]
    model.graph.node.extend(rest)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in zip(wanted, values, strict=True))
    drop_dead(model)


def settle_shapes(model, more: dict[str, np.ndarray]) -> None:
    """Replace computed Reshape targets by constants with one -1, which frees the arithmetic on the length for ``drop_dead``."""
    values = _trace(model, more)
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in values:
            first, second = (np.asarray(value) for value in values[node.input[1]])
            if np.sum(first != second) <= 1:
                _set_constant(model, node, 1, np.where(first != second, -1, first))


def join_reshapes(model) -> None:
    """Reshape of a Reshape → the last one alone."""
    constants = _constants(model)
    producers = find_producers(model)
    for node in model.graph.node:
        while node.op_type == "Reshape" and node.input[1] in constants and constants[node.input[1]].all():  # 0 copies a size
            before = producers.get(node.input[0])
            if before is None or before.op_type != "Reshape":
                break
            node.input[0] = before.input[0]


def drop_identities(model, more: dict[str, np.ndarray]) -> None:
    """Bypass nodes that give what they get (broadcasts to the same shape, slices of everything)."""
    values = _trace(model, more)
    outputs = {value.name for value in model.graph.output}
    for node in list(model.graph.node):
        if node.op_type in ("Reshape", "Expand", "Slice", "Squeeze") and node.output[0] not in outputs:
            pairs = zip(values.get(node.input[0], ()), values[node.output[0]], strict=False)
            same = [np.array_equal(before, after) for before, after in pairs]
            if same and all(same):
                _redirect(model, node.output[0], node.input[0])
                model.graph.node.remove(node)


def relu_from_max(model) -> None:
    """Max(x, 0) → Relu, which onnxruntime fuses into the convolution before it."""
    constants = _constants(model)
    for node in model.graph.node:
        if node.op_type == "Max" and len(node.input) == 2:
            x, bound = node.input if node.input[1] in constants else reversed(node.input)
            if bound in constants and constants[bound].size == 1 and constants[bound].item() == 0:
                node.op_type = "Relu"
                node.input[:] = [x]


def scale_into_conv(model) -> None:
    """Conv * one value per channel → Conv with other weights, as of a BatchNorm."""
    constants = _constants(model)
    for conv, value in _after_conv(model, "Mul"):
        weights = constants[conv.input[1]]
        _set_constant(model, conv, 1, weights * value.reshape(-1, *(1,) * (weights.ndim - 1)))


def bias_into_conv(model) -> None:
    """Conv + Add of one value per channel → Conv with a bias."""
    for conv, value in _after_conv(model, "Add"):
        conv.input.append("")
        _set_constant(model, conv, 2, value.reshape(-1))


def _after_conv(model, op_type: str) -> Iterator[tuple]:
    """Each Conv without a bias, with weights of its own, that only an ``op_type`` with one constant per channel reads.

    It comes with that constant; the reading node is gone by then, its output the convolution's.
    """
    constants = _constants(model)
    producers = find_producers(model)
    uses = _uses(model)
    for node in list(model.graph.node):
        if node.op_type != op_type:
            continue
        x, constant = node.input if node.input[1] in constants else reversed(node.input)
        conv = producers.get(x)
        if constant not in constants or conv is None or conv.op_type != "Conv" or len(conv.input) != 2 or uses[x] != 1:
            continue
        value = constants[constant]
        if uses[conv.input[1]] == 1 and value.size == constants[conv.input[1]].shape[0] == value.shape[-3:][0]:
            conv.output[0] = node.output[0]
            model.graph.node.remove(node)
            yield conv, value


def padding_into_pool(model) -> None:
    """Relu + Pad with zeros + MaxPool → Relu + MaxPool that pads: nothing after a Relu is below the zeros."""
    import onnx

    constants = _constants(model)
    producers = find_producers(model)
    for node in model.graph.node:
        pad = producers.get(node.input[0]) if node.op_type == "MaxPool" else None
        before = producers.get(pad.input[0]) if pad is not None and pad.op_type == "Pad" else None
        if before is None or before.op_type != "Relu" or pad.input[1] not in constants:
            continue
        zero = constants[pad.input[2]].item() if len(pad.input) > 2 else 0
        pads = constants[pad.input[1]].tolist()
        if zero == 0 and not any(pads[:2] + pads[4:6]):
            kept = [attribute for attribute in node.attribute if attribute.name not in ("pads", "auto_pad")]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("pads", pads[2:4] + pads[6:8])])
            node.input[0] = pad.input[0]


def hard_sigmoid(model) -> None:
    """Min(Relu(x + 3), 6) / 6 → HardSigmoid(x), one operator instead of four; the 3 may be in the bias before already."""
    import onnx

    constants = _constants(model)
    producers = find_producers(model)

    def before(node, op_type: str, value: float):
        """The operand of a node of that type whose other operand is the constant ``value``."""
        if node is None or node.op_type != op_type:
            return None
        x, constant = node.input if node.input[1] in constants else reversed(node.input)
        if constant not in constants or constants[constant].size != 1 or not np.isclose(constants[constant].item(), value):
            return None
        return x

    for node in model.graph.node:
        relu = producers.get(before(producers.get(before(node, "Mul", 1 / 6)), "Min", 6))
        if relu is not None and relu.op_type == "Relu":
            x = before(producers.get(relu.input[0]), "Add", 3)
            node.op_type = "HardSigmoid"
            node.input[:] = [x or relu.input[0]]
            beta = 0.5 if x else 0.0
            node.attribute.extend([onnx.helper.make_attribute("alpha", 1 / 6), onnx.helper.make_attribute("beta", beta)])


def average_pool(model) -> None:
    """The sum of an image over its places, divided by their counted number → GlobalAveragePool."""
    constants = _constants(model)
    producers = find_producers(model)

    def summed(name: str) -> str | None:
        """What a Reshape(ReduceSum(·, mel and time)) adds up."""
        reshape = producers.get(name)
        add_up = producers.get(reshape.input[0]) if reshape is not None and reshape.op_type == "Reshape" else None
        if add_up is None or add_up.op_type != "ReduceSum" or sorted(constants.get(add_up.input[1], ())) != [2, 3]:
            return None
        return add_up.input[0]

    for node in model.graph.node:
        if node.op_type == "Div":
            x, one = (summed(name) for name in node.input)
            plus = producers.get(one)
            times = [producers.get(name) for name in plus.input] if plus is not None and plus.op_type == "Add" else []
            if x is not None and any(zero is not None and zero.op_type == "Mul" and x in zero.input for zero in times):
                node.op_type = "GlobalAveragePool"
                node.input[:] = [x]


def add_to_output_bias(model, shift: np.ndarray) -> None:
    """Add float32 [outputs] to the bias of the dense layer that gives the logits."""
    (last,) = (node for node in model.graph.node if LOGITS in node.output)
    if last.op_type != "Gemm":
        raise W2SError(f"the graph ends in {last.op_type}; expected a dense layer (Gemm)")
    if len(last.input) == 2:
        last.input.append("")
    bias = _constants(model)[last.input[2]] if last.input[2] else 0.0
    _set_constant(model, last, 2, (bias + shift).astype(np.float32))
    drop_dead(model)


def drop_dead(model) -> None:
    """Remove nodes and constants that no output needs, and every name that only tf2onnx needed."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    constants = [constant for constant in model.graph.initializer if constant.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    del model.graph.value_info[:]
    short = {value.name: value.name for value in (*model.graph.input, *model.graph.output)}
    for constant in model.graph.initializer:
        constant.name = short.setdefault(constant.name, f"c{len(short)}")
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
        node.input[:] = [short.get(name, name) for name in node.input]
        for position, name in enumerate(node.output):
            node.output[position] = short.setdefault(name, f"x{index}")


def _trace(
    model, more: dict[str, np.ndarray], lengths: tuple[int, int] = (16_003, 29_009)
) -> dict[str, list[np.ndarray]]:  # fmt: skip
    """Every value of the graph for two lengths of noise: a size that differs between them depends on the length."""
    import onnx

    probe = type(model)()
    probe.CopyFrom(model)
    known = {value.name for value in probe.graph.output}
    names = [name for node in probe.graph.node for name in node.output if name and name not in known]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    names += known
    one = session(probe)
    noise = np.random.default_rng(0).normal(size=max(lengths)).astype(np.float32)
    runs = [dict(zip(names, one.run(names, {SIGNAL: noise[None, :length], **more}), strict=True)) for length in lengths]
    return {name: [values[name] for values in runs] for name in names} | {SIGNAL: [noise[None, :n] for n in lengths]}


def find_producers(model) -> dict:
    """The node that each tensor is an output of."""
    return {output: node for node in model.graph.node for output in node.output}


def _constants(model) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}


def _set_constant(model, node, position: int, value: np.ndarray) -> None:
    from onnx import numpy_helper

    name = f"{node.output[0]}:constant{position}"
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    node.input[position] = name


def _redirect(model, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def _uses(model) -> dict[str, int]:
    uses: dict[str, int] = {value.name: 1 for value in model.graph.output}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    return uses


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep TensorFlow's and tf2onnx's chatter off the terminal; their exceptions still come through."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # both are read when TensorFlow is imported, never later
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    names = ("tensorflow", "tf2onnx", "absl", "jax")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
