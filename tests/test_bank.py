"""Bank, views and rendering: exact samples, resumption, splits, and banks beyond 2³¹ samples."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import voice
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax import bank as banks
from w2s_jax import corpora, render
from w2s_jax import views as tables
from w2s_jax.bank import Bank, BankError, BankWarning
from w2s_jax.errors import MismatchError, UsageError, W2SError


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_samples_are_the_files(bank, corpus):
    for number in (0, 7, 23):
        at = list(bank.clips["name"]).index(f"{number:02d}.wav")
        expected, _ = soundfile.read(corpus / f"{number:02d}.wav", dtype="int16")
        assert bank.scales[at] == 2.0  # their peaks are at 0.3
        np.testing.assert_array_equal(bank.clip(at), 2 * expected)
        np.testing.assert_array_equal(bank.wave(at), expected / np.float32(32768))  # every bit
    assert bank.samples == sum(len(bank.clip(at)) for at in range(len(bank)))
    assert bank.clips["arousal"][list(bank.clips["name"]).index("04.wav")] == np.float32(0.22)


def test_loud_samples_are_scaled_not_clipped():
    wave = np.array([0.5, -2.0, 1.0], np.float32)
    samples, scale = banks.to_int16(wave)
    assert scale == 0.5
    np.testing.assert_array_equal(samples, [8192, -32768, 16384])


def test_a_bank_is_resumed_and_equal(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(banks, "SHARD_CLIPS", 5)
    clips = corpora.read("csv", corpus / "corpus.csv")
    banks.build(clips, tmp_path / "whole")
    calls = []
    real = banks.audio.blocks

    def failing(*args):
        calls.append(args)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(banks.audio, "blocks", failing)
    with pytest.raises(KeyboardInterrupt):
        banks.build(clips, tmp_path / "broken", workers=1)
    with pytest.raises(UsageError, match="no bank"):
        Bank(tmp_path / "broken")
    monkeypatch.setattr(banks.audio, "blocks", lambda *args: calls.append(args) or real(*args))
    calls.clear()
    banks.build(clips, tmp_path / "broken")
    assert len(calls) == 24 - 10  # two whole shards of five were kept
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_unreadable_files_are_listed_and_the_rest_done(corpus, tmp_path):
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    (root / "03.wav").write_bytes(b"")
    (root / "05.wav").write_bytes(b"this is not audio, at all")
    soundfile.write(root / "06.wav", np.array([0.1, np.nan, 0.2], np.float32), 16_000, subtype="FLOAT")
    clips = corpora.read("csv", root / "corpus.csv")
    about = banks.build(clips, tmp_path / "bank")
    assert (about["clips"], about["failures"]) == (21, 3)
    listed = (tmp_path / "bank" / "failures.csv").read_text()
    assert all(name in listed for name in ("03.wav", "05.wav", "06.wav"))
    with pytest.raises(BankError, match="2 are allowed"):
        banks.build(clips, tmp_path / "strict", max_failures=2)
    assert not (tmp_path / "strict" / "bank.json").exists()


def test_a_speaker_in_two_splits_is_refused(corpus, tmp_path):
    clips = corpora.read("csv", corpus / "corpus.csv")
    clips[0] = dataclasses.replace(clips[0], split="test")
    with pytest.raises(W2SError, match="s0"):
        banks.build(clips, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def flipped(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_damaged_shard_is_named(bank, tmp_path):
    shutil.copytree(bank.path, tmp_path / "bank")
    shard = tmp_path / "bank" / "shards" / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BankError, match=r"00000\.npy"):
        Bank(tmp_path / "bank").clip(0)


def test_a_flipped_bit_in_a_shard_is_found_when_its_clip_is_read(bank, tmp_path):
    shutil.copytree(bank.path, tmp_path / "bank")
    shard = tmp_path / "bank" / "shards" / "00000.npy"
    flipped(shard, 8 * (128 + 2 * int(bank.clips["offset"][5] + 1000)))
    damaged = Bank(tmp_path / "bank")
    with pytest.raises(BankError, match=rf"00000\.npy is damaged in clip 5 \({bank.clips['name'][5]}\)"):
        damaged.clip(5)
    for at in (4, 6):
        np.testing.assert_array_equal(damaged.clip(at), bank.clip(at))
    flipped(shard, 8 * 20)  # in the header
    with pytest.raises(BankError, match="header"):
        Bank(tmp_path / "bank").clip(0)


@pytest.mark.parametrize("name", ["clips.parquet", "bank.json"])
def test_any_flipped_bit_in_a_banks_tables_is_found_on_opening(bank, tmp_path, name):
    shutil.copytree(bank.path, tmp_path / "bank")
    file = tmp_path / "bank" / name
    whole = file.read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(whole), 90, replace=False):
        flipped(file, int(bit))
        with pytest.raises(W2SError, match=name):
            Bank(tmp_path / "bank")
        file.write_bytes(whole)
    Bank(tmp_path / "bank")


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(4000)
        file.write(b"x" * 60_000)


DAMAGES = {
    "60 kB overwritten": ("shards/00001.npy", overwrite),
    "a bit of the header": ("shards/00001.npy", lambda path: flipped(path, 8 * 20)),
    "the length in the header": (
        "shards/00001.npy",
        lambda path: path.write_bytes(b"\x93NUMPY\x01\0" + path.read_bytes()[60:]),
    ),
    "an empty shard": ("shards/00001.npy", lambda path: path.write_bytes(b"")),
    "no shard": ("shards/00001.npy", lambda path: path.unlink()),
    "a bit of a shard's table": ("shards/00001.parquet", lambda path: flipped(path, 8 * 300)),
    "the end of a shard's table": ("shards/00001.parquet", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "a bit of clips.parquet": ("clips.parquet", lambda path: flipped(path, 8 * 500)),
    "a bit of bank.json": ("bank.json", lambda path: flipped(path, 8 * 70)),
}


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    clips = folder_of(tmp_path / "corpus", 3)
    blocks = banks.audio.blocks

    def changing(file, *times):
        for block in blocks(file, *times):
            if Path(file).name == "1.wav":
                soundfile.write(file, voice(0.6, 7), 16_000, subtype="PCM_16")
            yield block

    with monkeypatch.context() as patched:
        patched.setattr(banks.audio, "blocks", changing)
        with pytest.warns(BankWarning, match="validation split"):
            about = banks.build(clips, tmp_path / "bank")
    assert (about["clips"], about["failures"]) == (2, 1)
    assert '1.wav,"the file was changed while it was read;' in (tmp_path / "bank" / "failures.csv").read_text()
    assert banks.build(clips, tmp_path / "bank") == banks.build(clips, tmp_path / "fresh")
    np.testing.assert_allclose(Bank(tmp_path / "bank").wave(1), voice(0.6, 7), atol=2**-15)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_named_and_only_that_is_made_again(corpus, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(banks, "SHARD_CLIPS", 9)
    clips, out = corpora.read("csv", corpus / "corpus.csv"), tmp_path / "bank"
    about = banks.build(clips, out)
    (out / "shards" / ".DS_Store").write_bytes(b"Finder's")
    whole, calls = contents(out), []
    name, harm = DAMAGES[damage]
    harm(out / name)
    assert contents(out) != whole
    real = banks.audio.blocks
    monkeypatch.setattr(banks.audio, "blocks", lambda *args: calls.append(args[0]) or real(*args))
    if name.startswith("shards"):
        with pytest.warns(BankWarning, match=r"shards.00001\.(npy|parquet) .*; its clips are decoded again"):
            assert banks.build(clips, out, workers=1) == about
        assert set(calls) >= {clip.file for clip in clips[9:18]}
        assert len(calls) < 9 + 3  # and what was begun of the next shard
    else:
        assert banks.build(clips, out) == about
        assert not calls
    assert contents(out) == whole


def test_a_bank_of_another_version_is_refused_and_the_first_version_is_heard_as_it_was(bank, tmp_path):
    shutil.copytree(bank.path, tmp_path / "bank")
    about = {key: value for key, value in bank.about.items() if key not in ("sum", "sums")}
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(about | {"version": 99}))
    with pytest.raises(BankError, match="expected a w2s-bank of version 2 or 1, got w2s-bank of version 99"):
        Bank(tmp_path / "bank")
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(about | {"version": 1}))
    pq.write_table(pq.read_table(bank.path / "clips.parquet").drop(["sum"]), tmp_path / "bank" / "clips.parquet")
    old = Bank(tmp_path / "bank")
    np.testing.assert_array_equal(old.wave(3), bank.clip(3) / np.float32(32768))
    views = tables.draw(old, per_clip=1, seconds=(0.5,), mix=0, gain_db=(0, 0))
    heard = render.render_on_host(old, views, np.array([0]))[0]
    at = int(views.columns["offset"][0])
    np.testing.assert_array_equal(heard, bank.clip(int(views.columns["clip"][0]))[at : at + 8000] / np.float32(32768))


def folder_of(root, count, first=0):
    root.mkdir(exist_ok=True)
    for number in range(first, first + count):
        soundfile.write(root / f"{number}.wav", voice(0.6, number), 16_000, subtype="PCM_16")
    return [
        dataclasses.replace(clip, split=("train", "validation", "test")[at % 3])
        for at, clip in enumerate(corpora.read("folder", root))
    ]


def test_a_bank_of_other_sources_is_left_alone_without_force(tmp_path):
    one, other, out = folder_of(tmp_path / "one", 3), folder_of(tmp_path / "other", 3, 10), tmp_path / "bank"
    banks.build(one, out)
    whole = contents(out)
    with pytest.raises(MismatchError, match=r"holds a bank of something else \(folder: .*one there, .*other now\).*--force"):
        banks.build(other, out)
    with pytest.raises(MismatchError, match=r"corpus: folder there, csv now"):
        banks.build(one, out, corpus="csv")
    with pytest.raises(MismatchError, match=r"seed: 0 there, 1 now"):
        banks.build(one, tmp_path / "seeds", origin={"seed": 0})
        banks.build(one, tmp_path / "seeds", origin={"seed": 1})
    assert contents(out) == whole
    assert banks.build(other, out, force=True)["clips"] == 3
    np.testing.assert_array_equal(Bank(out).wave(0), soundfile.read(tmp_path / "other" / "10.wav", dtype="float32")[0])
    old = json.loads((out / "bank.json").read_text()) | {"version": 1}
    (out / "bank.json").write_text(json.dumps(old))
    (out / "plan.json").unlink()
    with pytest.raises(MismatchError, match="a bank of version 1"):
        banks.build(other, out)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "w2s-bank-plan", "version": 2, "origin": {}, "sum": ""}'])
def test_a_damaged_plan_names_the_way_out(tmp_path, damage):
    clips = folder_of(tmp_path / "corpus", 3)
    about = banks.build(clips, tmp_path / "bank")
    (tmp_path / "bank" / "plan.json").write_text(damage)
    with pytest.raises(MismatchError, match=r"plan\.json is damaged.*so it is not known what bank .* holds; .*--force"):
        banks.build(clips, tmp_path / "bank")
    assert banks.build(clips, tmp_path / "bank", force=True) == about == banks.build(clips, tmp_path / "bank")


def test_a_bank_follows_its_sources(tmp_path):
    banks.build(folder_of(tmp_path / "corpus", 3), tmp_path / "bank")
    clips = folder_of(tmp_path / "corpus", 5, 1)  # three more files, two of them changed
    about = banks.build(clips, tmp_path / "bank")
    assert about == banks.build(clips, tmp_path / "fresh")
    (tmp_path / "corpus" / "0.wav").unlink()
    assert banks.build(clips[1:], tmp_path / "bank")["clips"] == 5


def test_a_directory_with_something_else_is_refused(corpus, labels_path, tmp_path):
    clips = corpora.read("csv", corpus / "corpus.csv")
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, labels_path):
        before = contents(place)
        for force in (False, True):
            with pytest.raises(UsageError, match="is not empty and not a bank|holds something else"):
                banks.build(clips, place, force=force)
        after = {name: content for name, content in contents(place).items() if name.name != ".lock"}
        assert after == {name: content for name, content in before.items() if name.name != ".lock"}
    with pytest.raises(UsageError, match="is a file"):
        banks.build(clips, tmp_path / "notes.txt")


@given(level=st.floats(-6, 6).map(lambda power: 10.0**power), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_samples_keep_15_bits_at_any_level(level, seed):
    wave = (np.random.default_rng(seed).uniform(-1, 1, 500) * level).astype(np.float32)
    samples, scale = banks.to_int16(wave)
    assert np.log2(scale) % 1 == 0
    assert 16383 <= np.abs(samples.astype(int)).max() <= 32768
    error = np.abs(samples.astype(np.float64) / 32768 / scale - wave)
    assert error.max() <= np.abs(wave).max() * 2.0**-15  # half a step of 2^-15 of full scale, which is at most twice the peak


@given(samples=st.lists(st.integers(-32768, 32767), min_size=1, max_size=50))
def test_sixteen_bits_keep_every_one(samples):
    wave = np.array(samples, np.int16) / np.float32(32768)
    stored, scale = banks.to_int16(wave)
    np.testing.assert_array_equal(stored / np.float32(32768 * scale), wave)


def test_silence_and_denormals_are_stored():
    for wave in (np.zeros(9), np.full(9, 1e-45), np.array([-1e-40, 1e-42])):
        samples, scale = banks.to_int16(wave.astype(np.float32))
        assert not samples.any()
        assert np.isfinite(np.float32(32768 * scale))


def test_a_truncated_file_stays_with_what_could_be_read_and_is_listed(tmp_path):
    clips = folder_of(tmp_path / "corpus", 3)
    file = tmp_path / "corpus" / "1.wav"
    expected = soundfile.read(file, dtype="int16")[0][:4000]
    file.write_bytes(file.read_bytes()[: 44 + 8000])
    with pytest.warns(banks.audio.TruncatedAudioWarning, match=r"1\.wav"):
        about = banks.build(clips, tmp_path / "bank")
    for _ in range(2):  # the second time it is kept
        assert (about["clips"], about["failures"], about["read_in_part"]) == (3, 0, 1)
        assert '1.wav,"read in part: ' in (tmp_path / "bank" / "failures.csv").read_text()
        np.testing.assert_array_equal(Bank(tmp_path / "bank").wave(1), expected / np.float32(32768))
        about = banks.build(clips, tmp_path / "bank")


def test_a_split_whose_clips_all_fail_is_said(tmp_path):
    clips = folder_of(tmp_path / "corpus", 3)
    soundfile.write(clips[1].file, np.zeros(16_000, np.int16), 16_000)
    with pytest.warns(BankWarning, match="validation split.*empty"):
        about = banks.build(clips, tmp_path / "bank")
    assert (about["clips"], about["failures"]) == (2, 1)


def test_a_full_disk_is_not_taken_for_unreadable_audio(corpus, tmp_path, monkeypatch):
    class Full(banks.tempfile.SpooledTemporaryFile):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(banks.tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(W2SError, match=r"cannot write .*00000\.npy: No space left on device"):
        banks.build(corpora.read("csv", corpus / "corpus.csv"), tmp_path / "bank")


def test_long_clips_pass_through_a_file_and_end_a_shard(tmp_path, monkeypatch):
    clips = folder_of(tmp_path / "corpus", 5)
    whole = banks.build(clips, tmp_path / "whole")
    monkeypatch.setattr(banks, "_IN_MEMORY", 1000)
    monkeypatch.setattr(banks, "SHARD_SAMPLES", 15_000)
    told = []
    about = banks.build(clips, tmp_path / "bank", progress=lambda done, total, **figures: told.append((done, total)))
    assert (whole["shards"], about["shards"]) == (1, 3)  # 9600 samples each
    assert about["fingerprint"] == whole["fingerprint"]
    assert list(Bank(tmp_path / "bank").clips["shard"]) == [0, 0, 1, 1, 2]
    for at in range(5):
        np.testing.assert_array_equal(Bank(tmp_path / "bank").clip(at), Bank(tmp_path / "whole").clip(at))
    assert told == sorted(told)
    assert told[-1] == (5, 5)
    assert sorted(os.listdir(tmp_path / "bank")) == sorted(os.listdir(tmp_path / "whole"))  # no temporary file is left


def test_a_clip_that_is_too_long_for_int32_is_a_failure(tmp_path, monkeypatch):
    clips = folder_of(tmp_path / "corpus", 2)
    soundfile.write(tmp_path / "corpus" / "1.wav", voice(2.0, 1), 16_000, subtype="PCM_16")
    monkeypatch.setattr(banks, "LONGEST", 16_000)
    with pytest.warns(BankWarning, match="no clip of the validation split"):
        about = banks.build(clips, tmp_path / "bank")
    assert (about["clips"], about["failures"]) == (1, 1)
    assert "1.wav,longer than 37 hours" in (tmp_path / "bank" / "failures.csv").read_text()


def test_progress_goes_on_within_a_file(tmp_path, monkeypatch):
    real, minutes = banks.audio.blocks, []

    def slow(*args):
        for block in real(*args, block_seconds=0.1):
            banks.threading.Event().wait(0.25)
            yield block

    clips = folder_of(tmp_path / "corpus", 1)
    monkeypatch.setattr(banks.audio, "blocks", slow)
    banks.build(clips, tmp_path / "bank", progress=lambda done, total, minutes=None, into=minutes: into.append((done, minutes)))
    within = [decoded for done, decoded in minutes if done == 0]
    assert within
    assert 0 < within[-1] < 0.01


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path):
    """An hour of 44.1 kHz: 600 MB of float32, of which a process that builds the bank, and checks it again, holds little."""
    minute = (3000 * np.random.default_rng(0).standard_normal(60 * 44_100)).astype(np.int16)
    (tmp_path / "corpus").mkdir()
    with soundfile.SoundFile(tmp_path / "corpus" / "hour.wav", "w", 44_100, 1, "PCM_16") as file:
        for at in range(60):
            file.write(np.roll(minute, at))
    code = """
import resource, sys
from w2s_jax import bank, corpora
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = corpora.Clip(file=sys.argv[1], name="hour.wav", split="train")
for _ in range(2):
    about = bank.build([clip], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, about["samples"])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "corpus" / "hour.wav"), str(tmp_path / "bank")]
    grown, samples = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert samples == 3600 * 16_000
    assert grown < 100 * 1024  # kB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_tables_are_read_without_threads_that_a_short_process_could_trip_over(bank, views, labels_path, tmp_path):
    views.save(tmp_path / "views.parquet")
    code = """if True:
        import os, sys
        from w2s_jax.bank import Bank
        from w2s_jax.labels import Labels
        from w2s_jax.views import Views
        before = len(os.listdir("/proc/self/task"))
        Bank(sys.argv[1])
        Labels.read(sys.argv[3], Views.read(sys.argv[2]))
        print(before, len(os.listdir("/proc/self/task")))
    """
    command = [sys.executable, "-c", code, bank.path, tmp_path / "views.parquet", labels_path]
    before, after = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert before == after
