"""One run on one device, on eight, under pmap, and in two processes; and what happens when one of two processes ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

#: Steps as those of a run in earnest: the published student, warm-up, decay, mixtures, two lengths, crops. The learning rate is
#: small: rounding flips a ReLU or a maximum here and there, which in so small a batch moves the gradient by a thousandth, and
#: Adam makes whole steps of small gradients; at 3e-4 losses are 5e-5 apart after 17 steps. One form, because a trunk that is
#: compiled natively rounds otherwise.
SETTINGS = "steps=20 batch_size=16 data_shards=8 learning_rate=3e-5 crop=0.7 eval_every=4 log_every=1 form=direct"


def start(data, workdir, *options, devices=1) -> subprocess.Popen:
    bank, views, labels, compiled = data
    command = [sys.executable, "-m", "w2s_jax.cli", "train", "wav2small", "--bank", bank, "--views", views, "--labels", labels]
    command += [part for setting in SETTINGS.split() for part in ("--set", setting)]
    return subprocess.Popen(
        [*map(str, command), "--workdir", str(workdir), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
        },
    )


def two(data, workdir) -> list[subprocess.Popen]:
    """Two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    joined = ["--coordinator", f"localhost:{port}", "--processes", 2, "--process"]
    return [start(data, workdir, *joined, number, devices=4) for number in (0, 1)]


def ended(*processes) -> list[tuple[int, str, str]]:
    said = [process.communicate(timeout=500) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def steps(workdir, kind="train") -> list[dict]:
    return [line for text in (workdir / "metrics.jsonl").read_text().splitlines() if (line := json.loads(text))["kind"] == kind]


def student(workdir) -> dict[str, np.ndarray]:
    return load_file(workdir / "student" / "model.safetensors")


@pytest.fixture(scope="session")
def data(bank, views, labels_path, tmp_path_factory):
    root = tmp_path_factory.mktemp("parallel")
    views.save(root / "views.parquet")
    return bank.path, root / "views.parquet", labels_path, root / "compiled"


@pytest.fixture(scope="session")
def unbroken(data, tmp_path_factory):
    """Runs of the same twenty steps by one device, eight in one program, eight under pmap, and two processes of four."""
    root = tmp_path_factory.mktemp("runs")
    one = start(data, root / "one")
    jit = start(data, root / "jit", devices=8)
    for code, _, err in ended(one, jit):
        assert code == 0, err
    pmap = start(data, root / "pmap", "--parallel", "pmap", devices=8)
    for code, _, err in ended(pmap, *two(data, root / "two")):
        assert code == 0, err
    return root


@pytest.mark.parametrize("way", ["jit", "pmap", "two"])
def test_one_device_is_eight_is_two_processes(unbroken, way):
    one, many = steps(unbroken / "one"), steps(unbroken / way)
    assert len(one) == len(many) == 20
    for figure, tolerance in (("loss", 1e-5), ("gradient_norm", 5e-3), ("parameter_norm", 1e-5)):
        expected, found = (np.array([line[figure] for line in lines]) for lines in (one, many))
        print(way, figure, np.abs(found / expected - 1).max())
        # metrics.jsonl has six decimals
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-6, err_msg=figure)
    expected, found = student(unbroken / "one"), student(unbroken / way)
    for name, values in expected.items():
        # biases began at 0 and are all but there still: 0.1 is what a parameter is like
        size = max(np.linalg.norm(values), 0.1 * np.sqrt(values.size))
        print(way, name, np.linalg.norm(found[name] - values) / size)
        # running statistics carry the rounding of 20 batches' moments
        assert np.linalg.norm(found[name] - values) <= (1e-5 if name.startswith("params") else 1e-4) * size, name
    scores, others = (steps(unbroken / name, "validation") for name in ("one", way))
    np.testing.assert_allclose([s["ccc/mean"] for s in others], [s["ccc/mean"] for s in scores], atol=1e-5)


def wait_for(workdir, step, *processes) -> None:
    """Until a run has a checkpoint of that step, or a later one."""
    deadline = time.monotonic() + 300
    while not any(int(path.name) >= step for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()):
        assert all(process.poll() is None for process in processes), ended(*processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_killed_and_terminated_end_bit_for_bit(data, unbroken, tmp_path):
    # one of them is killed: the other ends by itself, and says why
    first, second = two(data, tmp_path)
    wait_for(tmp_path, 4, first, second)
    second.kill()
    (code, _, said), (killed, *_) = ended(first, second)
    assert killed == -signal.SIGKILL
    assert code != 0
    assert re.search("lost the others|distributed service detected fatal errors|another task died", said), said
    # one of them is asked to end: both do, after the same step
    first, second = two(data, tmp_path)
    wait_for(tmp_path, 8, first, second)
    first.send_signal(signal.SIGTERM)
    stops = set()
    for code, _, said in ended(first, second):
        assert code == 128 + signal.SIGTERM, said
        stops.add(re.search(r"stopped by SIGTERM at step (\d+)", said).group(1))
    assert len(stops) == 1
    for code, _, said in ended(*two(data, tmp_path)):
        assert code == 0, said
    expected = student(unbroken / "two")
    for name, values in student(tmp_path).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    kept = ("step", "kind", "loss", "ccc/mean", "gradient_norm")
    for kind in ("train", "validation"):
        one, other = ([[line.get(key) for key in kept] for line in steps(path, kind)] for path in (unbroken / "two", tmp_path))
        assert one == other
