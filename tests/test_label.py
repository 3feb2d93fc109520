"""Teachers, and labels that can be interrupted, checked and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import save_toy_teacher, voice

from w2s_jax import evaluate, plots, render, teachers
from w2s_jax import labels as store
from w2s_jax import views as tables
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.label import label
from w2s_jax.teachers.onnx import OnnxTeacher


def flipped(path, count, seed=0):
    """Write a file with one random bit turned over, ``count`` times, and then as it was."""
    whole, random = path.read_bytes(), np.random.default_rng(seed)
    for bit in random.integers(len(whole) * 8, size=count):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        yield int(bit)
    path.write_bytes(whole)


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


def test_a_turned_bit_in_a_shard_is_found_and_only_that_shard_made_again(bank, views, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_VIEWS", 32)
    teacher, out, heard = teachers.load(f"onnx:{toy_teacher}"), tmp_path / "labels", []
    label(bank, views, teacher, out)
    before, values = contents(out), store.read(out, views).values
    found = 0
    for bit in flipped(out / "shards" / "00001.parquet", 100):
        try:
            np.testing.assert_array_equal(store.read(out, views).values, values, err_msg=f"bit {bit}")
        except W2SError as error:
            assert "00001.parquet" in str(error)
            found += 1
    assert found > 50  # the rest are bytes that say nothing
    shard = out / "shards" / "00001.parquet"
    table = pq.read_table(shard)
    changed = table.set_column(1, "loudness", pa.array(table["loudness"].to_numpy() + np.float32(0.01)))
    pq.write_table(changed, shard)  # whole parquet, other labels

    class Counting:
        def __getattr__(self, name):
            return getattr(teacher, name)

        def __call__(self, waves):
            heard.append(len(waves))
            return teacher(waves)

    label(bank, views, Counting(), out)
    assert sum(heard) == 32
    assert contents(out) == before


def test_shards_of_before_there_were_checksums_are_read(bank, views, toy_teacher, tmp_path):
    out = tmp_path / "labels"
    label(bank, views, teachers.load(f"onnx:{toy_teacher}"), out)
    values = store.read(out, views).values
    for shard in (out / "shards").iterdir():
        pq.write_table(pq.read_table(shard).replace_schema_metadata(None), shard)
    for name in ("labels.json", "plan.json"):
        about = json.loads((out / name).read_text())
        del about["checksum"], about["rendering"]
        (out / name).write_text(json.dumps(about))
    np.testing.assert_array_equal(store.read(out, views).values, values)
    label(bank, views, teachers.load(f"onnx:{toy_teacher}"), out)


def test_versions_checksums_and_renderings_of_labels_are_checked(bank, views, toy_teacher, tmp_path, monkeypatch):
    teacher, out = teachers.load(f"onnx:{toy_teacher}"), tmp_path / "labels"
    label(bank, views, teacher, out)
    about = json.loads((out / "labels.json").read_text())

    def write(name, **changed):
        (out / name).write_text(json.dumps({**about, **changed}))

    write("labels.json", version=99, checksum=store.signed({**about, "version": 99})["checksum"])
    with pytest.raises(MismatchError, match=r"labels\.json describes labels of version 99, this w2s_jax reads version 1"):
        store.read(out, views)
    write("labels.json", teacher={**about["teacher"], "licence": "do what you like"})
    with pytest.raises(W2SError, match=r"labels\.json is damaged or was changed.*run the same w2s label command again"):
        store.read(out, views)
    label(bank, views, teacher, out)
    assert json.loads((out / "labels.json").read_text()) == about
    for text in ("{", json.dumps({**about, "count": 7}), "[]"):
        (out / "plan.json").write_text(text)
        with pytest.raises(W2SError, match=r"plan\.json is damaged.*--force to relabel"):
            label(bank, views, teacher, out)
    write("plan.json", version=99)
    with pytest.raises(MismatchError, match="version 99"):
        label(bank, views, teacher, out)
    write("plan.json")
    monkeypatch.setattr(store, "RENDERING", 2)  # as in a later w2s_jax
    for use in (lambda: store.read(out, views), lambda: label(bank, views, teacher, out)):
        with pytest.raises(MismatchError, match=r"views of rendering 1, this w2s_jax renders version 2; label again"):
            use()


def test_views_are_not_replaced_without_force(bank, views, tmp_path):
    path, other = tmp_path / "views.parquet", tables.draw(bank, per_clip=1, seed=9)
    views.save(path)
    before = path.stat().st_mtime_ns, path.read_bytes()
    views.save(path)  # the same
    assert before == (path.stat().st_mtime_ns, path.read_bytes())
    with pytest.raises(MismatchError, match=rf"holds other views \(fingerprint {views.fingerprint}.*--force to replace it"):
        other.save(path)
    assert before[1] == path.read_bytes()
    other.save(path, force=True)
    assert tables.read(path).fingerprint == other.fingerprint
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(MismatchError, match=r"views\.parquet is damaged.*--force to replace it"):
        other.save(path)
    other.save(path, force=True)
    for name, write in {
        "thesis.txt": lambda path: path.write_text("three years of work"),
        "other.parquet": lambda path: pq.write_table(pa.table({"x": [1]}), path),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
    }.items():
        write(tmp_path / name)
        for force in (False, True):
            with pytest.raises(MismatchError, match=rf"{name}.*It is not replaced: choose another --out"):
                views.save(tmp_path / name, force=force)


def test_a_turned_bit_in_views_is_found(views, tmp_path):
    path, found = tmp_path / "views.parquet", 0
    views.save(path)
    for bit in flipped(path, 150):
        try:
            read = tables.read(path)
            assert read.about == views.about, f"bit {bit}"
            for name in tables.COLUMNS:
                np.testing.assert_array_equal(read.columns[name], views.columns[name], err_msg=f"bit {bit}")
        except W2SError as error:
            assert "views.parquet" in str(error)
            found += 1
    assert found > 100
    about = views.about | {"version": 99}
    tables.Views(views.columns, about).save(tmp_path / "newer.parquet")
    with pytest.raises(W2SError, match=r"newer\.parquet holds views of version 99; this w2s_jax reads version 1"):
        tables.read(tmp_path / "newer.parquet")


def test_few_clips_have_no_interval_and_a_note(tmp_path):
    random = np.random.default_rng(0)
    target = random.random((60, 2))
    predicted = target + 0.1 * random.random((60, 2))
    for clips, note in (
        (2, "2 clips are too few for a confidence"),
        (9, "9 clips are too few"),
        (10, "9 times in 10"),
    ):
        scores = evaluate._scores(predicted, target, np.arange(60) % clips, ("a", "b"), 0)
        assert [note in text for text in evaluate._notes(clips, "clips")] == [True]
        for name in ("a", "b"):
            ends = scores[name]["low"], scores[name]["high"]
            assert ends == (None, None) if clips < 10 else ends[0] <= scores[name]["ccc"] <= ends[1]
        panel = ("teacher", ("a", "b"), predicted, target, scores)
        plots.scatter(tmp_path / f"{clips}.png", [panel], "few")
    assert evaluate._notes(30, "clips") == []


def test_one_view_has_no_ccc(bank, views, labels, tmp_path, monkeypatch):
    one = np.concatenate([views.where("train"), views.where("test")[:1]])
    few = tables.Views({name: column[one] for name, column in views.columns.items()}, views.about)
    monkeypatch.setattr(evaluate, "load", lambda path: (lambda waves: np.zeros((len(waves), 3)), labels.dimensions, {}))
    with pytest.raises(UsageError, match="the 'test' split has one view; a CCC compares how values vary"):
        evaluate.evaluate(tmp_path, bank, few)
    report = evaluate.evaluate(tmp_path, bank, views, labels)
    assert report["notes"][0].startswith("4 clips are too few for a confidence interval")


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
from w2s_jax.locks import Shares
with Shares(sys.argv[1]) as shares:
    with shares.exclusive():
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
