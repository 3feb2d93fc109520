"""experiments/accelerator_speed.py: its bounds and its table, and all of it in small on a CPU."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "accelerator_speed.py"
PEER = Path(__file__).parents[2] / "shared" / "peers" / "torch_wav2small.py"
SMALL = ["--students", "wav2small", "--batch", "4", "--seconds", "0.2", "--steps", "2", "--runs", "2", "--bandwidth", "100"]


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("accelerator_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bounds_are_bytes_over_bandwidth(speed):
    # what CUDA and TPU runtimes call devices; makers' data sheets
    kinds = {"NVIDIA H100 80GB HBM3": 3350, "NVIDIA H100 PCIe": 2000, "NVIDIA A100-SXM4-40GB": 1555, "TPU v5 lite": 819}
    assert {kind: speed.bandwidth(kind) for kind in kinds} == kinds
    assert speed.bandwidth("cpu") is None
    assert speed.bounds(1040, 5) == {"bfloat16": 10_000, "float32": 5_000, "fused bfloat16": 16_250}
    assert speed.bounds(1040, 2.5)["bfloat16"] == 20_000


def test_what_does_not_run_is_in_the_table(speed, capsys):
    def broken():
        raise MemoryError("too little | of it\nand more")

    make = {"wav2small bfloat16 step": (2, lambda: lambda: time.sleep(0.02)), "torch wav2small tf32 eager": (1, broken)}
    first, second = speed.measure(make, runs=3, batch=10)
    assert 0 < first["clips_per_second"] <= 1000  # 2 steps of 10 clips in 20 ms, and what sleeping takes longer
    assert second == {"name": "torch wav2small tf32 eager", "error": "MemoryError: too little | of it"}
    *_, ours, theirs = speed.table([first | {"clips_per_second": 900.0}, second], {"bfloat16": 1000}).splitlines()
    assert ours.startswith("| wav2small bfloat16 step | 900.0 | ")
    assert ours.endswith(" | 90.0 % |")
    assert theirs == "| torch wav2small tf32 eager | MemoryError: too little / of it | | |"
    assert "tf32 eager: MemoryError" in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_on_a_cpu(speed, tmp_path):
    speed.main([*SMALL, "--dtypes", "bfloat16", "--out", str(tmp_path / "speed.json")])  # float32: beside the peer, below
    result = json.loads((tmp_path / "speed.json").read_text())
    assert len(result["rows"]) == 2 * 2  # forms, step and scan
    assert all(row["clips_per_second"] > 0 for row in result["rows"])


@pytest.mark.torch
def test_it_runs_the_torch_peer(speed):
    pytest.importorskip("torch")
    if not PEER.exists():
        pytest.skip(f"no PyTorch peer at {PEER}")
    small = [*SMALL, "--steps", "0", "--dtypes", "float32", "--forms", "direct", "--no-compile"]
    rows = speed.main([*small, "--peer", str(PEER)])["rows"]
    assert [row["name"] for row in rows[1:]] == [f"torch wav2small {kind} eager" for kind in ("float32", "tf32", "bfloat16")]
    assert all(row["clips_per_second"] > 0 for row in rows)
