"""Views: reproducible draws, stored tables, and what damages or replaces them."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import flipped

from w2s_jax import views as tables
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.views import Views


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
    again = Views.read(tmp_path / "views.parquet").check(bank)
    assert again.fingerprint == views.fingerprint
    table = pq.read_table(tmp_path / "views.parquet")
    about = json.loads(table.schema.metadata[b"w2s"]) | {"bank": "another"}
    pq.write_table(table.replace_schema_metadata({"w2s": json.dumps(about)}), tmp_path / "edited.parquet")
    with pytest.raises(W2SError, match="changed after"):
        Views.read(tmp_path / "edited.parquet")
    with pytest.raises(UsageError, match="no such file"):
        Views.read(tmp_path / "none.parquet")
    with pytest.raises(MismatchError, match=bank.fingerprint):
        tables.Views(views.columns, views.about | {"bank": "another"}).check(bank)


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
    assert Views.read(path).fingerprint == other.fingerprint
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
            read = Views.read(path)
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
        Views.read(tmp_path / "newer.parquet")
