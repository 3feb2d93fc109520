"""Teachers, and labels that can be interrupted, checked and resumed."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import flipped

from w2s_jax import labels as store
from w2s_jax import render, teachers
from w2s_jax import views as tables
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.labelling import label
from w2s_jax.labels import Labels


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}


def test_labels_are_the_teachers_of_the_rendered_views(bank, views, toy_teacher, tmp_path):
    about = label(bank, views, teachers.load(f"onnx:{toy_teacher}"), tmp_path / "labels", batch_size=7)
    labels = Labels.read(tmp_path / "labels", views)
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
        Labels.read(tmp_path / "broken", views)
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
        Labels.read(out, views)
    label(bank, views, teacher, out)
    assert contents(out) == before


def test_a_turned_bit_in_a_shard_is_found_and_only_that_shard_made_again(bank, views, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_VIEWS", 32)
    teacher, out, heard = teachers.load(f"onnx:{toy_teacher}"), tmp_path / "labels", []
    label(bank, views, teacher, out)
    before, values = contents(out), Labels.read(out, views).values
    found = 0
    for bit in flipped(out / "shards" / "00001.parquet", 100):
        try:
            np.testing.assert_array_equal(Labels.read(out, views).values, values, err_msg=f"bit {bit}")
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
    values = Labels.read(out, views).values
    for shard in (out / "shards").iterdir():
        pq.write_table(pq.read_table(shard).replace_schema_metadata(None), shard)
    for name in ("labels.json", "plan.json"):
        about = json.loads((out / name).read_text())
        del about["checksum"], about["rendering"]
        (out / name).write_text(json.dumps(about))
    np.testing.assert_array_equal(Labels.read(out, views).values, values)
    label(bank, views, teachers.load(f"onnx:{toy_teacher}"), out)


def test_versions_checksums_and_renderings_of_labels_are_checked(bank, views, toy_teacher, tmp_path, monkeypatch):
    teacher, out = teachers.load(f"onnx:{toy_teacher}"), tmp_path / "labels"
    label(bank, views, teacher, out)
    about = json.loads((out / "labels.json").read_text())

    def write(name, **changed):
        (out / name).write_text(json.dumps({**about, **changed}))

    write("labels.json", version=99, checksum=store.signed({**about, "version": 99})["checksum"])
    with pytest.raises(MismatchError, match=r"labels\.json describes labels of version 99, this w2s_jax reads version 1"):
        Labels.read(out, views)
    write("labels.json", teacher={**about["teacher"], "licence": "do what you like"})
    with pytest.raises(W2SError, match=r"labels\.json is damaged or was changed.*run the same w2s label command again"):
        Labels.read(out, views)
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
    for use in (lambda: Labels.read(out, views), lambda: label(bank, views, teacher, out)):
        with pytest.raises(MismatchError, match=r"views of rendering 1, this w2s_jax renders version 2; label again"):
            use()


def test_other_labels_are_never_mixed_in(bank, views, toy_teacher, tmp_path):
    out = tmp_path / "labels"
    label(bank, views, teachers.load(f"onnx:{toy_teacher}"), out)
    with pytest.raises(MismatchError, match="acoustic now"):
        label(bank, views, teachers.load("acoustic"), out)
    other = tables.draw(bank, per_clip=1, seed=9)
    with pytest.raises(MismatchError, match=other.fingerprint):
        Labels.read(out, other)
    about = label(bank, other, teachers.load("acoustic"), out, force=True)
    assert about["teacher"]["stand_in"] is True
    assert Labels.read(out, other).dimensions == ("arousal", "dominance", "valence")


@pytest.mark.slow
def test_members_are_kept_beside_the_mean(bank, checkpoints, tmp_path):
    views = tables.draw(bank, per_clip=2, seconds=(0.4,), mix=0.5)
    teacher = teachers.load("paper", checkpoints)
    about = label(bank, views, teacher, tmp_path / "labels")
    labels = Labels.read(tmp_path / "labels", views)
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

    def progress(done, total, views_per_second):
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
