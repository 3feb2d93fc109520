"""The students: small Flax networks from waveform to named dimensions."""

from __future__ import annotations

import math

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
except ImportError as error:
    from w2s_jax.errors import missing_extra

    raise missing_extra(error.name or "jax", "train") from error

from w2s_jax import SAMPLING_RATE
from w2s_jax.devices import computing
from w2s_jax.errors import UsageError
from w2s_jax.models.cnn14 import CNN14
from w2s_jax.models.forms import RUNNING  # noqa: F401 (part of the API)
from w2s_jax.models.frontend import PRESETS  # noqa: F401 (part of the API)
from w2s_jax.models.mobilenet import MobileNetV3L, MobileNetV3S, MobileNetV4L, MobileNetV4M, MobileNetV4S
from w2s_jax.models.plan import Plan
from w2s_jax.models.wav2small import Wav2Small, Wav2Small17K
from w2s_jax.names import line

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


#: Field → smallest and largest value; what is larger fills no network, only memory. The published ones are far inside.
RANGES = {
    "dimensions": (1, 1000), "channels": (1, 4096), "n_fft": (2, 4096), "hop": (1, 4096), "n_mels": (1, 1024),
    "before": (1, 64), "after": (0, 64), "kernel": (1, 63), "stride": (1, 64), "width": (1 / 64, 16),
}  # fmt: skip


def build(name: str, **fields) -> nn.Module:
    """A student by name, its fields overridden by keyword.

    Args:
        name: one of ``STUDENTS``.
        **fields: fields of the module, for example ``channels=16`` or ``dimensions=3`` (how many outputs).

    Returns:
        A linen module: ``student.apply(variables, wave)`` maps float32 [B, T] at 16 kHz to [B, dimensions].

    Raises:
        UsageError: no such student, no such field, or a value that the field cannot have.

    Example:
        >>> count(build("wav2small"))["trained"]
        67577
    """
    if not isinstance(name, str) or name not in STUDENTS:
        raise UsageError(f"unknown student {line(repr(name), 80)}; there are: {', '.join(STUDENTS)}")
    known = [field for field in STUDENTS[name].__dataclass_fields__ if field not in ("parent", "name")]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise UsageError(f"student {name} has no field {line(', '.join(unknown), 80)}; its fields: {', '.join(known)}")
    for field, value in fields.items():
        _check_field(f"student {name}: {field}", STUDENTS[name].__dataclass_fields__[field].type, value, RANGES.get(field))
    return STUDENTS[name](**fields)


def _check_field(what: str, kind: str, value: object, limits: tuple | None) -> None:
    """Refuse a value that is not of a field's type, as its class writes it, or outside its limits."""
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "str | None": (str, type(None))}.get(kind, (object,))
    least, most = limits or (-math.inf, math.inf)
    if isinstance(value, kinds) and not isinstance(value, bool) and (limits is None or least <= value <= most):
        return
    expected = {"int": "a whole number", "float": "a number", "str": "a text"}.get(kind, kind)
    bounds = f" of at least {least:g} and at most {most}" if limits else ""
    raise UsageError(f"{what} is {line(repr(value), 40)}; expected {expected}{bounds}")


@computing()
def shapes(student: nn.Module) -> dict:
    """The variables of a module that reads waveforms [B, T], with shapes in the place of arrays; nothing is computed."""
    samples = max(SAMPLING_RATE, getattr(student, "minimum_samples", 0))
    return jax.eval_shape(student.init, jax.random.key(0), jax.ShapeDtypeStruct((1, samples), jnp.float32))


@computing()
def count(student: nn.Module) -> dict[str, int]:
    """Parameters of a student, ``trained`` and ``fixed`` (the front end), without computing anything."""
    sizes = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for part, tree in shapes(student).items()}
    return {"trained": sizes["params"], "fixed": sizes["frontend"]}


@computing()
def outline(student: nn.Module) -> Plan:
    """The plan of a student with shapes in the place of weights; nothing is computed.

    Raises:
        UsageError: the student has no method ``fold``.
    """
    if not hasattr(student, "fold"):
        raise UsageError(f"{type(student).__name__} has no method fold, which makes its plan (see w2s_jax.models.plan)")
    return jax.eval_shape(student.fold, shapes(student))


def macs(student: nn.Module, samples: int = 5 * SAMPLING_RATE) -> int:
    """Multiply-accumulates of one utterance in inference; nothing is computed.

    Convolutions (zeros of the padding included) and matrix products are counted; sums, BatchNorm and activations are not.

    Args:
        student: from ``build``.
        samples: length of the utterance; by default 5 s, the paper's measure.

    Raises:
        UsageError: the utterance is too short for the student.

    Example:
        >>> macs(build("wav2small"))
        390967041
    """
    if samples < student.minimum_samples:
        raise UsageError(f"samples is {samples}; {type(student).__name__} needs at least {student.minimum_samples}")
    return outline(student).macs(samples)
