"""Teachers: large or ruled models that give waveforms their target values."""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np

from w2s_jax.artifacts import UsageError

#: What ``load`` understands, with a line for --help.
NAMES = {
    "acoustic": "a rule from pitch, its range, spectral balance and rate; needs no download; a stand-in, not an emotion model",
    "dnsmos": "three speech-quality scores (sig, bak, ovrl) of the DNSMOS network from the speechmos package",
    "onnx:FILE": "any ONNX model from 16 kHz waveform to K values; names from its metadata or --dimensions",
}


class Teacher(Protocol):
    """What labels views.

    Attributes:
        name: as given to ``load``, without a path.
        dimensions: names of the outputs, in order.
        fingerprint: changes whenever the outputs would.
        licence: the terms that a student of this teacher inherits.
        stand_in: True where the values only imitate the real thing.
    """

    name: str
    dimensions: tuple[str, ...]
    fingerprint: str
    licence: str
    stand_in: bool

    def __call__(self, waves: np.ndarray) -> np.ndarray:
        """float32 16 kHz mono [B, T] → float32 [B, dimensions]; a row does not depend on the rest of its batch."""
        ...


def load(name: str, checkpoint_dir: str | os.PathLike | None = None, dimensions: tuple[str, ...] | None = None) -> Teacher:
    """A teacher by name.

    Args:
        name: one of ``NAMES``; ``onnx:FILE`` takes the path of a model.
        checkpoint_dir: where the teacher's files lie, for those that have any; default: where their package puts them.
        dimensions: names for the outputs of an ``onnx:`` model that does not name them itself.

    Raises:
        UsageError: no such teacher, its files or its package are missing, or it cannot be used as one.
    """
    if dimensions and not name.startswith("onnx:"):
        raise UsageError(f"teacher {name} names its own dimensions; --dimensions is for onnx:FILE")
    if checkpoint_dir is not None and name != "dnsmos":
        raise UsageError(f"teacher {name} has no checkpoint directory; --checkpoint-dir is for dnsmos")
    if name == "acoustic":
        from w2s_jax.teachers.acoustic import AcousticTeacher

        return AcousticTeacher()
    if name == "dnsmos":
        from w2s_jax.teachers.onnx import dnsmos

        return dnsmos(checkpoint_dir)
    if name.startswith("onnx:"):
        from w2s_jax.teachers.onnx import OnnxTeacher

        return OnnxTeacher(name.removeprefix("onnx:"), dimensions=dimensions)
    raise UsageError(f"unknown teacher {name!r}; there are: {', '.join(NAMES)}")


def provenance(teacher: Teacher) -> dict:
    """What labels, students and models keep of the teacher that made them."""
    return {
        "name": teacher.name,
        "dimensions": list(teacher.dimensions),
        "fingerprint": teacher.fingerprint,
        "licence": teacher.licence,
        "stand_in": teacher.stand_in,
    }
