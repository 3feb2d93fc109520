"""Which views make a batch, in groups; the bank on the device and on the host; banks beyond 2³¹ samples."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax import bank as banks
from w2s_jax import config, corpora, feed
from w2s_jax import train as training
from w2s_jax.errors import UsageError
from w2s_jax.labels import Labels
from w2s_jax.parallel import Layout, lay_out
from w2s_jax.render import render_on_host
from w2s_jax.views import draw


def test_batches_depend_on_seed_and_step_only():
    samples = np.array([100] * 37 + [200] * 11)
    one, two = (feed.Batches(samples, 8, 200, seed=1) for _ in range(2))
    for step in (150, 3, 77):  # in any order
        assert one(step)[0] == two(step)[0]
        np.testing.assert_array_equal(one(step)[1], two(step)[1])
    seen = {100: [], 200: []}
    for step in range(200):
        length, rows = one(step)
        assert (samples[rows] == length).all()
        seen[length] += list(rows.ravel())
    for length, members in ((100, 37), (200, 11)):  # epochs: nothing a second time before all were there once
        for epoch in range(len(seen[length]) // members):
            assert len(set(seen[length][epoch * members : (epoch + 1) * members])) == members


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.integers(1, 8))
def test_groups_keep_clips_whole_in_order_and_even(clips, count):
    clips = np.array(clips)
    groups = feed.divide(clips, count)
    assert groups.min() >= 0
    assert groups.max() < count
    for clip in np.unique(clips):
        assert len(np.unique(groups[clips == clip])) == 1
    order = np.argsort(clips, kind="stable")
    assert (np.diff(groups[order]) >= 0).all()
    largest = np.bincount(clips).max()
    assert np.bincount(groups, minlength=count).max() <= len(clips) / count + largest


@given(st.integers(0, 10_000), st.integers(0, 300))
@settings(max_examples=30)
def test_a_batch_takes_equally_from_every_group(seed, step):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(4), rng.integers(1, 9, 4)))
    batches = feed.Batches(np.full(len(groups), 500), 12, 301, seed, groups, 4)
    _, rows = batches(step)
    assert rows.shape == (4, 3)
    assert (groups[rows] == np.arange(4)[:, None]).all()
    _, part = batches(step, range(1, 3))  # what a process with the two middle groups takes
    np.testing.assert_array_equal(part, rows[1:3])


def test_a_group_without_a_length_is_refused():
    with pytest.raises(UsageError, match=r"1 of 2 data shards have no view of 0\.5 s"):
        feed.Batches(np.array([8000, 16000, 16000]), 2, 10, 0, np.array([0, 0, 1]), 2)
    with pytest.raises(UsageError, match="5 of 8 data shards have no view"):  # fewer clips than shards
        feed.Batches(np.full(3, 8000), 8, 10, 0, feed.divide(np.array([4, 5, 9]), 8), 8)


@pytest.mark.parametrize(("shards", "size", "parts"), [(0, 7, 2), (3, 8, 1), (1, 8, 3), (-1, 8, 1), (1, 8, 0)])
def test_batches_that_cannot_be_divided_are_refused(shards, size, parts):
    with pytest.raises(UsageError, match="expected a multiple|cannot share"):
        lay_out(shards, size, parts)


def feeds(bank, views, layout, workers=0, steps=40):
    """Both placements of the same bank, for all devices of a layout, and the labels that they should deliver."""
    training = views.where("train")
    groups = feed.divide(views.columns["clip"][training], layout.data_shards)
    targets = np.random.default_rng(0).random((len(training), 2)).astype(np.float32)
    batches = feed.Batches(views.columns["samples"][training], 8, steps, 0, groups, layout.data_shards)
    on_device = feed.DeviceFeed(bank, views, training, groups, targets, layout, batches)
    return on_device, feed.HostFeed(bank, views, training, targets, layout, batches, workers), training, targets


class Two(Layout):
    """This process as if it had two devices."""

    @property
    def local(self) -> range:
        return range(2)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_device_and_host_placement_give_bit_equal_batches(bank, views, workers):
    layout = Two((jax.devices()[0],) * 2, 4)
    on_device, on_host, training, targets = feeds(bank, views, layout, workers)
    render_device = jax.jit(on_device.render_batch, static_argnames="samples")
    render_host = jax.jit(on_host.render_batch, static_argnames="samples")
    lengths, steps = set(), 0
    for one, two in zip(on_device.batches(3, 40), on_host.batches(3, 40), strict=True):
        samples, rows, chosen = one
        assert two[0] == samples
        np.testing.assert_array_equal(two[1], rows)
        assert rows.shape == (2, 4)
        lengths.add(samples)
        steps += 1
        for device in range(2):
            own = jax.tree.map(lambda leaf, device=device: leaf[device], on_device.data)
            waves, labels = render_device(own, chosen[device], samples=samples)
            inputs = jax.tree.map(lambda leaf, device=device: leaf[device], two[2])
            from_host, labels_too = render_host((), inputs, samples=samples)
            np.testing.assert_array_equal(waves, from_host)  # every bit
            np.testing.assert_array_equal(labels, labels_too)
            np.testing.assert_array_equal(labels, targets[rows[device]])
            known = render_on_host(bank, views, training[rows[device]])  # what the teacher heard
            np.testing.assert_array_equal(waves, known)
    assert (len(lengths), steps) == (2, 37)


def test_processes_of_a_script_without_a_main_guard(tmp_path):
    """Python's "spawn" runs the script again in every process, which would start processes of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\nfrom w2s_jax import feed\nprint('script')\n"
        "process = multiprocessing.get_context('spawn').Process(target=print, args=('worker',))\n"
        "with feed._without_script():\n    process.start()\n"
        "process.join()\nprint(process.exitcode, __file__ == __import__('sys').argv[0])\n"
    )
    done = subprocess.run([sys.executable, "-u", script], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["script", "worker", "0", "True"], "")


def test_partners_from_the_same_shard_need_no_foreign_clips(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(banks, "SHARD_CLIPS", 7)
    banks.build(corpora.read("csv", corpus / "corpus.csv"), tmp_path / "bank")
    bank = banks.Bank(tmp_path / "bank")
    views = draw(bank, per_clip=4, seconds=(0.4,), mix=1.0, seed=1)
    near = draw(bank, per_clip=4, seconds=(0.4,), mix=1.0, seed=1, partners="shard")
    shard = bank.clips["shard"]
    mixed = near.columns["partner"] >= 0
    assert mixed.sum() > 30
    assert len(np.unique(shard)) == 4
    others = views.columns["partner"] >= 0
    assert (shard[views.columns["clip"][others]] != shard[views.columns["partner"][others]]).any()
    assert (shard[near.columns["clip"][mixed]] == shard[near.columns["partner"][mixed]]).all()
    assert near.fingerprint != views.fingerprint
    assert "partners" not in views.about  # views of earlier versions keep their fingerprint
    with pytest.raises(UsageError, match="partners"):
        draw(bank, partners="near")


def test_the_plan_says_its_arithmetic(bank, views):
    training = views.where("train")
    groups = feed.divide(views.columns["clip"][training], 1)
    settings = config.default()
    layout = lay_out(1, 8)
    decided = feed.plan(bank, views, training, groups, layout, settings)
    assert decided.placement == "device"
    assert "on each of 1 device" in decided.reason
    settings.bank_gib = 1e-6
    assert feed.plan(bank, views, training, groups, layout, settings).placement == "host"
    settings.bank_placement = "device"
    assert feed.plan(bank, views, training, groups, layout, settings).placement == "device"
    settings.bank_placement = "cloud"
    with pytest.raises(UsageError, match="expected auto, device or host"):
        feed.plan(bank, views, training, groups, layout, settings)


def test_a_bank_goes_to_another_process_without_its_samples(bank):
    bank.clip(0)
    copy = pickle.loads(pickle.dumps(bank))
    assert len(pickle.dumps(bank)) < 1000
    np.testing.assert_array_equal(copy.clip(3), bank.clip(3))


@pytest.fixture(scope="session")
def forty_hours(bank, tmp_path_factory):
    """A bank of 40 hours, 2.3 · 10⁹ samples: mostly holes in sparse files, with noise in each clip's first 2 s."""
    root = tmp_path_factory.mktemp("sparse") / "bank"
    (root / "shards").mkdir(parents=True)
    clips, minutes, shards = 240, 10, 24
    samples, each = minutes * 60 * 16_000, clips // shards
    rng = np.random.default_rng(0)
    for shard in range(shards):
        values = np.lib.format.open_memmap(root / "shards" / f"{shard:05d}.npy", "w+", np.int16, (each * samples,))
        for clip in range(each):
            values[clip * samples :][:32_000] = rng.integers(-9000, 9000, 32_000)
        del values
    table = pq.read_table(bank.path / "clips.parquet").slice(0, 1).to_pylist()[0]
    rows = [
        {
            **table,
            "clip": at,
            "name": str(at),
            "speaker": str(at),
            "group": str(at),
            "split": "train" if at < 236 else "validation",
        }
        | {"shard": at // each, "offset": at % each * samples, "samples": samples, "start": 0.0, "end": minutes * 60.0}
        for at in range(clips)
    ]
    pq.write_table(banks.pa.Table.from_pylist(rows, schema=banks._SCHEMA), root / "clips.parquet")
    about = json.loads((bank.path / "bank.json").read_text())
    about |= {"version": 1, "clips": clips, "samples": clips * samples, "shards": shards, "fingerprint": "forty hours"}
    (root / "bank.json").write_text(json.dumps(about))
    return banks.Bank(root)


def far_views(bank):
    views = draw(bank, per_clip=2, seconds=(0.5,), mix=0.5, seed=0)
    views.columns["offset"] %= 20_000  # into the noise
    views.columns["partner_offset"] %= 20_000
    return views


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["host", "device"])
def test_forty_hours_train(forty_hours, placement, tmp_path):
    assert forty_hours.samples > 2**31
    views = far_views(forty_hours)
    values = np.random.default_rng(0).random((len(views), 3)).astype(np.float32)
    about = {"teacher": {"name": "random", "stand_in": True, "licence": "none"}}
    labels = Labels(("arousal", "dominance", "valence"), values, {}, about)
    chosen = ["fields.channels=2", "steps=8", "batch_size=8", "eval_every=8", "log_every=1", f"bank_placement={placement}"]
    told = []
    training.train(config.load("wav2small", chosen), forty_hours, views, labels, tmp_path / "run", message=told.append)
    assert f"bank on the {placement}: 39.3 hours" in told[0]


@pytest.mark.slow
def test_forty_hours_are_heard_to_the_end(forty_hours):
    views = far_views(forty_hours)
    train = views.where("train")
    last = train[np.argsort(views.columns["clip"][train])[-16:]]  # clips that begin beyond 2³¹ samples
    assert (forty_hours.starts[views.columns["clip"][last]] > 2**31).all()
    bank, starts = feed.pack_clips(forty_hours)
    table = feed.make_recipe(forty_hours, views, last, starts)
    waves = jax.jit(partial(feed.render, samples=8000))(bank, table)
    np.testing.assert_array_equal(waves, render_on_host(forty_hours, views, last))
    assert np.abs(waves).mean() > 0.01
