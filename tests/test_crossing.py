"""Runs and students cross over between this interpreter's JAX and another's, which W2S_OTHER_PYTHON names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from crossing import STEPS

from w2s_jax import teachers
from w2s_jax.labelling import label
from w2s_jax.runtime import Predictor
from w2s_jax.views import draw

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def other() -> str:
    given = os.environ.get("W2S_OTHER_PYTHON")
    if not given:
        pytest.skip("W2S_OTHER_PYTHON names no interpreter with another JAX")
    return os.path.abspath(given)


@pytest.fixture(scope="module")
def data(bank, tmp_path_factory) -> Path:
    """A bank, views of one length (less to compile) and labels, as both interpreters read them."""
    out = tmp_path_factory.mktemp("data")
    (out / "bank").symlink_to(bank.path)
    views = draw(bank, per_clip=2, eval_per_clip=2, seconds=(0.4,), seed=3)
    views.save(out / "views.parquet")
    label(bank, views, teachers.load("acoustic"), out / "labels")
    return out


def crossing(python: str, task: str, place: Path, *arguments: object, code: int = 0) -> str:
    """Run crossing.py; returns the version of JAX that it ran with."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),  # runs of one version compile once
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [python, HERE / "crossing.py", task, place, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout.split()[0]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An unbroken run of this interpreter."""
    out = tmp_path_factory.mktemp("whole")
    crossing(sys.executable, "train", data, out)
    return out


@pytest.fixture(scope="module")
def crossed(other, data, tmp_path_factory) -> dict[str, Path]:
    """Runs that one interpreter began and the other ended, by who ended them."""
    out = tmp_path_factory.mktemp("crossed")
    versions = set()
    for name, (begins, ends) in {"other": (sys.executable, other), "this": (other, sys.executable)}.items():
        versions.add(crossing(begins, "train", data, out / name, 6, code=143))
        versions.add(crossing(ends, "train", data, out / name))
    assert len(versions) == 2, f"both interpreters have jax {versions}"
    print("crossed between jax", " and ".join(sorted(versions)))
    return {name: out / name for name in ("other", "this")}


@pytest.mark.parametrize("ended_by", ["other", "this"])
def test_a_run_goes_on_under_another_jax(ended_by, crossed, whole):
    found, expected = read(crossed[ended_by]), read(whole)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["step"] for line in found if line["kind"] == "train"] == list(range(1, STEPS + 1))
    # two compilers differ a little; a state that came over incomplete, by orders of magnitude more
    for key in ("loss", "ccc/mean"):
        one, two = ([line[key] for line in lines if key in line] for lines in (found, expected))
        print(f"ended by {ended_by}: largest difference of {key}: {np.abs(np.subtract(one, two)).max():.1e}")
        np.testing.assert_allclose(one, two, atol=2e-3)


def read(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_student_of_another_jax_is_exported_here(other, crossed, tmp_path):
    for package in ("tensorflow", "tf2onnx"):
        pytest.importorskip(package, reason="needs pip install 'w2s-jax[export]'")
    from w2s_jax.export import export_student

    crossing(other, "predict", crossed["other"], tmp_path / "flax.npz")
    export_student(crossed["other"], tmp_path / "model")
    predictor, flax = Predictor(tmp_path / "model"), np.load(tmp_path / "flax.npz")
    for wave, expected in zip(flax["waves"], flax["logits"], strict=True):
        found = np.array(list(predictor(wave, 16_000).values()))
        print("ONNX here against Flax there:", np.abs(found - expected).max())
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
