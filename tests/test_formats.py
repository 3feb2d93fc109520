"""What earlier versions stored is still read: tests/golden/artifacts.py made it, and says by which version."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from w2s_jax import kinds
from w2s_jax.runtime import Predictor

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def values():
    return dict(np.load(GOLDEN / "artifacts.npz"))


@pytest.fixture
def stored(tmp_path):
    """A copy, for opening must not change what is in the repository."""
    return shutil.copytree(GOLDEN / "artifacts", tmp_path / "stored")


def opened(stored):
    from w2s_jax import bank
    from w2s_jax.labels import Labels
    from w2s_jax.views import Views

    drawn = Views.read(stored / "views.parquet")
    return bank.Bank(stored / "bank"), drawn, Labels.read(stored / "labels", drawn)


def test_bank_views_and_labels(stored, values):
    pytest.importorskip("jax")
    from w2s_jax import render

    bank, views, labels = opened(stored)
    assert (len(bank), len(views)) == (6, 8)
    np.testing.assert_allclose(render.render_on_host(bank, views, np.arange(len(views))), values["rendered"], atol=1e-6)
    np.testing.assert_array_equal(labels.values, values["labels"])
    assert labels.dimensions == ("arousal", "dominance", "valence")


@pytest.mark.filterwarnings("ignore:.*was begun")  # with another kernel, platform or JAX, perhaps
def test_a_run_goes_on(stored):
    pytest.importorskip("jax")
    from w2s_jax import config, evaluate, train

    bank, views, labels = opened(stored)
    changes = ["batch_size=4", "fields.channels=2", "scan_steps=1", "steps=6", "eval_every=2"]
    summary = train.train(config.load("wav2small", changes), bank, views, labels, stored / "run")
    assert summary["steps"] == 6
    rows = [json.loads(line) for line in (stored / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if row["kind"] == "validation"]
    assert evaluated == [2, 4, 6]  # 2 and 4 were there
    shutil.rmtree(stored / "run")
    shutil.copytree(GOLDEN / "artifacts" / "run", stored / "run")
    report = evaluate.evaluate(stored / "run", bank, views, labels, split="validation", out=stored / "report")
    assert set(report["teacher"]) == {"arousal", "dominance", "valence", "mean"}


@pytest.mark.parametrize(("kind", "within"), [("fp32", 1e-5), ("chunked", 1e-5), ("int8", 0.02), ("litert", 1e-5)])
def test_a_model_directory(stored, values, kind, within):
    if kind == "litert":
        pytest.importorskip("ai_edge_litert", reason="needs pip install 'w2s-jax[litert]'")
    predicted = list(Predictor(stored / "model", kind=kind)(values["probe"]).values())
    np.testing.assert_allclose(predicted, values[f"predicted_{kind}"], atol=within)
    assert (stored / "model" / kinds.FILES[kind]).is_file()
