"""Evaluation against teachers and people, and what few clips allow to say."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from w2s_jax import checkpoint, evaluate, metrics, plots
from w2s_jax import views as tables
from w2s_jax.errors import UsageError
from w2s_jax.evaluate import predict_views


def test_evaluation_against_teacher_and_people(run, bank, views, labels, tmp_path):
    report = evaluate.evaluate(run[0], bank, views, labels, out=tmp_path)
    rows = views.where("test")
    student, variables, _ = checkpoint.load_student(run[0])
    predicted = predict_views(jax.jit(lambda waves: student.apply(variables, waves)), bank, views, rows)
    expected = metrics.ccc(predicted, labels.values[rows])
    for at, name in enumerate(labels.dimensions):
        score = report["teacher"][name]
        assert abs(score["ccc"] - expected[at]) < 1e-4
        assert (score["low"], score["high"]) == (None, None)  # four clips are too few
    assert set(report["human"]) == {"arousal", "dominance", "valence", "mean"}
    assert (tmp_path / "eval_test.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "eval_test.json").read_text()) == report


def test_few_clips_have_no_interval_and_a_note(tmp_path):
    random = np.random.default_rng(0)
    target = random.random((60, 2))
    predicted = target + 0.1 * random.random((60, 2))
    for clips, note in (
        (2, "2 clips are too few for a confidence"),
        (9, "9 clips are too few"),
        (10, "9 times in 10"),
    ):
        scores = evaluate._scores(predicted, target, np.arange(60) % clips, ("a", "b"), 0)
        assert [note in text for text in evaluate._notes(clips, "clips")] == [True]
        for name in ("a", "b"):
            ends = scores[name]["low"], scores[name]["high"]
            assert ends == (None, None) if clips < 10 else ends[0] <= scores[name]["ccc"] <= ends[1]
        panel = ("teacher", ("a", "b"), predicted, target, scores)
        plots.scatter(tmp_path / f"{clips}.png", [panel], "few")
    assert evaluate._notes(30, "clips") == []


def test_one_view_has_no_ccc(bank, views, labels, tmp_path, monkeypatch):
    one = np.concatenate([views.where("train"), views.where("test")[:1]])
    few = tables.Views({name: column[one] for name, column in views.columns.items()}, views.about)
    monkeypatch.setattr(evaluate, "load", lambda path: (lambda waves: np.zeros((len(waves), 3)), labels.dimensions, {}))
    with pytest.raises(UsageError, match="the 'test' split has one view; a CCC compares how values vary"):
        evaluate.evaluate(tmp_path, bank, few)
    report = evaluate.evaluate(tmp_path, bank, views, labels)
    assert report["notes"][0].startswith("4 clips are too few for a confidence interval")
