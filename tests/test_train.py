"""Losses, data order, and runs that end where an unbroken run ends."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from golden.mobilenet import weights
from pmap_against_jit import small_step
from safetensors.numpy import save_file

from w2s_jax import checkpoint, config, convert, feed, metrics, models, teachers
from w2s_jax import train as training
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.evaluate import evaluate, predict_views
from w2s_jax.export.card import collect_facts, compose_card
from w2s_jax.labelling import label
from w2s_jax.labels import Labels
from w2s_jax.losses import distillation_loss
from w2s_jax.models import frontend
from w2s_jax.train import step, units
from w2s_jax.train.checkpoints import Checkpoints
from w2s_jax.train.loop import training_flops
from w2s_jax.train.run import Run
from w2s_jax.views import draw

#: What a line of metrics.jsonl says of the machine; the rest is the same wherever a run was interrupted.
SPEED = ("clips_per_second", "waiting_share", "arithmetic_share")


def trained(workdir):
    """What a run leaves, without the figures of its speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for figure in [key for key in line if key in SPEED or key.startswith("memory_")]:
            del line[figure]
    return lines, (workdir / "student" / "model.safetensors").read_bytes(), (workdir / "student" / "config.json").read_text()


@pytest.mark.slow
def test_pmap_over_devices_is_jit_of_the_whole_batch():
    """Four forced host devices need a process of their own."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("pmap_against_jit.py")],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    devices, loss, params = done.stdout.split()
    assert int(devices) == 4
    assert float(loss) < 1e-5
    assert float(params) < 1e-4


def test_a_scan_is_its_steps():
    one_step, state = small_step()
    rng = np.random.default_rng(0)
    waves, targets = rng.standard_normal((3, 4, 700)).astype(np.float32), rng.standard_normal((3, 4, 3)).astype(np.float32)
    scanned, measured = jax.jit(lambda s, x: step.scan_steps(one_step, s, x))(state, (waves, targets))
    for at in range(3):
        state, one = jax.jit(one_step)(state, (waves[at], targets[at]))
        np.testing.assert_allclose(measured["loss"][at], one["loss"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(scanned.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_accumulation_minimises_the_loss_of_the_whole_set():
    student = models.build("wav2small", channels=2)
    rng = np.random.default_rng(0)
    waves, targets = rng.standard_normal((12, 900)).astype(np.float32), rng.standard_normal((12, 3)).astype(np.float32)
    variables = jax.jit(student.init)(jax.random.key(0), waves)
    state = training.initial_state(variables, optax.sgd(0.1))
    given = {"student": student, "frontend": variables["frontend"], "optimizer": optax.sgd(0.1), "l2": 0.1}
    three_parts = jax.jit(lambda state: training.train_step(state, (waves, targets), accumulate=3, **given))

    def by_hand(params):
        """Each part has moments of its own; then one CCC, not a mean of three."""
        order = np.concatenate([np.arange(12)[part::3] for part in range(3)])
        heard = [
            student.apply({**variables, "params": params}, waves[part::3], train=True, mutable="batch_stats")
            for part in range(3)
        ]
        prediction = jnp.concatenate([prediction for prediction, _ in heard])
        moments = jax.tree.map(lambda *parts: sum(parts) / 3, *[changed["batch_stats"] for _, changed in heard])
        return distillation_loss(prediction, targets[order], l2=0.1)[0], moments

    (loss, moments), gradients = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(variables["params"])
    after, measured = three_parts(state)
    np.testing.assert_allclose(measured["loss"], loss, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
    for a, b in zip(jax.tree.leaves((after.params, after.batch_stats)), jax.tree.leaves((expected, moments)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_a_run_in_bfloat16_and_parts_leaves_a_float32_student(bank, views, labels, tmp_path):
    chosen = ["dtype=bfloat16", "accumulate=2", "batch_size=8", "steps=4", "eval_every=4"]
    training.train(config.load("wav2small", [*TINY, *chosen]), bank, views, labels, tmp_path, profile=True)
    _, variables, about = checkpoint.load_student(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert "dtype" not in about["fields"]
    assert list(tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz"))
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_leaves_what_is_promised(run, labels):
    workdir, summary = run
    lines, *_ = trained(workdir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [4, 8, 12]
    best = max((line for line in lines if line["kind"] == "validation"), key=lambda line: line["ccc/mean"])
    assert summary["best_step"] == best["step"]
    assert list((workdir / "tensorboard").glob("events*"))
    assert (workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {"update_norm", "parameter_norm", "waiting_share", "arithmetic_share", "memory_peak_gib"} <= set(
        json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-2])
    )
    student, variables, about = checkpoint.load_student(workdir)
    assert about["teacher"]["stand_in"] is True
    assert student.apply(variables, np.zeros((1, 640), np.float32)).shape == (1, len(labels.dimensions))


def test_the_student_speaks_in_the_labels_units(run, bank, views, labels):
    """The CCC in config.json was computed before the unit was folded into the weights; it must hold after."""
    student, variables, about = checkpoint.load_student(run[0])
    rows = views.where("validation")
    predicted = predict_views(jax.jit(lambda waves: student.apply(variables, waves)), bank, views, rows)
    scores = metrics.ccc(predicted, labels.values[rows])
    np.testing.assert_allclose(scores, [about["validation_ccc"][name] for name in labels.dimensions], atol=1e-5)


def test_calibration_turns_ccc_into_correlation():
    rng = np.random.default_rng(0)
    known = rng.normal([3.0, 0.5], [0.7, 0.1], (500, 2))
    raw = 0.6 * (known - known.mean(axis=0)) / known.std(axis=0) + rng.normal(0.1, 0.5, (500, 2))
    mean, deviation = units.calibrate(raw, known, known.std(axis=0))
    expected = [np.corrcoef(raw[:, d], known[:, d])[0, 1] for d in range(2)]
    np.testing.assert_allclose(metrics.ccc(raw * deviation + mean, known), expected, rtol=1e-9)
    _, limited = units.calibrate(raw * 1e-9, known, known.std(axis=0))  # a constant is not blown up
    np.testing.assert_allclose(limited, 2 * known.std(axis=0))


def test_a_crop_takes_a_part_that_depends_on_seed_and_step():
    student = models.build("wav2small", channels=2)
    waves = np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    variables = jax.jit(student.init)(jax.random.key(0), waves)
    given = {"student": student, "frontend": variables["frontend"], "optimizer": optax.sgd(0.1)}

    @partial(jax.jit, static_argnames=("crop", "seed"))
    def loss(at, waves, crop, seed=0):
        state = training.initial_state(variables, given["optimizer"]).replace(step=at)
        return training.train_step(state, (waves, waves[:, :3]), crop=crop, seed=seed, **given)[1]["loss"]

    whole, part = loss(3, waves, 1.0), loss(3, waves, 0.6)
    assert part == loss(3, waves, 0.6)
    assert len({float(x) for x in (whole, part, loss(3, waves, 0.6, seed=1), loss(4, waves, 0.6))}) == 4

    ramps = jnp.arange(1000.0)[None] + jnp.zeros((2, 1))
    one, again, other = (step.random_crop(ramps, 0.6, jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.shape == (2, 600)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(np.diff(one), 1)
    assert step.random_crop(ramps, 1.0, jax.random.key(0)) is ramps


def test_jitter_shifts_level_and_offset_of_each_waveform():
    waves = np.random.default_rng(0).standard_normal((2000, 300)).astype(np.float32)
    key = jax.random.key_data(jax.random.key(0))
    shaken = np.asarray(frontend.jitter(waves, key, jnp.float32(0.2)))
    offset, level = np.polynomial.polynomial.polyfit(waves[0], shaken[0], 1)
    np.testing.assert_allclose(shaken[0], level * waves[0] + offset, atol=1e-5)
    slopes = np.array([np.polyfit(wave, other, 1) for wave, other in zip(waves, shaken, strict=True)])
    np.testing.assert_allclose([np.log(slopes[:, 0]).std(), slopes[:, 1].std()], 0.2, rtol=0.06)
    np.testing.assert_allclose([np.log(slopes[:, 0]).mean(), slopes[:, 1].mean()], 0, atol=0.015)
    np.testing.assert_array_equal(shaken[:10], frontend.jitter(waves[:10], key, jnp.float32(0.2)))  # on any number of devices
    assert (shaken[:10] != frontend.jitter(waves[:10], jax.random.key_data(jax.random.key(1)), jnp.float32(0.2))).any()


def test_jitter_is_for_training_alone_and_depends_on_the_step():
    student = models.build("wav2small", channels=2)
    waves = np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    variables = jax.jit(student.init)(jax.random.key(0), waves)
    given = {"student": student, "frontend": variables["frontend"], "optimizer": optax.sgd(0.1)}

    @partial(jax.jit, static_argnames="jitter")
    def loss(at, jitter):
        state = training.initial_state(variables, given["optimizer"]).replace(step=at)
        return training.train_step(state, (waves, waves[:, :3]), jitter=jitter, **given)[1]["loss"]

    assert loss(3, 0.5) == loss(3, 0.5)
    assert len({float(x) for x in (loss(3, 0.0), loss(3, 0.5), loss(4, 0.5))}) == 3
    jitter = {"jitter": {"key": jax.random.key_data(jax.random.key(0)), "deviation": jnp.float32(0.5)}}
    np.testing.assert_array_equal(student.apply(variables, waves), student.apply({**variables, **jitter}, waves))


def test_jitter_that_cannot_be(bank, views, labels, tmp_path):
    for overrides, says in (
        (["jitter=-0.1"], "jitter is -0.1; expected a number of at least 0"),
        (["jitter=1e999"], "jitter is inf"),
    ):
        with pytest.raises(UsageError, match=says):
            training.train(config.load("wav2small", [*TINY, *overrides]), bank, views, labels, tmp_path)
    with pytest.raises(UsageError, match="mobilenet_v3_s has no jitter"):
        training.train(config.load("mobilenet_v3_s", ["steps=1", "jitter=0.1"]), bank, views, labels, tmp_path)


@pytest.mark.parametrize("logged", [6, 2])  # 2: before the first evaluation
def test_an_interrupted_run_ends_bit_for_bit_the_same(run, bank, views, labels, tmp_path, logged):
    settings = config.load("wav2small", TINY)

    def stop(done, *_, **__):
        if done == logged:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(training.Interrupted) as stopped:
        training.train(settings, bank, views, labels, tmp_path, progress=stop)
    assert stopped.value.exit_code == 143
    assert (tmp_path / "student").exists() == (logged > 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "kind": "train"}\n{"ste')  # what a kill may leave
    training.train(settings, bank, views, labels, tmp_path)
    assert trained(tmp_path) == trained(run[0])
    again = training.train(settings, bank, views, labels, tmp_path)  # a finished run has nothing left to do
    assert again["best_step"] == run[1]["best_step"]


@pytest.fixture
def finished(run, tmp_path):
    """A copy of the unbroken run, to work on."""
    shutil.copytree(run[0], tmp_path / "finished")
    return tmp_path / "finished"


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(finished, run, bank, views, labels):
    """What JSON and arrays can hold in place of what was saved came back without a word."""
    noted = finished / "checkpoints" / "12" / "best" / "metadata"
    noted.write_text(noted.read_text().replace('"step": ', '"step": 1'))
    with pytest.warns(UserWarning, match=r"checkpoints/12 is damaged \(its content .* going on from step 8"):
        training.train(config.load("wav2small", TINY), bank, views, labels, finished)
    assert trained(finished) == trained(run[0])

    for path in finished.glob("checkpoints/*/best/metadata"):
        path.write_text("{}")
    with pytest.raises(W2SError, match="every checkpoint in .* is damaged"):
        training.train(config.load("wav2small", TINY), bank, views, labels, finished)


def test_a_runs_description_is_checked(finished, bank, views, labels):
    path, tiny = finished / "config.json", config.load("wav2small", TINY)
    whole = path.read_text()
    path.write_text(whole.replace('"data_shards": 1', '"data_shards": 2'))
    with pytest.raises(W2SError, match=r"config\.json is damaged, or was changed by hand"):
        training.train(tiny, bank, views, labels, finished)
    path.unlink()
    with pytest.raises(UsageError, match=r"has checkpoints, but no config\.json"):
        training.train(tiny, bank, views, labels, finished)
    about = json.loads(whole)
    del about["checksum"]  # as 0.1 wrote it
    path.write_text(json.dumps(about))
    assert training.train(tiny, bank, views, labels, finished)["steps"] == 12


@pytest.mark.parametrize("damage", ["a byte more", "no weights", "nothing"])
def test_a_damaged_student_is_made_again(finished, run, bank, views, labels, damage):
    weights = finished / "student" / "model.safetensors"
    if damage == "nothing":
        shutil.rmtree(weights.parent)
    elif damage == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.warns(UserWarning, match="so the best student, of step .* is lost, and that of the last step is kept"):
        summary = training.train(config.load("wav2small", TINY), bank, views, labels, finished)
    about = checkpoint.load_student(finished)[2]
    assert about["step"] == summary["best_step"] == 12
    assert training.train(config.load("wav2small", TINY), bank, views, labels, finished)["best_step"] == 12


def test_without_its_log_a_finished_run_still_has_a_summary(finished, run, bank, views, labels):
    (finished / "metrics.jsonl").write_text("")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has no line of the 12 steps that are done"):
        assert training.train(config.load("wav2small", TINY), bank, views, labels, finished)["best_step"] == run[1]["best_step"]


def test_what_is_no_place_for_a_run_is_refused(finished, bank, views, labels, labels_path, tmp_path):
    tiny = config.load("wav2small", TINY)
    for place in (bank.path, labels_path):
        with pytest.raises(UsageError, match="is a bank or labels.*choose another --workdir"):
            training.train(tiny, bank, views, labels, place)
    shutil.rmtree(finished / "checkpoints")  # it never came to one: other settings may have the place
    for change, said in (
        ("learning_rate=-1.0", "learning_rate is -1"),
        ("steps=0", "steps is 0"),
        ("l2=-0.1", "at least 0"),
    ):
        with pytest.raises(UsageError, match=said):
            training.train(config.load("wav2small", [*TINY, change]), bank, views, labels, tmp_path / "none")
    shorter = config.load("wav2small", [*TINY, "steps=2", "eval_every=2", "learning_rate=0.001"])
    assert training.train(shorter, bank, views, labels, finished)["steps"] == 2


def test_no_flipped_bit_comes_back_silently(tmp_path):
    tree = {"state": {"a": np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32), "step": np.array(2, np.int32)}}
    best = {"step": 1, "ccc": {"mean": 0.5}}
    with Checkpoints(tmp_path / "whole") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree, best)
    files = [path for path in sorted((tmp_path / "whole" / "2").rglob("*")) if path.is_file() and path.stat().st_size]
    generator, fell_back = np.random.default_rng(1), 0
    for trial in range(24):
        copy = tmp_path / str(trial)
        shutil.copytree(tmp_path / "whole", copy)
        path = copy / files[trial % len(files)].relative_to(tmp_path / "whole")
        content = bytearray(path.read_bytes())
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as said, Checkpoints(copy) as checkpoints:
            warnings.simplefilter("always")
            found, noted = checkpoints.restore(tree)
        jax.tree.map(np.testing.assert_array_equal, found, tree)
        assert noted == best
        fell_back += any("damaged" in str(warning.message) for warning in said)
    assert fell_back >= 5


def test_a_full_disk_keeps_the_last_checkpoint_and_is_one_line(tmp_path, limited, capfd):
    """tensorstore's threads printed hundreds of lines."""
    tree = {f"part{number}": {"a": np.random.default_rng(number).normal(size=3000)} for number in range(20)}
    with pytest.raises(W2SError) as stopped, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {"step": 1, "ccc": None})
        checkpoints.wait()
        limited(2000)
        checkpoints.save(2, tree, {"step": 2, "ccc": None})
        checkpoints.wait()
    assert re.search(rf"{tmp_path}: File too large \(469 KiB to write, .* free\); the last whole one", str(stopped.value))
    assert capfd.readouterr().err == ""
    limited(resource.RLIM_INFINITY)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(tree)[1]["step"] == 1


def test_a_longer_run_goes_on_with_the_schedule_of_its_new_length(finished, run, bank, views, labels):
    said = []
    longer = [*TINY, "steps=16", "warmup=0.25"]
    with pytest.raises(MismatchError, match=r"warmup: 0\.05 there, 0\.25 now\)"):
        training.train(config.load("wav2small", longer), bank, views, labels, finished)
    with pytest.raises(UsageError, match="has 12 steps behind it, more than steps=8"):
        training.train(config.load("wav2small", [*TINY, "steps=8"]), bank, views, labels, finished)
    summary = training.train(config.load("wav2small", longer[:-1]), bank, views, labels, finished, message=said.append)
    lines = trained(finished)[0]
    assert lines[: len(trained(run[0])[0])] == trained(run[0])[0]
    # a cosine from 3e-3 after one step of warm-up to 0 at step 16, by hand; a line has the rate of the step before its number
    rates = {line["step"]: line["learning_rate"] for line in lines if line["kind"] == "train"}
    for at in (14, 16):
        assert rates[at] == pytest.approx(3e-3 * (1 + np.cos(np.pi * (at - 2) / 15)) / 2, abs=1e-6)
    assert any("was to have 12 steps and now has 16: it goes on from step 12" in line for line in said)
    assert summary["steps"] == 16
    assert json.loads((finished / "config.json").read_text())["config"]["steps"] == 16


def test_a_resume_with_another_code_or_kernel_is_told(finished, bank, views, labels, monkeypatch):
    path = finished / "config.json"
    about = json.loads(path.read_text())
    del about["checksum"]
    path.write_text(json.dumps(about | {"computed": about["computed"] | {"kernel": "abacus"}, "w2s_jax": "0.0.1"}))
    with pytest.warns(UserWarning, match=r"kernel: abacus there, \w+ now\); it goes on, but will not end bit for bit"):
        training.train(config.load("wav2small", TINY), bank, views, labels, finished)
    path.write_text(json.dumps(about | {"numerics": 99}))
    with pytest.raises(MismatchError, match="numerics: 99 there, 1 now"):
        training.train(config.load("wav2small", TINY), bank, views, labels, finished)
    path.write_text(json.dumps(about | {"version": 99}))
    with pytest.raises(UsageError, match="has version 99, expected 1"):
        training.train(config.load("wav2small", TINY), bank, views, labels, finished)


def test_a_run_in_64_bit_mode_is_the_same_bit_for_bit(run, bank, views, labels, tmp_path):
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        training.train(config.load("wav2small", TINY), bank, views, labels, tmp_path)
        _, variables, _ = checkpoint.load_student(tmp_path)
        report = evaluate(tmp_path, bank, views, labels)
    assert trained(tmp_path) == trained(run[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert report == evaluate(run[0], bank, views, labels) | {"path": str(tmp_path)}


@pytest.mark.parametrize("form", ["auto", "direct"])
def test_a_student_in_64_bit_mode_has_the_same_gradients(form):
    """The compiled kernel refused float64 parameters."""
    waves = np.random.default_rng(0).standard_normal((4, 1500)).astype(np.float32)
    student = models.build("wav2small", channels=2, before=1, after=1, form=form)

    def gradients():
        variables = jax.jit(student.init)(jax.random.key(0), waves)

        def loss(params):
            heard = student.apply({**variables, "params": params}, waves, train=True, mutable="batch_stats")[0]
            return distillation_loss(heard, waves[:, :3], l2=0.1)[0]

        return variables, jax.jit(jax.grad(loss))(variables["params"])

    expected = gradients()
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        found = gradients()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), *(jax.device_get((found, expected))))


def test_no_device_of_the_wanted_kind_is_one_line(bank, views, labels_path, tmp_path):
    views.save(tmp_path / "views.parquet")
    data = ["--bank", bank.path, "--views", tmp_path / "views.parquet", "--labels", labels_path]
    command = [sys.executable, "-m", "w2s_jax.cli", "train", "wav2small", *data, "--workdir", tmp_path / "run"]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | {"JAX_PLATFORMS": "cuda"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("w2s: error: JAX finds no cuda device (JAX_PLATFORMS=cuda")


def test_a_bank_that_the_device_cannot_hold_trains_the_same(run, bank, views, labels, tmp_path):
    settings = config.load("wav2small", [*TINY, "bank_gib=1e-9"])
    training.train(settings, bank, views, labels, tmp_path)
    one, two = (checkpoint.load_student(path)[1] for path in (run[0], tmp_path))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_another_run_is_refused_with_the_difference(run, bank, views, labels):
    with pytest.raises(MismatchError, match=r"learning_rate: 0\.003 there, 0\.5 now"):
        training.train(config.load("wav2small", [*TINY, "learning_rate=0.5"]), bank, views, labels, run[0])
    with pytest.raises(MismatchError, match="student: wav2small there, wav2small_17k now"):
        training.train(config.load("wav2small_17k", TINY), bank, views, labels, run[0])


def test_a_loss_that_is_not_finite_names_its_views(bank, views, labels, tmp_path, monkeypatch):
    settings, seen = config.load("wav2small", TINY), []
    real = feed.Batches.__call__

    def watch(self, step, groups):
        length, rows = real(self, step, groups)
        seen.append(views.where("train")[rows.ravel()])
        return length, rows

    monkeypatch.setattr(feed.Batches, "__call__", watch)
    monkeypatch.setattr(step, "distillation_loss", lambda p, t, **_: (jnp.float32(jnp.nan) * p.sum(), p.mean(axis=0)))
    with pytest.raises(W2SError, match=r"is nan at step 1 \(views ") as stopped:
        training.train(settings, bank, views, labels, tmp_path)
    assert ", ".join(map(str, seen[0])) in str(stopped.value)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", "no setting 'stepz'"),
        ("steps=many", "expected int"),
        ("steps", "key=value"),
        ("fields.x=1", "no field x"),
        ("warmup=7", "warmup is 7.0; expected a share of the steps"),
        ("seed=-1", "seed is -1"),
        (f"seed={2**31}", "below 2³¹"),
        ("scan_steps=-1", "scan_steps is -1; expected at least 0"),
        ("workers=-1", "workers is -1"),
        ("ema=1", "and below 1"),
        ("bank_gib=-1", "bank_gib is -1"),
        ("fields.dimensions=7", "fields.dimensions cannot be set: the labels decide it"),
        ("fields.form='blocks'", "use --set form=VALUE"),
        ("fields.axis_name='x'", "training sets it"),
    ],
)
def test_wrong_settings_are_refused(setting, message, bank, views, labels, tmp_path):
    with pytest.raises(UsageError, match=message):
        training.train(config.load("wav2small", [setting]), bank, views, labels, tmp_path)


def test_one_validation_view_has_no_ccc(bank, views, labels, tmp_path):
    few = np.concatenate([views.where("train"), views.where("validation")[:1]])
    one = type(views)({name: column[few] for name, column in views.columns.items()}, views.about)
    with pytest.raises(UsageError, match=r"there is one validation view, and a CCC compares how values vary.*--eval-per-clip"):
        training.train(config.load("wav2small"), bank, one, labels, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def source(run, tmp_path):
    """A student directory with weights, a front end and an output unit that no run starts with by itself."""
    _, variables, about = checkpoint.load_student(run[0])
    generator = np.random.default_rng(0)
    disturbed = jax.tree.map(lambda x: (x * generator.uniform(0.9, 1.1, x.shape)).astype(np.float32), variables)
    disturbed["params"]["adv"]["bias"] += 5
    checkpoint.save_student(tmp_path / "source", "wav2small", about["fields"], disturbed, about)
    return tmp_path / "source"


@pytest.mark.slow
def test_a_warm_start_predicts_what_its_source_does_and_resumes_without_it(source, bank, tmp_path):
    views = draw(bank, per_clip=1, eval_per_clip=1, seconds=(0.4,), seed=3)  # of one length: less to compile
    label(bank, views, teachers.load("acoustic"), tmp_path / "labels")
    labels = Labels.read(tmp_path / "labels", views)
    given = [*TINY, "steps=4", "eval_every=2", "log_every=1", "learning_rate=0", "ema=0"]
    settings, work = config.load("wav2small", [*given, f"pretrained={source}"]), tmp_path / "run"

    def stop_at_one(done, *_, **__):
        if done == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(training.Interrupted):
        training.train(settings, bank, views, labels, work, progress=stop_at_one)

    student, theirs, about = checkpoint.load_student(source)
    other = {**theirs, "params": jax.tree.map(lambda x: 2 * x, theirs["params"])}
    for place, variables in ((source, other), (tmp_path / "elsewhere", theirs)):
        checkpoint.save_student(place, "wav2small", about["fields"], variables, about)
    with pytest.raises(MismatchError, match=r"pretrained\.fingerprint: \w{16} there, \w{16} now"):
        training.train(settings, bank, views, labels, work)
    with pytest.raises(MismatchError, match=r"pretrained\.source: source there, elsewhere now"):
        training.train(config.load("wav2small", [*given, f"pretrained={tmp_path}/elsewhere"]), bank, views, labels, work)
    with pytest.raises(MismatchError, match=r"pretrained\.source: source there, None now"):
        training.train(config.load("wav2small", given), bank, views, labels, work)
    shutil.rmtree(source)
    with pytest.raises(UsageError, match="nothing to start wav2small from"):
        training.train(settings, bank, views, labels, tmp_path / "new")

    # without a learning rate a step changes only BatchNorm's moments
    training.train(settings, bank, views, labels, work)
    _, ours, config_json = checkpoint.load_student(work)
    jax.tree.map(np.testing.assert_array_equal, ours["frontend"], theirs["frontend"])
    wave = np.random.default_rng(1).normal(size=(2, 4000)).astype(np.float32)
    predicted = student.apply({**ours, "batch_stats": theirs["batch_stats"]}, wave)
    np.testing.assert_allclose(predicted, student.apply(theirs, wave), rtol=1e-4)
    assert config_json["pretrained"] == json.loads((work / "config.json").read_text())["pretrained"]
    assert config_json["pretrained"]["what"] == "student wav2small of teacher acoustic"
    assert config_json["pretrained"]["licence"] == about["teacher"]["licence"]


@pytest.mark.slow
def test_a_mobilenet_is_trained_from_timms_weights(bank, views, labels, tmp_path, compiled_at_once):
    golden = np.load(Path(__file__).parent / "golden" / "mobilenet.npz")
    state = weights(json.loads(str(golden["keys/mobilenetv3_small_050"])), 0)
    state["conv_stem.weight"] = np.repeat(state["conv_stem.weight"], 3, axis=1)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    short = ["fields.width=0.5", "steps=1", "batch_size=2", "learning_rate=0", "ema=0", "crop=0.1"]
    training.train(config.load("mobilenet_v3_s", [*short, f"pretrained={path}"]), bank, views, labels, tmp_path / "run")
    _, variables, about = checkpoint.load_student(tmp_path / "run")
    expected = convert.load_timm(path, "mobilenetv3_small_050", fold_stem=True)
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["trunk"], expected["params"])
    assert about["pretrained"]["what"] == "timm mobilenetv3_small_050"


def test_the_model_card_names_what_a_student_started_from(run):
    yaml = pytest.importorskip("yaml")
    student, _, about = checkpoint.load_student(run[0])
    about["pretrained"] = {
        "source": "a",
        "what": "student b of teacher c",
        "fingerprint": "0" * 16,
        "licence": "CC BY-NC-SA 4.0",
    }
    about["teacher"]["licence"] = "MIT"
    facts = collect_facts(student, about)
    assert facts["pretrained"] == f"student b of teacher c (a, fingerprint {'0' * 16})"
    assert facts["licence"] == "MIT (teacher); CC BY-NC-SA 4.0 (weights that it started from)"
    card = compose_card("model", facts, about, {"kinds": {}, "failed": {}})
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", facts["licence"])
    assert "\n- Started from: student b of teacher c (a, " in card


def test_arithmetic_of_a_step():
    # 0.391 GMAC forward (experiments/README.md, "What students cost"), three passes, 2 FLOP each
    assert training_flops(models.build("wav2small"), 80_000) == 2 * 3 * 390_967_041


@pytest.mark.parametrize(("form", "kernels"), [("direct", {"direct"}), ("blocks", {"blocks"}), ("auto", {"native", "direct"})])
def test_a_run_records_what_computes_its_convolutions(bank, views, labels, tmp_path, form, kernels):
    settings = config.load("wav2small", [*TINY, f"form={form}"])
    assert Run(config=settings, bank=bank, views=views, labels=labels, workdir=tmp_path).kernel in kernels
    cnn = config.load("cnn14", ["batch_size=6"])
    assert Run(config=cnn, bank=bank, views=views, labels=labels, workdir=tmp_path).kernel == "xla"
