"""Bank, views and rendering: exact samples, resumption, splits, and banks beyond 2³¹ samples."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
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
from w2s_jax.artifacts import MismatchError, UsageError, W2SError
from w2s_jax.bank import Bank, BankError


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


def test_a_damaged_shard_is_named(bank, tmp_path):
    shutil.copytree(bank.path, tmp_path / "bank")
    shard = tmp_path / "bank" / "shards" / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BankError, match=r"00000\.npy"):
        Bank(tmp_path / "bank").clip(0)


def test_views_are_reproducible_and_fit(bank):
    first, again = (tables.draw(bank, per_clip=3, seconds=(0.4, 0.8), seed=5) for _ in range(2))
    other = tables.draw(bank, per_clip=3, seconds=(0.4, 0.8), seed=6)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    length = bank.clips["samples"][first.columns["clip"]]
    whole = length >= first.columns["samples"]
    assert (first.columns["offset"] + first.columns["samples"] <= length)[whole].all()
    assert set(first.columns["samples"]) == {6400, 12800}
    train = first.where("train")
    assert len(train) == 3 * (bank.clips["split"] == "train").sum()
    partners = first.columns["partner"][train]
    assert 0.3 < (partners >= 0).mean() < 0.7
    assert (bank.clips["split"][partners[partners >= 0]] == "train").all()


def test_held_out_views_are_clean_and_do_not_depend_on_the_seed(bank):
    for split in ("validation", "test"):
        one, two = (tables.draw(bank, eval_per_clip=2, seed=seed) for seed in (1, 2))
        for name in ("clip", "offset", "samples", "gain_db", "partner", "snr_db"):
            np.testing.assert_array_equal(one.columns[name][one.where(split)], two.columns[name][two.where(split)])
        rows = one.where(split)
        assert (one.columns["gain_db"][rows] == 0).all()
        assert (one.columns["partner"][rows] == -1).all()


def test_views_are_stored_and_checked(bank, views, tmp_path):
    views.save(tmp_path / "views.parquet")
    again = tables.read(tmp_path / "views.parquet").check(bank)
    assert again.fingerprint == views.fingerprint
    table = pq.read_table(tmp_path / "views.parquet")
    about = json.loads(table.schema.metadata[b"w2s"]) | {"bank": "another"}
    pq.write_table(table.replace_schema_metadata({"w2s": json.dumps(about)}), tmp_path / "edited.parquet")
    with pytest.raises(W2SError, match="changed after"):
        tables.read(tmp_path / "edited.parquet")
    with pytest.raises(UsageError, match="no such file"):
        tables.read(tmp_path / "none.parquet")
    with pytest.raises(MismatchError, match=bank.fingerprint):
        tables.Views(views.columns, views.about | {"bank": "another"}).check(bank)


def by_hand(bank, views, row):
    """A view, straight from its definition, in float64."""
    view = {name: column[row] for name, column in views.columns.items()}

    def piece(clip, offset):
        wave = bank.clip(clip).astype(np.float64) / 32768 / bank.scales[clip]
        return np.resize(np.roll(wave, -offset), view["samples"])

    wave = piece(view["clip"], view["offset"])
    if view["partner"] >= 0:
        partner = piece(view["partner"], view["partner_offset"])
        ratio = np.sqrt(np.mean(wave**2) / np.mean(partner**2))
        wave = wave + partner * ratio * 10 ** (-view["snr_db"] / 20)
    return wave * 10 ** (view["gain_db"] / 20)


def test_render_is_its_definition_on_device_and_host(bank, views):
    rows = views.where("train", 6400)[:40]
    expected = np.stack([by_hand(bank, views, row) for row in rows])
    host = render.render_on_host(bank, views, rows)
    device = jax.jit(render.render, static_argnames="samples")(
        jnp.asarray(render.rows(bank)[0]), render.recipes(bank, views, rows), samples=6400
    )
    np.testing.assert_allclose(host, expected, atol=2e-6)
    np.testing.assert_allclose(device, expected, atol=2e-6)
    assert (views.columns["partner"][rows] >= 0).any()
    assert (views.columns["partner"][rows] < 0).any()


def test_a_silent_partner_adds_nothing():
    own = np.full((1, 100), 1000, np.int16)
    mixed = render.mix(own, np.zeros_like(own), np.ones(1, np.float32), np.ones(1, np.float32))
    np.testing.assert_array_equal(mixed, own / np.float32(32768))
    assert np.isfinite(render.mix(0 * own, own, np.ones(1, np.float32), np.ones(1, np.float32))).all()


@given(start=st.integers(0, 2**45), step=st.integers(0, 2**31 - 2**17))
@settings(max_examples=200)
def test_addresses_are_exact_beyond_32_bits(start, step):
    row, column = divmod(start, render.ROW)
    got = render.locate(np.int32(row), np.int32(column), np.int32(step))
    assert tuple(int(part) for part in got) == divmod(start + step, render.ROW)


def test_a_bank_beyond_32_bits_renders(tmp_path):
    """Two sparse shards of 1.5 · 2³⁰ samples each; the clip that is heard begins at sample 1.5 · 2³⁰ + 12,345."""
    long, wave = 3 * 2**29, banks.to_int16(voice(1.0, 9))[0]
    path = tmp_path / "bank"
    (path / "shards").mkdir(parents=True)
    rows = []
    for shard in range(2):
        samples = np.lib.format.open_memmap(path / "shards" / f"{shard:05d}.npy", "w+", np.int16, (long + len(wave),))
        samples[long:] = wave if shard else wave[::-1]
        samples.flush()
        for offset, length in ((0, long), (long, len(wave))):
            clip = {"clip": len(rows), "name": f"{len(rows)}.wav", "split": "train", "shard": shard}
            rows.append(clip | {"offset": offset, "samples": length, "start": 0.0, "end": 1.0, "scale": 1.0})
    table = banks.pa.Table.from_pylist(rows, schema=banks._SCHEMA)
    pq.write_table(table, path / "clips.parquet")
    about = {"format": "w2s-bank", "version": 1, "samples": 2 * (long + len(wave)), "shards": 2, "fingerprint": "x"}
    (path / "bank.json").write_text(json.dumps(about))
    bank = Bank(path)
    assert bank.starts[3] == 2 * long + len(wave) > 2**31
    drawn = tables.draw(bank, per_clip=1, seconds=(0.5,), mix=0, gain_db=(0, 0))
    last = np.flatnonzero(drawn.columns["clip"] == 3)
    heard = render.render_on_host(bank, drawn, last)[0]
    at = drawn.columns["offset"][last[0]]
    np.testing.assert_array_equal(heard, wave[at : at + 8000] / np.float32(32768))
    recipe = render.recipes(bank, drawn, last)
    assert int(recipe.row[0]) * render.ROW + int(recipe.column[0]) == bank.starts[3]
