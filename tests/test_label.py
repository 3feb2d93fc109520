"""Teachers, and labels that can be interrupted, checked and resumed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
from conftest import save_toy_teacher, voice

from w2s_jax import labels as store
from w2s_jax import render, teachers
from w2s_jax import views as tables
from w2s_jax.artifacts import MismatchError, UsageError, W2SError
from w2s_jax.label import label
from w2s_jax.teachers.onnx import OnnxTeacher


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}


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


def test_labels_are_the_teachers_of_the_rendered_views(bank, views, toy_teacher, tmp_path):
    about = label(bank, views, teachers.load(f"onnx:{toy_teacher}"), tmp_path / "labels", batch_size=7)
    labels = store.read(tmp_path / "labels", views)
    assert labels.dimensions == ("loudness", "power")
    assert about["teacher"]["stand_in"] is False
    for row in (0, 13, len(views) - 1):
        wave = render.render_on_host(bank, views, np.array([row]))[0]
        np.testing.assert_allclose(labels.values[row], [np.abs(wave).mean(), (wave**2).mean()], rtol=1e-5)


def test_labelling_goes_on_and_ends_the_same(bank, views, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_VIEWS", 16)
    teacher = teachers.load(f"onnx:{toy_teacher}")
    label(bank, views, teacher, tmp_path / "whole")

    class Dies:
        def __init__(self):
            self.calls = 0

        def __getattr__(self, name):
            return getattr(teacher, name)

        def __call__(self, waves):
            self.calls += 1
            if self.calls > 3:
                raise KeyboardInterrupt
            return teacher(waves)

    with pytest.raises(KeyboardInterrupt):
        label(bank, views, Dies(), tmp_path / "broken")
    with pytest.raises(UsageError, match="no labels"):
        store.read(tmp_path / "broken", views)
    (tmp_path / "broken" / "shards" / "00001.parquet").write_bytes(b"torn")
    label(bank, views, teacher, tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_damaged_shard_is_named_and_remade(bank, views, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_VIEWS", 16)
    teacher, out = teachers.load(f"onnx:{toy_teacher}"), tmp_path / "labels"
    label(bank, views, teacher, out)
    before = contents(out)
    shard = out / "shards" / "00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(W2SError, match=r"00002\.parquet"):
        store.read(out, views)
    label(bank, views, teacher, out)
    assert contents(out) == before


def test_other_labels_are_never_mixed_in(bank, views, toy_teacher, tmp_path):
    out = tmp_path / "labels"
    label(bank, views, teachers.load(f"onnx:{toy_teacher}"), out)
    with pytest.raises(MismatchError, match="acoustic now"):
        label(bank, views, teachers.load("acoustic"), out)
    other = tables.draw(bank, per_clip=1, seed=9)
    with pytest.raises(MismatchError, match=other.fingerprint):
        store.read(out, other)
    about = label(bank, other, teachers.load("acoustic"), out, force=True)
    assert about["teacher"]["stand_in"] is True
    assert store.read(out, other).dimensions == ("arousal", "dominance", "valence")


@pytest.mark.slow
def test_members_are_kept_beside_the_mean(bank, checkpoints, tmp_path):
    views = tables.draw(bank, per_clip=2, seconds=(0.4,), mix=0.5)
    teacher = teachers.load("paper", checkpoints)
    about = label(bank, views, teacher, tmp_path / "labels")
    labels = store.read(tmp_path / "labels", views)
    assert list(labels.members) == [member["name"] for member in about["teacher"]["members"]] == ["wav2vec2", "wavlm"]
    rows = np.arange(0, len(views), 3)[:16]
    waves = render.render_on_host(bank, views, rows)
    alone = {
        "wav2vec2": teachers.load("wav2vec2", checkpoints)(waves),
        "wavlm": teachers.load("wavlm", checkpoints, normalisation="paper")(waves),
    }
    for name, expected in alone.items():
        np.testing.assert_allclose(labels.members[name][rows], expected, atol=1e-5)
    np.testing.assert_allclose(labels.values[rows], (alone["wav2vec2"] + alone["wavlm"]) / 2, atol=1e-5)
    with pytest.raises(MismatchError, match=r"normalisation: official there|dtype|teacher: paper there, wavlm now"):
        label(bank, views, teachers.load("wavlm", checkpoints), tmp_path / "labels")


def test_what_makes_it_another_teacher_is_named(bank, checkpoints, tmp_path):
    views = tables.draw(bank, per_clip=1, seconds=(0.4,))
    label(bank, views, teachers.load("wavlm", checkpoints), tmp_path / "labels")
    with pytest.raises(MismatchError, match="teacher's normalisation: official there, paper now"):
        label(bank, views, teachers.load("wavlm", checkpoints, normalisation="paper"), tmp_path / "labels")
    with pytest.raises(MismatchError, match="teacher's dtype: float32 there, bfloat16 now"):
        label(bank, views, teachers.load("wavlm", checkpoints, dtype="bfloat16"), tmp_path / "labels")


def test_a_teacher_with_a_doubt_does_not_label(bank, views, checkpoints, tmp_path):
    teacher = teachers.load("wav2vec2", checkpoints)
    teacher.doubt = "not the published weights"
    with pytest.raises(W2SError, match="not the published weights"):
        label(bank, views, teacher, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


#: A process that takes one part of a directory and keeps it until its input ends.
HOLDER = """
import sys
from w2s_jax.artifacts import Shares
with Shares(sys.argv[1]) as shares:
    with shares.door():
        pass
    assert shares.take(int(sys.argv[2]))
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "labels", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"taken\n"
    yield process
    process.kill()
    process.communicate()


def test_a_shard_that_another_process_has_is_left_to_it_until_it_dies(bank, views, toy_teacher, tmp_path, monkeypatch, holder):
    monkeypatch.setattr(store, "SHARD_VIEWS", 16)
    teacher, seen = teachers.load(f"onnx:{toy_teacher}"), []
    shards = tmp_path / "labels" / "shards"

    def progress(done, total, rate):
        seen.append(done)
        if done == total - 16:  # all but the shard that is held
            assert not (shards / "00001.parquet").exists()
            holder.kill()

    label(bank, views, teacher, tmp_path / "labels", progress=progress)
    assert len(views) - 16 in seen
    assert len(list(shards.iterdir())) == len(store.shards(views))
    label(bank, views, teacher, tmp_path / "alone")
    assert contents(tmp_path / "labels") == contents(tmp_path / "alone")


def test_relabelling_waits_for_nobody(bank, views, toy_teacher, tmp_path, holder):
    with pytest.raises(W2SError, match="in use by another w2s process"):
        label(bank, views, teachers.load(f"onnx:{toy_teacher}"), tmp_path / "labels", force=True)


def test_values_that_are_not_finite_are_an_error(bank, views, tmp_path):
    class Broken:
        name, dimensions, fingerprint, licence, stand_in = "broken", ("x",), "f", "none", False

        def __call__(self, waves):
            return np.where(np.arange(len(waves)) == 2, np.nan, 1.0)[:, None]

    with pytest.raises(W2SError, match="not finite"):
        label(bank, views, Broken(), tmp_path / "labels")
    assert not (tmp_path / "labels" / "labels.json").exists()
