"""experiments/scaling.py by hand arithmetic, and experiments/recipes.py against the configuration's keys."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from w2s_jax import config, models

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_activations_by_hand():
    # 5 s: (80,000 − 64) / 32 + 1 = 2,499 frames of 26 mels, 13 channels: three blocks, halved (rounded up) 1,250 × 13, four
    # blocks and the 1×1 convolution
    assert load("scaling").activations(models.build("wav2small")) == 13 * (3 * 2499 * 26 + 5 * 1250 * 13)


def test_collectives_by_hand():
    scaling = load("scaling")
    assert scaling.collective(scaling.H100, 1, 270_308) == 0
    # 16 × 16 torus: 16 hops to the far end and back, 1 µs each; a start of 3 µs; 2 · 255/256 · 270,308 B at 200 GB/s = 2.69 µs
    assert scaling.collective(scaling.V5E, 256, 270_308) == pytest.approx(32e-6 + 3e-6 + 2.69e-6, rel=1e-3)
    # 2 nodes of 8: 3 hops of 3 µs and 1 of 10 µs, twice; 10 µs; 2 · 15/16 · 270,308 B at 50 GB/s = 10.14 µs
    assert scaling.collective(scaling.H100, 16, 270_308) == pytest.approx(38e-6 + 10e-6 + 10.14e-6, rel=1e-3)


def test_tables_by_hand():
    report = load("scaling").report(size=2, per_chip=64, share=0.5)
    # 100,000 h · 3,600 / 5 s = 72 M clips, by 64: 1,125,000 steps; 100,000 h · 3,600 · 16,000 · 2 B = 11.52 TB, by 256: 45 GB
    assert "| 1 H100 | 64 |" in report
    assert "| 1,125,000 |" in report
    assert "| 256 v5e | 45 GB | 16 GB | host |" in report
    written = (EXPERIMENTS / "scaling.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in report.splitlines() if line.startswith("|") and line not in written] == []


@pytest.mark.parametrize("variant", load("recipes").VARIANTS)
def test_recipes_set_what_the_configuration_knows(variant):
    recipes, known = load("recipes"), config.default()
    assert set(recipes.VARIANTS[variant]) <= set(known)
    found = recipes.get_config(variant)
    models.build(found.student, **found.fields)
    assert found.eval_every <= found.steps
