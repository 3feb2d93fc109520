"""kill -9 at random moments of label and train: what a rerun leaves equals what an unbroken run leaves."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from w2s_jax import views as tables

pytestmark = pytest.mark.slow


def w2s(*arguments, kill_when=None, after=0.0) -> int:
    """Run a command; with ``kill_when`` (a condition on the disk), kill -9 it ``after`` seconds after that first holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "w2s_jax.cli", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    if kill_when is not None:
        while process.poll() is None and not kill_when():
            time.sleep(0.01)
        time.sleep(after)
        process.kill()
    _, err = process.communicate(timeout=500)
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode


def test_label(bank, tmp_path):
    tables.draw(bank, per_clip=90, seconds=(0.5,), seed=1).save(tmp_path / "views.parquet")
    common = ["label", bank.path, tmp_path / "views.parquet", "--teacher", "acoustic", "--out"]
    assert w2s(*common, tmp_path / "whole") == 0
    shards = len(list((tmp_path / "whole" / "shards").iterdir()))
    assert shards >= 5
    killed = 0
    for trial in range(3):
        done = tmp_path / "broken" / "shards"
        wanted = 1 + trial
        died = w2s(
            *common,
            tmp_path / "broken",
            kill_when=lambda done=done, wanted=wanted: len(list(done.glob("*.parquet"))) >= wanted,
            after=random.uniform(0, 0.5),
        )
        killed += died == -signal.SIGKILL
    assert killed >= 2
    assert w2s(*common, tmp_path / "broken") == 0

    def contents(directory):
        return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}

    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_train(bank, tmp_path):
    tables.draw(bank, per_clip=4, seconds=(0.3, 0.6), seed=1).save(tmp_path / "views.parquet")
    assert w2s("label", bank.path, tmp_path / "views.parquet", "--teacher", "acoustic", "--out", tmp_path / "labels") == 0
    data = ["--bank", bank.path, "--views", tmp_path / "views.parquet", "--labels", tmp_path / "labels"]
    small = ["--set", "fields.channels=3", "--set", "steps=120", "--set", "eval_every=10", "--set", "batch_size=8"]
    common = ["train", "wav2small", *data, *small, "--workdir"]
    assert w2s(*common, tmp_path / "whole") == 0
    killed = 0
    for trial in range(3):
        log = tmp_path / "broken" / "metrics.jsonl"
        wanted = 4 * (trial + 1)
        died = w2s(
            *common,
            tmp_path / "broken",
            kill_when=lambda log=log, wanted=wanted: log.exists() and log.read_text().count("\n") >= wanted,
            after=random.uniform(0, 0.5),
        )
        killed += died == -signal.SIGKILL
    assert killed >= 2
    assert w2s(*common, tmp_path / "broken") == 0
    one, two = tmp_path / "whole", tmp_path / "broken"
    for name in ("student/model.safetensors", "student/config.json", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name

    def metrics(workdir):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "clips_per_second"} for line in lines]

    assert metrics(one) == metrics(two)
