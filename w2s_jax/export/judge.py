"""What a file must prove before it is written: parity with the student if its kind is exact, else a CCC with fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from w2s_jax import SAMPLING_RATE
from w2s_jax.errors import W2SError
from w2s_jax.kinds import KINDS
from w2s_jax.metrics import ccc
from w2s_jax.runtime import Predictor

#: Largest difference between an output of an exact kind and of the Flax module, as a share of the largest output if that is
#: above 1: float32 has no more digits.
PARITY_LIMIT = 1e-4
#: Lengths in samples on which parity is proven, besides the shortest ones: primes, whole seconds, up to a minute.
PARITY_LENGTHS = (127, 1021, 8191, 16_000, 31_991, 80_000, 960_000)


def make_cases(student, variables: Mapping, waves: Sequence[np.ndarray]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name of a signal, waveform, and the Flax module's logits for it: noise, silence and real audio of every length."""
    shortest = student.minimum_samples
    lengths = sorted({shortest, shortest + 1, shortest + student.hop, *(n for n in PARITY_LENGTHS if n > shortest)})
    longest = lengths[-1]
    signals = {
        "noise": np.random.default_rng(0).normal(size=longest).astype(np.float32),
        # a minute of equal frames is the worst case of onnxruntime's float32 sums over time (relative error 3e-5)
        "silence": np.zeros(5 * SAMPLING_RATE, np.float32),
    }
    if len(waves):
        real = np.concatenate(waves[:64])
        signals["audio"] = np.resize(real, longest)  # repeats what is too short
    cases = [(name, signal[:length]) for length in lengths for name, signal in signals.items() if length <= len(signal)]
    reference = jax.jit(student.apply)
    return [(name, wave, np.asarray(reference(variables, wave[None]))[0]) for name, wave in cases]


def check_parity(
    kind: str, predictor: Predictor, cases: Sequence[tuple[str, np.ndarray, np.ndarray]]
) -> tuple[list[int], dict]:
    """Compare a model with the Flax module.

    Args:
        kind: of the model.
        predictor: the model; it refuses to return what is not finite.
        cases: of ``make_cases``.

    Returns:
        The lengths in samples, and how large the differences are.

    Raises:
        W2SError: the kind is exact, and a difference is above ``PARITY_LIMIT``.
    """
    worst, largest = 0.0, 0.0
    for name, wave, expected in cases:
        actual = np.array(list(predictor(wave).values()))
        scale = np.abs(expected).max()
        difference = float(np.abs(actual - expected).max() / max(1.0, scale))
        if KINDS[kind].exact and not difference <= PARITY_LIMIT:  # not a number is no parity either
            raise W2SError(
                f"the {kind} model and the Flax student differ by {difference:.2g} on {len(wave)} samples of {name}; "
                f"the limit is {PARITY_LIMIT:.0e}{', nothing was written' * (kind == 'fp32')}"
            )
        worst, largest = max(worst, difference), max(largest, float(scale))
    lengths = sorted({len(wave) for _, wave, _ in cases})
    signals = list(dict.fromkeys(name for name, _, _ in cases))
    about = {"limit": PARITY_LIMIT, "max_difference": worst, "largest_output": largest, "lengths": lengths, "signals": signals}
    return lengths, about


def predict(predictor: Predictor, waves: Sequence[np.ndarray]) -> np.ndarray:
    """A model's logits for each wave, [waves, dimensions]."""
    return np.array([list(predictor(wave).values()) for wave in waves])


def compare(outputs: np.ndarray, reference: np.ndarray, dimensions: Sequence[str]) -> dict:
    """CCC and largest difference of a kind's outputs from fp32's, both [waves, dimensions]."""
    scores = {name: float(score) for name, score in zip(dimensions, ccc(outputs, reference), strict=True)}
    return {"ccc": scores, "max_difference": float(np.abs(outputs - reference).max()), "views": len(outputs)}


def require_ccc(kind: str, row: dict, least: float) -> None:
    """Refuse a kind whose row in the report has a CCC below ``least``, with the options that may help."""
    worst = min(row["ccc"], key=row["ccc"].get)
    if not row["ccc"][worst] >= least:
        ways = ["give --calibration audio of the kind that the student was trained on"]
        if KINDS[kind].calibrated:
            ways.append("take --kind int8w, whose weights alone are rounded")
        ways.append(f"or accept it with a lower --min-ccc than {least:g}")
        raise W2SError(
            f"too far from fp32: CCC {row['ccc'][worst]:.4f} in {worst} on {row['views']} waves, at least {least:g} expected; "
            + ", ".join(ways)
        )
