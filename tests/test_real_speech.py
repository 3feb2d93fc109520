"""A slice of the real chain: Czech recordings, the DNSMOS network, and what comes out, compared with other people's code.

W2S_CZECH names the folder ``sound`` of Debian's fillets-ng-data-cs (experiments/czech_dnsmos.py says how to get it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest

from w2s_jax import SAMPLING_RATE, audio, checkpoint
from w2s_jax.models.frontend import normalise

SOUND = Path(os.environ.get("W2S_CZECH", "/nonexistent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOUND.is_dir(), reason="W2S_CZECH does not name the folder of the recordings"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("czech")
    script = Path(__file__).parents[1] / "experiments" / "czech_dnsmos.py"
    subprocess.run(
        [sys.executable, script, "run", "--sound", SOUND, "--out", out, "--variant", "small", "--clips-per-level", "2"],
        check=True,
    )
    return out


@pytest.fixture(scope="module")
def files():
    return sorted(SOUND.rglob("*.ogg"))[100:1600:300]


def test_levels_are_not_divided(out):
    from w2s_jax.bank import Bank

    clips = Bank(out / "bank").clips
    level = np.array([name.split("/")[0] for name in clips["name"]])
    for name in set(level):
        assert len(set(clips["split"][level == name])) == 1
    assert set(clips["split"]) == {"train", "validation", "test"}


def test_logmel_is_librosas(out, files):
    student, variables, _ = checkpoint.load_student(out / "run")
    assert len(files) == 5
    for file in files:
        wave = np.asarray(normalise(audio.load(file)[None]))[0]
        power = librosa.feature.melspectrogram(
            y=wave, sr=SAMPLING_RATE, n_fft=64, hop_length=32, n_mels=26, center=False, power=2.0
        )
        from w2s_jax.models.frontend import LogMel

        image = LogMel().apply({"frontend": variables["frontend"]["logmel"]}, wave[None])[0]
        np.testing.assert_allclose(image, 10 * np.log10(np.maximum(power, 1e-10)).T, atol=1e-3)


def test_audonnx_predictor_and_flax_agree(out, files):
    import audonnx

    from w2s_jax.runtime import Predictor

    theirs, predictor = audonnx.load(str(out / "model")), Predictor(out / "model")
    student, variables, config = checkpoint.load_student(out / "run")
    for file in files:
        wave = audio.load(file)
        values = np.array([predictor(wave)[name] for name in config["dimensions"]])
        np.testing.assert_allclose(theirs(wave, SAMPLING_RATE).reshape(-1), values, atol=1e-4)
        np.testing.assert_allclose(student.apply(variables, wave[None])[0], values, atol=1e-4)


def test_the_export_is_close_and_small(out):
    report = json.loads((out / "model" / "export.json").read_text())
    assert report["parity"]["max_difference"] <= 1e-4
    assert report["parity"]["lengths"][0] == 64
    assert report["parity"]["lengths"][-1] == 960_000
    assert min(report["kinds"]["int8"]["ccc"].values()) >= 0.98
    assert (out / "model" / "model.int8.onnx").stat().st_size < 150_000


def test_what_it_learned_is_reported(out):
    scores = json.loads((out / "run" / "eval_test.json").read_text())["teacher"]
    assert set(scores) == {"sig", "bak", "ovrl", "mean"}
    assert scores["mean"] > 0  # a few steps: better than knowing nothing
