"""kill -9 at random moments of label and train, and several processes at once: the result is that of one unbroken run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from w2s_jax import views as tables
from w2s_jax.labels import Labels

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

    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_train(bank, tmp_path):
    tables.draw(bank, per_clip=4, seconds=(0.3, 0.6), seed=1).save(tmp_path / "views.parquet")
    assert w2s("label", bank.path, tmp_path / "views.parquet", "--teacher", "acoustic", "--out", tmp_path / "labels") == 0
    data = ["--bank", bank.path, "--views", tmp_path / "views.parquet", "--labels", tmp_path / "labels"]
    small = ["--set", "fields.channels=3", "--set", "steps=120", "--set", "eval_every=10", "--set", "batch_size=8"]
    common = ["train", "wav2small", *data, *small, "--workdir"]
    assert w2s(*common, tmp_path / "whole") == 0
    killed = 0
    for trial in range(2):
        log = tmp_path / "broken" / "metrics.jsonl"
        wanted = 5 * (trial + 1)
        died = w2s(
            *common,
            tmp_path / "broken",
            kill_when=lambda log=log, wanted=wanted: log.exists() and log.read_text().count("\n") >= wanted,
            after=random.uniform(0, 0.5),
        )
        killed += died == -signal.SIGKILL
    assert killed >= 1
    assert w2s(*common, tmp_path / "broken") == 0
    one, two = tmp_path / "whole", tmp_path / "broken"
    for name in ("student/model.safetensors", "student/config.json", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name

    def metrics(workdir):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        of_the_machine = re.compile("clips_per_second|.*_share|memory_.*")
        return [{key: value for key, value in line.items() if not of_the_machine.fullmatch(key)} for line in lines]

    assert metrics(one) == metrics(two)


#: Of two processes that label; W2S_KILLS=50 was run as well.
KILLS = int(os.environ.get("W2S_KILLS", "2"))


def contents(directory) -> dict:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def labelling(bank, views, checkpoints, out, *options, devices=1) -> subprocess.Popen:
    """Start w2s label with the small paper teacher."""
    return subprocess.Popen(
        [sys.executable, "-m", "w2s_jax.cli", "label", str(bank.path), str(views), "--teacher", "paper"]
        + ["--checkpoint-dir", str(checkpoints), "--out", str(out), *map(str, options)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(checkpoints / "compiled"),  # most of what a killed process had done so far
        },
    )


def finished(*processes) -> None:
    for process in processes:
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err


def test_batches_devices_and_processes_make_the_same_labels(bank, checkpoints, tmp_path):
    views = tables.draw(bank, per_clip=20, seconds=(0.3, 0.6), seed=1)
    views.save(tmp_path / "views.parquet")
    start = partial(labelling, bank, tmp_path / "views.parquet", checkpoints)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    joined = ["--coordinator", f"localhost:{port}", "--processes", 2, "--process"]
    finished(start(tmp_path / "batched"))
    finished(start(tmp_path / "single", "--batch-size", 1))
    finished(start(tmp_path / "eight devices", "--batch-size", 4, devices=8))
    finished(start(tmp_path / "two processes"), start(tmp_path / "two processes"))
    finished(*(start(tmp_path / "joined", *joined, number, devices=4) for number in (0, 1)))
    expected = Labels.read(tmp_path / "batched", views)
    assert expected.values.std() > 0.01
    for name in ("single", "eight devices", "two processes", "joined"):
        found = Labels.read(tmp_path / name, views)
        np.testing.assert_allclose(found.values, expected.values, atol=1e-5, rtol=0, err_msg=name)
        for member, values in expected.members.items():
            np.testing.assert_allclose(found.members[member], values, atol=1e-5, rtol=0, err_msg=name)
        print(name, "largest difference", np.abs(found.values - expected.values).max())


def test_kills_of_two_processes_that_share_the_labels(bank, checkpoints, tmp_path):
    tables.draw(bank, per_clip=500, eval_per_clip=1, seconds=(0.3, 0.6), seed=1).save(tmp_path / "views.parquet")
    start = partial(labelling, bank, tmp_path / "views.parquet", checkpoints)
    finished(start(tmp_path / "whole"))
    shards = len(list((tmp_path / "whole" / "shards").iterdir()))
    assert shards > 20
    chance = random.Random(0)
    kills = trials = 0
    while kills < KILLS:
        out = tmp_path / f"broken{trials}"
        trials += 1
        while not (out / "labels.json").exists():
            workers = [start(out), start(out)]
            for worker in chance.sample(workers, 2):
                have = len(list((out / "shards").glob("*.parquet")))
                more = chance.randint(0, 2)  # 0: while it starts, or whatever it does then
                while worker.poll() is None and len(list((out / "shards").glob("*.parquet"))) < have + more:
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.5 if more else 3))
                worker.kill()
            for worker in workers:
                _, err = worker.communicate(timeout=100)
                assert worker.returncode in (0, -signal.SIGKILL), err
                kills += worker.returncode == -signal.SIGKILL
        finished(start(out))
        assert contents(out) == contents(tmp_path / "whole")
        assert trials < 20
    print(kills, "kills in", trials, "directories of", shards, "shards")
