"""The students: small Flax networks from waveform to named dimensions."""

from __future__ import annotations

import math

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
except ImportError as error:
    from w2s_jax.artifacts import missing_extra

    raise missing_extra(error.name or "jax", "train") from error

from w2s_jax import SAMPLING_RATE
from w2s_jax.artifacts import UsageError
from w2s_jax.devices import computing
from w2s_jax.models.cnn14 import CNN14
from w2s_jax.models.forms import RUNNING  # noqa: F401 (part of the API)
from w2s_jax.models.frontend import PRESETS  # noqa: F401 (part of the API)
from w2s_jax.models.mobilenet import (
    Convolution,
    MobileNetV3L,
    MobileNetV3S,
    MobileNetV4L,
    MobileNetV4M,
    MobileNetV4S,
    convolution,
)
from w2s_jax.models.wav2small import Wav2Small, Wav2Small17K

#: Name → module class. ``build`` makes one; a new student is one more line here.
STUDENTS: dict[str, type[nn.Module]] = {
    "wav2small": Wav2Small,
    "wav2small_17k": Wav2Small17K,
    "mobilenet_v3_s": MobileNetV3S,
    "mobilenet_v3_l": MobileNetV3L,
    "mobilenet_v4_s": MobileNetV4S,
    "mobilenet_v4_m": MobileNetV4M,
    "mobilenet_v4_l": MobileNetV4L,
    "cnn14": CNN14,
}


def build(name: str, **fields) -> nn.Module:
    """A student by name, its fields overridden by keyword.

    Args:
        name: one of ``STUDENTS``.
        **fields: fields of the module, for example ``channels=16`` or ``dimensions=3`` (how many outputs).

    Returns:
        A linen module: ``student.apply(variables, wave)`` maps float32 [B, T] at 16 kHz to [B, dimensions].

    Raises:
        UsageError: no such student, or no such field.

    Example:
        >>> count(build("wav2small"))["trained"]
        67577
    """
    if name not in STUDENTS:
        raise UsageError(f"unknown student {name!r}; there are: {', '.join(STUDENTS)}")
    known = [field for field in STUDENTS[name].__dataclass_fields__ if field not in ("parent", "name")]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise UsageError(f"student {name} has no field {', '.join(unknown)}; its fields: {', '.join(known)}")
    return STUDENTS[name](**fields)


@computing()
def count(student: nn.Module) -> dict[str, int]:
    """Parameters of a student, ``trained`` and ``fixed`` (the front end), without computing anything."""
    shapes = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, SAMPLING_RATE)))
    sizes = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    return {"trained": sizes["params"], "fixed": sizes["frontend"]}


@computing()
def macs(student: nn.Module, samples: int = 5 * SAMPLING_RATE) -> int:
    """Multiply-accumulates of one utterance in inference, counted from the traced network; nothing is computed.

    Convolutions (zeros of the padding included) and matrix products are counted; sums, BatchNorm and activations are not.

    Args:
        student: from ``build``.
        samples: length of the utterance; 5 s unless told, the paper's measure.

    Raises:
        UsageError: the utterance is too short for the student.

    Example:
        >>> macs(build("wav2small"))
        390967041
    """
    if samples < student.minimum_samples:
        raise UsageError(f"samples is {samples}; {type(student).__name__} needs at least {student.minimum_samples}")

    def as_convolutions(call, args, kwargs, context):
        # on a CPU a MobileNet computes them as sums of shifted products, which have no operator to be known by
        if isinstance(context.module, Convolution):
            return convolution(*args, context.module.get_variable("params", "kernel"), context.module.stride)
        return call(*args, **kwargs)

    if hasattr(student, "form"):
        student = student.clone(form="direct")  # the others multiply zeros
    wave = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    variables = jax.eval_shape(student.init, jax.random.key(0), wave)
    with nn.intercept_methods(as_convolutions):
        return _macs(jax.make_jaxpr(student.apply)(variables, wave).jaxpr)


def _macs(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * math.prod(kernel) // channels
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        for inner in equation.params.values():  # jit, custom_jvp, custom_vjp: jaxprs, open or closed
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += _macs(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total
