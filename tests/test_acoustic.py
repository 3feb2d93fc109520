"""The acoustic rule. Expected pitches are those the signals are built with, and librosa's YIN."""

import os
import subprocess
import sys

import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from w2s_jax.errors import UsageError
from w2s_jax.teachers import acoustic
from w2s_jax.teachers.acoustic import AcousticTeacher

RATE = 16_000
TIME = np.arange(2 * RATE) / RATE


def vowel(f0=120.0, tilt=-12.0, formants=(700, 1200, 2500), syllables=4.0, depth=0.9, wobble=0.0):
    """Harmonics of f0 with a tilt in dB per octave, formant bumps, and syllables per second as amplitude modulation."""
    f0 = f0 * 2 ** (wobble / 12 * np.sin(2 * np.pi * 0.8 * TIME))
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    wave = np.zeros_like(TIME)
    for k in range(1, int(7500 / f0.max()) + 1):
        frequency = k * f0.mean()
        gain = 10 ** (tilt * np.log2(frequency / 100) / 20)
        gain *= 1 + sum(4 / (1 + ((frequency - formant) / 80) ** 2) for formant in formants)
        wave += gain * np.sin(k * phase)
    wave *= 1 - depth * (0.5 + 0.5 * np.cos(2 * np.pi * syllables * TIME))
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def label(*waves):
    return AcousticTeacher()(np.stack(waves))


def pitch_hz(wave):
    return 100 * 2 ** (acoustic.statistics(wave)[0]["pitch"] / 12)


@pytest.mark.parametrize("f0", [70, 100, 137.3, 210, 333.3, 450])
def test_pitch_of_a_pulse_train(f0):
    wave = sum(np.cos(2 * np.pi * k * f0 * TIME) for k in range(1, int(7500 / f0) + 1))  # band-limited, of equal harmonics
    assert pitch_hz(wave) == pytest.approx(f0, rel=0.01)


@pytest.mark.parametrize("f0", [75, 110, 180, 260, 400])
def test_pitch_of_a_vowel_is_the_truth_and_that_of_yin(f0):
    wave = vowel(f0, depth=0.0)
    yin = np.median(librosa.yin(wave, fmin=60, fmax=500, sr=RATE, frame_length=1024))
    assert pitch_hz(wave) == pytest.approx(f0, rel=0.01)
    assert pitch_hz(wave) == pytest.approx(yin, rel=0.01)


def test_range_follows_the_excursion_of_the_pitch():
    # the mean distance of a sine from its middle is 2/π of its amplitude
    flat, lively = (acoustic.statistics(vowel(150, depth=0, wobble=w))[0]["range"] for w in (0.0, 3.0))
    assert flat < 0.1
    assert lively == pytest.approx(3 * 2 / np.pi, rel=0.15)


def test_brightness_and_pressedness_of_two_tones_are_their_levels():
    low, high = np.sin(2 * np.pi * 300 * TIME), np.sin(2 * np.pi * 1500 * TIME)
    values = acoustic.statistics(low + 0.1 * high)[0]  # a tenth of the amplitude is -20 dB
    assert values["brightness"] == pytest.approx(-20, abs=0.3)
    assert values["pressedness"] == pytest.approx(-20, abs=0.3)


def test_rate_grows_with_the_syllables_per_second():
    rates = [acoustic.statistics(vowel(syllables=s))[0]["rate"] for s in (1, 2, 3, 4, 6, 8)]
    assert np.all(np.diff(rates) > 0)


def arousal(wave):
    return label(wave)[0, 0]


def test_directions():
    assert arousal(vowel(220)) > arousal(vowel(110)) + 0.05  # Scherer 2003: pitch rises with arousal
    assert arousal(vowel(tilt=-6)) > arousal(vowel(tilt=-12)) + 0.02  # energy above 1 kHz too
    assert arousal(vowel(syllables=6)) > arousal(vowel(syllables=2)) + 0.1  # and the rate
    assert label(vowel(120, tilt=-6))[0, 1] > label(vowel(150, tilt=-6))[0, 1]  # low voices sound dominant (Ohala 1984)
    assert label(vowel(150, wobble=3))[0, 2] > label(vowel(150))[0, 2]


def test_gain_and_offset_do_not_matter():
    wave = vowel()
    reference = label(wave)
    np.testing.assert_array_equal(label(wave * np.float32(2**-6)), reference)
    for gain, offset in ((1e-3, 0), (0.37, 0), (30, 0), (0.5, 0.25)):
        np.testing.assert_allclose(label(wave * np.float32(gain) + np.float32(offset)), reference, atol=2e-4)


def test_a_label_does_not_depend_on_the_batch():
    random = np.random.default_rng(0)
    waves = np.stack([vowel(), vowel(200), random.normal(size=2 * RATE), np.zeros(2 * RATE), vowel(90)]).astype(np.float32)
    together = AcousticTeacher()(waves)
    for wave, expected in zip(waves, together, strict=True):
        np.testing.assert_array_equal(label(wave)[0], expected)
    np.testing.assert_array_equal(AcousticTeacher()(waves[::-1])[::-1], together)


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(2 * RATE),
        np.full(2 * RATE, 0.3),
        np.eye(1, 2 * RATE, 9000)[0],
        np.eye(1, 2 * RATE, 0)[0],
        np.eye(1, 2 * RATE - 1, 0)[0] - np.eye(1, 2 * RATE - 1, 2 * RATE - 2)[0],
        np.sign(np.sin(2 * np.pi * 200 * TIME)),
        np.sin(2 * np.pi * 7900 * TIME),
        np.where(TIME > 1, 1.0, 0.0),
        np.full(acoustic.FRAME, 1e-40),
        np.resize([3e38, -3e38], 2 * RATE),
        np.r_[np.zeros(RATE), 1e-30 * np.random.default_rng(0).normal(size=RATE)],
    ],
    ids=[
        "silence",
        "dc",
        "click",
        "click at 0",
        "clicks where no frame looks",
        "square",
        "ultrasonic",
        "step",
        "subnormal",
        "largest",
        "half silence",
    ],
)
def test_odd_audio_gives_finite_labels(wave):
    labels = label(wave.astype(np.float32))
    assert labels.shape == (1, 3) and labels.dtype == np.float32
    assert np.all((labels > 0) & (labels < 1))


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float32,
        st.integers(acoustic.FRAME, 3 * acoustic.FRAME),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    )
)
def test_any_finite_audio_gives_finite_labels(wave):
    labels = label(wave)
    assert np.all((labels > 0) & (labels < 1))


def test_wrong_input_is_an_error_that_says_what_was_expected():
    teacher = AcousticTeacher()
    with pytest.raises(UsageError, match="expected"):
        teacher(np.zeros(RATE, np.float32))
    with pytest.raises(UsageError, match="expected"):
        teacher(np.zeros((1, acoustic.FRAME - 1), np.float32))
    with pytest.raises(UsageError, match="finite"):
        teacher(np.full((1, RATE), np.nan, np.float32))
    assert teacher(np.zeros((0, RATE), np.float32)).shape == (0, 3)


def test_the_teacher_says_what_it_is(monkeypatch):
    teacher = AcousticTeacher()
    assert teacher.dimensions == ("arousal", "dominance", "valence")
    assert teacher.stand_in and "rule" in teacher.licence
    before = teacher.fingerprint
    assert before == AcousticTeacher().fingerprint
    monkeypatch.setitem(acoustic.TERMS, "pitch", (0.0, 1.0))
    assert teacher.fingerprint != before


# numba looks for a directory where it can make a temporary file; none of them can be written here, as on a read-only machine
_READ_ONLY = """
import sys, tempfile
def refuse(*_, **__): raise OSError(30, "Read-only file system")
tempfile.TemporaryFile = refuse
import numpy as np
from w2s_jax.models.frontend import mel_matrix
from w2s_jax.teachers.acoustic import AcousticTeacher
waves = np.load(sys.stdin.buffer)
np.savez(sys.stdout.buffer, mel=mel_matrix(64, 26), labels=AcousticTeacher()(waves))
"""


def test_mel_filters_and_labels_are_the_same_where_nothing_can_be_written(tmp_path):
    waves = np.stack([vowel(110), vowel(220, wobble=2)])
    np.save(tmp_path / "waves.npy", waves)
    environment = {key: value for key, value in os.environ.items() if key not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    with open(tmp_path / "waves.npy", "rb") as stdin, open(tmp_path / "out.npz", "wb") as stdout:
        environment |= {"HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", _READ_ONLY]
        subprocess.run(command, stdin=stdin, stdout=stdout, env=environment, cwd=tmp_path, check=True, timeout=120)
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(found["mel"], librosa.filters.mel(sr=RATE, n_fft=64, n_mels=26).T)
    np.testing.assert_array_equal(found["labels"], label(*waves))
