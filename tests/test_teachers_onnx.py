"""Teachers that are ONNX models."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from conftest import save_toy_teacher, voice

from w2s_jax import teachers
from w2s_jax.errors import UsageError
from w2s_jax.teachers.onnx import OnnxTeacher


@pytest.mark.parametrize("shape", [("batch", "time"), (1, "time"), ("batch", 1, "time"), ("batch", 8000), (1, 8000)])
def test_onnx_teachers_of_every_form(tmp_path, shape):
    teacher = OnnxTeacher(save_toy_teacher(tmp_path / "toy.onnx", shape))
    assert teacher.dimensions == ("loudness", "power")
    for samples in (3000, 8000, 20_000):
        waves = np.stack([voice(samples / 16_000, seed) for seed in range(3)])
        heard = waves
        if shape[-1] == 8000 and samples < 8000:
            heard = np.concatenate([waves] * 3, axis=1)[:, :8000]  # the audio is repeated, not padded
        expected = np.stack([np.abs(heard).mean(axis=1), (heard**2).mean(axis=1)], axis=1)
        if shape[-1] == 8000 and samples > 8000:
            pieces = [waves[:, :8000], waves[:, 8000:16_000], waves[:, 12_000:]]
            expected = np.mean([[np.abs(p).mean(axis=1), (p**2).mean(axis=1)] for p in pieces], axis=0).T
        np.testing.assert_allclose(teacher(waves), expected, rtol=1e-5)


def test_dimension_names_come_from_metadata_or_the_user(tmp_path):
    path = save_toy_teacher(tmp_path / "toy.onnx", dimensions=None)
    with pytest.raises(UsageError, match="--dimensions"):
        OnnxTeacher(path)
    with pytest.raises(UsageError, match="has 2 outputs"):
        OnnxTeacher(path, dimensions=("one",))
    assert teachers.load(f"onnx:{path}", dimensions=("a", "b")).dimensions == ("a", "b")


def test_what_is_no_teacher_is_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    for name, message in [
        ("nobody", "acoustic"),
        (f"onnx:{tmp_path / 'none.onnx'}", "no such file"),
        (f"onnx:{tmp_path / 'bad.onnx'}", "not an ONNX model"),
        (f"onnx:{save_toy_teacher(tmp_path / 'four.onnx', (4, 'time'))}", "batch is dynamic or 1"),
        (f"onnx:{save_toy_teacher(tmp_path / 'stereo.onnx', ('batch', 2, 'time'))}", "one channel"),
    ]:
        with pytest.raises(UsageError, match=message):
            teachers.load(name)


def test_dnsmos_is_the_packages_network():
    teacher = teachers.load("dnsmos")
    assert teacher.dimensions == ("sig", "bak", "ovrl")
    wave = voice(3.0, 4)
    session = ort.InferenceSession(teacher._session._model_path)
    looped = np.concatenate([wave] * 4)[: int(9.01 * 16_000)]  # as speechmos prepares its input
    expected = session.run(None, {session.get_inputs()[0].name: looped[None]})[0]
    np.testing.assert_allclose(teacher(wave[None]), expected, atol=1e-5)
