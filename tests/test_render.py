"""Rendering against its definition, on the device and on the host; banks beyond 2³¹ samples."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import soundfile
from conftest import voice
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax import bank as banks
from w2s_jax import corpora, render, teachers
from w2s_jax import views as tables
from w2s_jax.bank import Bank


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
    rows = views.where("train")
    rows = rows[views.columns["samples"][rows] == 6400][:40]
    expected = np.stack([by_hand(bank, views, row) for row in rows])
    host = render.render_on_host(bank, views, rows)
    device = jax.jit(render.render, static_argnames="samples")(
        jnp.asarray(render.pack_clips(bank)[0]), render.make_recipe(bank, views, rows), samples=6400
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
    recipe = render.make_recipe(bank, drawn, last)
    assert int(recipe.row[0]) * render.ROW + int(recipe.column[0]) == bank.starts[3]


def test_a_recording_at_minus_60_db_is_heard_as_it_is(tmp_path):
    root, teacher = tmp_path / "corpus", teachers.load("acoustic")
    root.mkdir()
    wave = 0.001 * voice(2.0, 1)
    soundfile.write(root / "quiet.wav", wave, 16_000, subtype="FLOAT")
    soundfile.write(root / "loud.wav", 40 * voice(2.0, 2), 16_000, subtype="FLOAT")
    clips = [dataclasses.replace(clip, split="train") for clip in corpora.read("folder", root)]
    banks.build(clips, tmp_path / "bank")
    bank = Bank(tmp_path / "bank")
    views = tables.draw(bank, per_clip=1, seconds=(2.0,), mix=0, gain_db=(0, 0))
    for name, original in (("quiet.wav", wave), ("loud.wav", 40 * voice(2.0, 2))):
        row = np.flatnonzero(bank.clips["name"][views.columns["clip"]] == name)
        heard = render.render_on_host(bank, views, row)[0]
        device = jax.jit(render.render, static_argnames="samples")(
            jnp.asarray(render.pack_clips(bank)[0]), render.make_recipe(bank, views, row), samples=32_000
        )
        for got in (heard, np.asarray(device)[0], bank.wave(int(row[0]))):
            noise = got.astype(np.float64) - original
            assert 10 * np.log10(np.mean(original.astype(np.float64) ** 2) / np.mean(noise**2)) > 80
        np.testing.assert_allclose(teacher(heard[None]), teacher(original[None]), atol=1e-3)


def test_a_mixtures_ratio_does_not_depend_on_the_stored_levels(tmp_path):
    """Own at -60 dB and partner at 0 dB, 10 dB apart by their recipe: rendered from a bank as by hand from the files."""
    root = tmp_path / "corpus"
    root.mkdir()
    waves = [level * voice(1.0, seed) for seed, level in ((0, 0.001), (1, 1.0))]
    for number, wave in enumerate(waves):
        soundfile.write(root / f"{number}.wav", wave, 16_000, subtype="FLOAT")
    clips = [dataclasses.replace(clip, split="train") for clip in corpora.read("folder", root)]
    banks.build(clips, tmp_path / "bank")
    bank = Bank(tmp_path / "bank")
    views = tables.draw(bank, per_clip=8, seconds=(1.0,), mix=1.0, gain_db=(6, 6), snr_db=(10, 10))
    row = np.flatnonzero((views.columns["clip"] == 0) & (views.columns["partner"] == 1))[:1]
    partner = np.roll(waves[1], -int(views.columns["partner_offset"][row[0]])).astype(np.float64)
    own = waves[0].astype(np.float64)
    expected = own + partner * np.sqrt(np.mean(own**2) / np.mean(partner**2)) * 10**-0.5
    heard = render.render_on_host(bank, views, row)[0]
    np.testing.assert_allclose(heard, 10**0.3 * expected, atol=1e-3 * np.abs(expected).max())
