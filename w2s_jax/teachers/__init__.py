"""Teachers: large models, or rules, that label waveforms with target values."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from w2s_jax import SAMPLING_RATE, metrics
from w2s_jax.errors import UsageError, missing_extra

#: Names that ``load`` accepts, with a line for --help.
NAMES = {
    "paper": "mean of wav2vec2 and wavlm, the teacher of the paper (CC-BY-NC-SA-4.0)",
    "wavlm": "WavLM-large with attentive pooling, trained on MSP-Podcast (MIT)",
    "wav2vec2": "wav2vec2-large-robust with 12 layers, trained on MSP-Podcast (CC-BY-NC-SA-4.0)",
    "acoustic": "a rule from pitch, its range, spectral balance and rate; needs no download; a stand-in, not an emotion model",
    "dnsmos": "three speech-quality scores (sig, bak, ovrl) of the DNSMOS network from the speechmos package",
    "onnx:FILE": "any ONNX model from 16 kHz waveform to K values; names from its metadata or --dimensions",
}


#: Transformers with published checkpoints; they accept options of ``load`` that the others refuse.
NEURAL = ("paper", "wavlm", "wav2vec2")


class Teacher(Protocol):
    """Labels waveforms. A teacher needs the first four attributes; the others it may leave out (see ``attribute``).

    Attributes:
        name: as given to ``load``, without a path.
        dimensions: names of the outputs, in order.
        fingerprint: changes whenever the outputs would.
        licence: the terms that a student of this teacher inherits.
        stand_in: True where the values only imitate the real thing.
        devices: how many share a batch.
        masks: True where a second argument, int [B], may say how many samples of each row count.
        parameters: number of weights.
        about: what else provenance says of it.
        doubt: why its labels cannot be trusted; ``label`` refuses a teacher with a doubt.
        golden: largest difference to a published golden value.
        members: the teachers that it is made of. With them it has two methods: ``each`` (waves → a list of every member's
            labels) and ``mean`` (that list → the teacher's labels).
    """

    name: str
    dimensions: tuple[str, ...]
    fingerprint: str
    licence: str
    stand_in: bool = False
    devices: int = 1
    masks: bool = False
    parameters: int | None = None
    about: Mapping = MappingProxyType({})
    doubt: str | None = None
    golden: float | None = None
    members: tuple[Teacher, ...] = ()

    def __call__(self, waves: np.ndarray) -> np.ndarray:
        """float32 16 kHz mono [B, T] → float32 [B, dimensions]; a row does not depend on the rest of its batch."""
        ...


def attribute(teacher: Teacher, name: str):
    """An attribute of a teacher, or that of ``Teacher`` where it left it out."""
    return getattr(teacher, name, getattr(Teacher, name))


def load(
    name: str,
    checkpoint_dir: str | os.PathLike | None = None,
    dimensions: tuple[str, ...] | None = None,
    *,
    dtype: str | None = None,
    normalisation: str | None = None,
    revision: str | None = None,
    output: str | None = None,
) -> Teacher:
    """Load a teacher by name.

    Args:
        name: one of ``NAMES``; ``onnx:FILE`` takes the path of a model.
        checkpoint_dir: where the teacher's files lie (for paper: a directory with the folders wav2vec2 and wavlm); default:
            the Hugging Face hub and its cache, or where a package put them.
        dimensions: names for the outputs of an ``onnx:`` model that does not name them itself.
        dtype: what a Transformer computes in, "float32" (default) or "bfloat16".
        normalisation: of the waveform for WavLM, "official" (default for wavlm) or "paper" (default for paper).
        output: of an ``onnx:`` model with several, the one to take; default: "logits", or the only one as wide as the names.
        revision: branch, tag or commit on the hub; weights that are named so need not give the published golden value.

    Raises:
        UsageError: no such teacher, its files or its package are missing, or it cannot be used as one.
        MismatchError: the files are not this teacher's; lists the differences.

    Example:
        >>> teacher = load("acoustic")
        >>> teacher(np.zeros((1, 16000), np.float32)).shape
        (1, 3)
    """
    options = {"--dtype": dtype, "--normalisation": normalisation, "--revision": revision}
    given = [option for option, value in options.items() if value is not None]
    if given and name not in NEURAL:
        raise UsageError(f"teacher {name} has no {', '.join(given)}; that is for {', '.join(NEURAL)}")
    if normalisation is not None and name == "wav2vec2":
        raise UsageError("teacher wav2vec2 normalises every utterance; --normalisation is for wavlm and paper")
    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"a teacher computes in float32 or bfloat16, not in {dtype!r}")
    if dimensions and not name.startswith("onnx:"):
        raise UsageError(f"teacher {name} names its own dimensions; --dimensions is for onnx:FILE")
    if output and not name.startswith("onnx:"):
        raise UsageError(f"teacher {name} has one output; --output is for onnx:FILE")
    if checkpoint_dir is not None and name not in (*NEURAL, "dnsmos"):
        raise UsageError(f"teacher {name} has no checkpoint directory; --checkpoint-dir is for {', '.join(NEURAL)} and dnsmos")
    if name == "acoustic":
        from w2s_jax.teachers.acoustic import AcousticTeacher

        return AcousticTeacher()
    if name == "dnsmos":
        from w2s_jax.teachers.onnx import dnsmos

        return dnsmos(checkpoint_dir)
    if name.startswith("onnx:"):
        from w2s_jax.teachers.onnx import OnnxTeacher

        return OnnxTeacher(name.removeprefix("onnx:"), dimensions=dimensions, output=output)
    if name not in NEURAL:
        raise UsageError(f"unknown teacher {name!r}; there are: {', '.join(NAMES)}")
    try:
        from w2s_jax.teachers import ensemble, wav2vec2, wavlm
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("transformers"):
            raise
        # transformers 5 is there, but has no Flax models any more
        raise missing_extra("transformers 4.57 (the last with Flax models)", "teacher") from error
    common = {"dtype": dtype or "float32", "revision": revision}
    if name == "wav2vec2":
        return wav2vec2.load(checkpoint_dir, **common)
    if name == "wavlm":
        return wavlm.load(checkpoint_dir, **common, normalisation=normalisation or "official")
    members = (
        wav2vec2.load(checkpoint_dir, **common),
        wavlm.load(checkpoint_dir, **common, normalisation=normalisation or "paper"),
    )
    return ensemble.Ensemble("paper", members)


def label_with_members(teacher: Teacher, waves: np.ndarray) -> list:
    """Label float32 [B, T] by a teacher and by each of its members, if it has any: arrays [B, D]."""
    if not attribute(teacher, "members"):
        return [teacher(waves)]
    each = teacher.each(waves)
    return [teacher.mean(each), *each]


def provenance(teacher: Teacher) -> dict:
    """The description of a teacher that labels, students and models carry."""
    about = {
        "name": teacher.name,
        "dimensions": list(teacher.dimensions),
        "fingerprint": teacher.fingerprint,
        "licence": teacher.licence,
        "stand_in": attribute(teacher, "stand_in"),
        **attribute(teacher, "about"),
    }
    members = attribute(teacher, "members")
    return {**about, "members": [provenance(member) for member in members]} if members else about


def check(teacher: Teacher, batch_size: int = 4, seconds: float = 5.0) -> dict:
    """Describe a teacher before it labels, and measure its speed on this machine.

    Args:
        teacher: from ``load``.
        batch_size: views in a batch, per device.
        seconds: their length.

    Returns:
        Provenance with ``parameters``, ``golden_difference`` (by name, for those that have a published value), ``doubt``,
        ``devices``, ``batch_size``, ``seconds``, ``views_per_second`` and ``seconds_per_hour`` (of audio). The speed is the
        median of three batches of noise, after one that compiles.
    """
    devices = attribute(teacher, "devices")
    shape = batch_size * devices, round(seconds * SAMPLING_RATE)
    waves = 0.1 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        np.asarray(teacher(waves))
        times.append(time.perf_counter() - began)
    rate = len(waves) / float(np.median(times[1:]))
    golden = {member.name: attribute(member, "golden") for member in attribute(teacher, "members") or (teacher,)}
    return {
        **provenance(teacher),
        "parameters": attribute(teacher, "parameters"),
        "golden_difference": {name: value for name, value in golden.items() if value is not None},
        "doubt": attribute(teacher, "doubt"),
        "devices": devices,
        "batch_size": batch_size,
        "seconds": seconds,
        "views_per_second": round(rate, 3),
        "seconds_per_hour": round(3600 / (rate * seconds), 2),
    }


def compare(teacher: Teacher, other: Teacher, waves: list[np.ndarray]) -> dict:
    """Compare two teachers' labels of the same waveforms (float32 [T] each).

    Returns:
        ``{"clips", "ccc": {dimension: …}, "largest_difference"}``

    Raises:
        UsageError: fewer than two of the waveforms have the length that most of them have.
    """
    lengths, counts = np.unique([len(wave) for wave in waves], return_counts=True)
    alike = [wave for wave in waves if len(wave) == lengths[counts.argmax()]] if waves else []  # a length is compiled once
    if len(alike) < 2:
        raise UsageError(f"of {len(waves)} clips, no two have the same length; choose shorter --seconds")
    one, two = (np.concatenate([np.asarray(model(wave[None])) for wave in alike]) for model in (teacher, other))
    score = metrics.ccc(one, two)
    return {
        "clips": len(alike),
        "ccc": {name: round(float(value), 5) for name, value in zip(teacher.dimensions, score, strict=True)},
        "largest_difference": round(float(np.abs(one - two).max()), 5),
    }
