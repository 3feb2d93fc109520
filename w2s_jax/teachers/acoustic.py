"""A stand-in teacher without weights: a fixed acoustic rule, for the quickstart, the tests and machines without a network."""

from __future__ import annotations

import numpy as np

from w2s_jax import DIMENSIONS, SAMPLING_RATE
from w2s_jax.errors import UsageError
from w2s_jax.files import fingerprint

#: Raised when the code below changes what the rule says; labels carry it in their fingerprint.
VERSION = 1

#: Statistic → (centre, scale): typical value and spread, measured once on the generated corpus of ``w2s_jax.speech``.
TERMS = {
    "pitch": (6.4, 7.6),  # semitones above 100 Hz
    "range": (1.4, 0.63),  # semitones
    "brightness": (-8.2, 6.0),  # dB
    "pressedness": (-3.2, 5.9),  # dB
    "rate": (178.0, 36.0),  # dB per second
}

#: Dimension → weight of each term.
WEIGHTS = {
    "arousal": {"pitch": 0.45, "brightness": 0.35, "rate": 0.6},
    "dominance": {"pitch": -0.4, "brightness": 0.65, "rate": 0.25},
    "valence": {"pitch": 0.35, "range": 0.35, "pressedness": -0.65},
}

FRAME, HOP, N_FFT = 768, 160, 1536  # 48 ms: three periods of the lowest pitch; N_FFT keeps the autocorrelation linear
SHORTEST, LONGEST = SAMPLING_RATE // 500, SAMPLING_RATE // 60  # pitch periods in samples: 500 Hz to 60 Hz
FLOOR_DB = -40.0  # what is this far below the loudest frame counts as silence

_WINDOW = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
_LAGS = np.arange(SHORTEST - 1, LONGEST + 2)  # one more on each side, for the parabola
_WINDOW_AUTOCORRELATION = np.fft.irfft(np.abs(np.fft.rfft(_WINDOW, N_FFT)) ** 2, N_FFT)
_WINDOW_AUTOCORRELATION = _WINDOW_AUTOCORRELATION[_LAGS] / _WINDOW_AUTOCORRELATION[0]
_SMOOTHING = np.hanning(9)[1:-1] / np.hanning(9).sum()  # 70 ms: keeps the syllables (2 to 8 Hz), drops pitch and clicks


class AcousticTeacher:
    """A/D/V by a rule from pitch, pitch range, spectral balance and rate. It is a stand-in and NOT an emotion model.

    The rule exists so that the whole pipeline can be run and tested without downloads. Its directions loosely follow what the
    literature reports, its constants are ours and fitted to no emotional speech. Per utterance, over frames of 48 ms every
    10 ms, each frame weighted by its energy to the power 0.3:

    - ``pitch``: median F0 of the voiced frames in semitones above 100 Hz; F0 is the best peak of the autocorrelation (below
      1 kHz) divided by that of the window (Boersma 1993), 60 to 500 Hz.
    - ``range``: mean distance of F0 from its median, in semitones, each distance at most 6.
    - ``brightness``: alpha ratio, energy in 1–5 kHz over 50 Hz–1 kHz, in dB (eGeMAPS, Eyben et al. 2016).
    - ``pressedness``: energy in 500 Hz–2 kHz over 50–500 Hz, in dB; low for a soft voice that is mostly fundamental (after
      the spectral slopes of eGeMAPS).
    - ``rate``: mean absolute slope of the level, smoothed over 70 ms and cut 40 dB below the loudest frame, in dB/s: it grows
      with the speed and the depth of the syllables' modulation (2–8 Hz).

    Every statistic s becomes a term ``t = 3 · tanh((s − centre) / (3 · scale))`` (``TERMS``), the terms of pitch and range
    shrunk to 0 when nothing is voiced, those of the spectrum 0 for silence. A dimension is ``1 / (1 + exp(−Σ w·t))``:

    - arousal = σ(0.45 pitch + 0.35 brightness + 0.6 rate): high, bright and fast speech sounds aroused (Scherer 2003).
    - dominance = σ(−0.4 pitch + 0.65 brightness + 0.25 rate): low and bright voices sound dominant (the frequency code, Ohala
      1984; Scherer 2003).
    - valence = σ(0.35 pitch + 0.35 range − 0.65 pressedness): lively and soft. Valence has no agreed acoustic cue; this one is
      a choice.

    The gain and a constant offset do not matter; each utterance is labelled by itself, whatever else is in the batch.

    References:
        Boersma, Proc. Inst. Phonetic Sciences 17, 1993. Eyben et al., "The Geneva Minimalistic Acoustic Parameter Set", IEEE
        Trans. Affective Computing 7, 2016. Ohala, Phonetica 41, 1984. Scherer, "Vocal communication of emotion", Speech
        Communication 40, 2003.

    Example:
        >>> labels = AcousticTeacher()(np.zeros((1, 32000), np.float32))  # [1, 3]
    """

    name = "acoustic"
    dimensions = DIMENSIONS
    licence = "Apache-2.0 (a rule, no data)"
    stand_in = True

    @property
    def fingerprint(self) -> str:
        """Changes with the version, the constants and the weights of the rule."""
        return fingerprint(self.name, VERSION, TERMS, WEIGHTS, [FRAME, HOP, N_FFT, SHORTEST, LONGEST, FLOOR_DB])

    def __call__(self, waves: np.ndarray) -> np.ndarray:
        """Label waveforms: float32 [B, T] at 16 kHz, T at least 768 (48 ms) → float32 [B, 3] in 0..1.

        Raises:
            UsageError: another shape, or samples that are not finite.
        """
        waves = np.asarray(waves)
        if waves.ndim != 2 or waves.shape[1] < FRAME:
            raise UsageError(f"the acoustic teacher got waves of shape {waves.shape}; expected [B, T] with T ≥ {FRAME}")
        if not np.isfinite(waves).all():
            raise UsageError("the acoustic teacher got samples that are not finite; check the audio")
        # one row at a time: the same bits whatever the batch, and no large temporaries
        return np.array([_label_one(wave.astype(np.float64)) for wave in waves], np.float32).reshape(-1, len(DIMENSIONS))


def _label_one(wave: np.ndarray) -> list[float]:
    """One utterance, float64 [T] → the values of ``DIMENSIONS``."""
    values, trust = statistics(wave)
    terms = {name: trust[name] * 3 * np.tanh((values[name] - centre) / (3 * scale)) for name, (centre, scale) in TERMS.items()}
    return [1 / (1 + np.exp(-sum(weight * terms[name] for name, weight in WEIGHTS[d].items()))) for d in DIMENSIONS]


def statistics(wave: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """What the rule looks at, for one utterance float [T]: the statistics of ``TERMS`` in their units, and trust in 0..1."""
    wave = wave.astype(np.float64)
    centred = wave - wave.mean()
    peak = np.abs(centred).max()
    silence = dict.fromkeys(TERMS, 0.0), {name: float(name == "rate") for name in TERMS}
    if peak <= 1e-6 * np.abs(wave).max():  # zeros, or a constant with rounding noise
        return silence

    frames = np.lib.stride_tricks.sliding_window_view(centred / peak, FRAME)[::HOP]
    spectrum = np.fft.rfft(frames * _WINDOW, N_FFT)
    power = spectrum.real**2 + spectrum.imag**2
    if not power.any():  # all of it lies where no frame looks: at the ends, under the window's zeros
        return silence
    energy = power.sum(axis=1) / power.sum(axis=1).max()
    weight = energy**0.3 / (energy**0.3).sum()

    level = np.maximum(10 * np.log10(energy + 1e-12), FLOOR_DB)
    smooth = np.convolve(level, _SMOOTHING, "valid") if len(level) > len(_SMOOTHING) else level[:1]
    rate = np.abs(np.diff(smooth)).mean() * SAMPLING_RATE / HOP if len(smooth) > 1 else 0.0

    semitones, voicing = _pitch(power)
    voicing = voicing * (level > FLOOR_DB + 10) * weight
    voiced = voicing.sum()
    order = np.argsort(semitones)
    middle = min(np.searchsorted(np.cumsum(voicing[order]), voiced / 2), len(order) - 1)
    pitch = semitones[order[middle]]
    spread = (voicing * np.minimum(np.abs(semitones - pitch), 6)).sum() / max(voiced, 1e-9)

    values = {
        "pitch": pitch,
        "range": spread,
        "brightness": (weight * _ratio(power, (1000, 5000), (50, 1000))).sum(),
        "pressedness": (weight * _ratio(power, (500, 2000), (50, 500))).sum(),
        "rate": rate,
    }
    tonal = voiced / (voiced + 0.05)
    return values, {"pitch": tonal, "range": tonal, "brightness": 1.0, "pressedness": 1.0, "rate": 1.0}


def _pitch(power: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Power spectra [frames, N_FFT // 2 + 1] → F0 in semitones above 100 Hz [frames], and voicing in 0..1 [frames]."""
    # below 1 kHz only (Dubnowski et al. 1976): narrow peaks between two samples would lose against their multiples
    correlation = np.fft.irfft(power[:, : 1000 * N_FFT // SAMPLING_RATE], N_FFT)
    correlation = correlation[:, _LAGS] / (correlation[:, :1] + 1e-12) / _WINDOW_AUTOCORRELATION
    # a small cost per octave, so that of equally good peaks the shortest period wins (Boersma 1993)
    best = np.argmax(correlation[:, 1:-1] - 0.02 * np.log2(_LAGS[1:-1] / SHORTEST), axis=1) + 1
    row = np.arange(len(best))
    left, top, right = correlation[row, best - 1], correlation[row, best], correlation[row, best + 1]
    bend = left - 2 * top + right
    shift = np.where(bend < -1e-9, 0.5 * (left - right) / np.where(bend < -1e-9, bend, 1.0), 0.0)
    period = _LAGS[best] + np.clip(shift, -0.5, 0.5)
    return 12 * np.log2(SAMPLING_RATE / period / 100), np.clip((top - 0.45) / 0.3, 0, 1)


def _ratio(power: np.ndarray, upper: tuple[int, int], lower: tuple[int, int]) -> np.ndarray:
    """Energy in the upper over that in the lower band (Hz) per frame, in dB, within ±30: [frames, bins] → [frames]."""
    total = power.sum(axis=1)
    high, low = (power[:, lo * N_FFT // SAMPLING_RATE : hi * N_FFT // SAMPLING_RATE].sum(axis=1) for lo, hi in (upper, lower))
    silent = total <= 0
    return np.clip(10 * np.log10((high + 1e-4 * total + silent) / (low + 1e-4 * total + silent)), -30, 30)
