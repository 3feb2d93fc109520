"""experiments/variants.py: its fronts, its variants, its table and its picture."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from w2s_jax import config, models

SCRIPT = Path(__file__).parents[1] / "experiments" / "variants.py"


@pytest.fixture(scope="module")
def variants():
    spec = importlib.util.spec_from_file_location("variants", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("cost", "score", "front"),
    [
        ([1, 2, 3], [0.1, 0.2, 0.3], [0, 1, 2]),  # each buys something
        ([3, 2, 1], [0.1, 0.2, 0.3], [2]),  # the cheapest is the best
        ([3, 1, 2], [0.6, 0.4, 0.5], [1, 2, 0]),  # by rising cost
        ([1, 1, 2], [0.4, 0.5, 0.5], [1]),  # no more for the same, no less for more
        ([1, 1, 2], [0.5, 0.5, 0.6], [0, 1, 2]),  # equals stay
        ([7], [-0.2], [0]),
    ],
)
def test_pareto(variants, cost, score, front):
    assert variants.pareto(cost, score) == front


def test_every_variant_is_a_student(variants):
    seen = set()
    for name in variants.VARIANTS:
        settings = config.load(f"{SCRIPT}:{name}")
        student = models.build(settings.student, **settings.fields)
        assert dict(settings.fields) == variants.VARIANTS[name]
        assert student not in seen  # no variant is another one's twin
        seen.add(student)
    assert models.build("wav2small") in seen


def test_table_and_picture(variants, tmp_path):
    rows = []
    for at, name in enumerate(variants.VARIANTS):
        score = 0.6 + 0.01 * at
        rows.append(
            {
                "variant": name, "fields": {}, "parameters": 1000 * (at + 1), "macs": 10**8 * (at + 1), "bytes": 50_000 + at,
                "milliseconds": 5.0 - 0.1 * at, "p95_milliseconds": 6.0, "mean": score, "low": score - 0.1,
                "high": score + 0.05,
                "ccc": {"sig": {"ccc": score, "low": score - 0.1, "high": score + 0.05}},
                "pareto": {"macs": True, "bytes": True, "milliseconds": at == len(variants.VARIANTS) - 1},
            }
        )  # fmt: skip
    table = variants.save(rows, tmp_path)
    assert table.splitlines()[2] == (
        "| published | 1,000 | 100 | 50 | 5.00 | 0.600 | 0.600 [0.500, 0.650] | MACs, bytes |"
    )  # fmt: skip
    assert len(table.splitlines()) == 2 + len(rows)
    assert json.loads((tmp_path / "variants.json").read_text())["variants"] == rows
    with open(tmp_path / "variants.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["variant"] for row in read] == list(variants.VARIANTS)
    assert float(read[1]["sig_low"]) == rows[1]["ccc"]["sig"]["low"]
    assert (tmp_path / "variants.png").read_bytes().startswith(b"\x89PNG")
