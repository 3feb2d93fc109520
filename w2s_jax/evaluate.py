"""How close a student is to its teacher, and to people: CCC per dimension with confidence intervals, and a picture."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from w2s_jax import DIMENSIONS, SAMPLING_RATE, checkpoint, metrics, plots
from w2s_jax.bank import Bank
from w2s_jax.devices import computing
from w2s_jax.errors import MismatchError, UsageError
from w2s_jax.files import write_json
from w2s_jax.labels import Labels
from w2s_jax.render import render_on_host
from w2s_jax.runtime import Predictor
from w2s_jax.views import Views, batch_by_length, draw

_BATCH = 32

#: With fewer clips there is no confidence interval: the bootstrap's 95 % intervals hold the true CCC in 25 to 36 % of cases
#: with 2 clips, 78 % with 5, 86 % with 10, and 92 % with 30 (300 normal samples each, CCC 0.5 and 0.9).
FEWEST_CLIPS = 10

#: With fewer clips the interval is known to be too narrow, and a note says so.
FEW_CLIPS = 30

#: Shorter clips (in samples: 50 ms) are left out when teachers are evaluated; every teacher accepts this length.
SHORTEST = 800


@computing()
def predict_views(
    infer: Callable[[np.ndarray], np.ndarray], bank: Bank, views: Views, rows: np.ndarray, devices: int = 1
) -> np.ndarray:
    """Run a network over some views, in batches of equal length.

    Args:
        infer: float32 [B, T] → [B, D]; always called with the same B, so that it compiles once per length.
        bank, views: what to render.
        rows: which views, int64 [n].
        devices: how many devices share a batch, which is so many times larger.

    Returns:
        float64 [n, D].
    """
    batch_size = _BATCH * devices
    batches = list(batch_by_length(views.columns["samples"][rows], batch_size))
    parts = []
    for batch in batches:
        waves = render_on_host(bank, views, rows[np.resize(batch, batch_size)])
        parts.append(np.asarray(infer(waves), np.float64)[: len(batch)])
    out = np.concatenate(parts)
    out[np.concatenate(batches)] = out.copy()
    return out


def load(path: str | os.PathLike) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...], dict]:
    """A run or student directory (evaluated in Flax) or an exported model (evaluated in ONNX Runtime).

    Returns:
        A function float32 [B, T] → [B, D], the names of the D outputs, and the teacher's provenance.

    Raises:
        UsageError: there is nothing that can be evaluated.
    """
    path = Path(path)
    if path.suffix == ".onnx" or (path / "model.onnx").exists():
        predictor = Predictor(path)

        def run(waves: np.ndarray) -> np.ndarray:
            return np.array([list(predictor(wave).values()) for wave in waves])

        return run, tuple(predictor.dimensions), {"name": predictor.metadata.get("teacher")}
    if not path.exists():
        raise UsageError(f"no run and no model at {path}: no such directory")
    student, variables, config = checkpoint.load_student(path)
    return jax.jit(partial(student.apply, variables)), tuple(config["dimensions"]), config["teacher"]


@computing()
def evaluate(
    path: str | os.PathLike,
    bank: Bank,
    views: Views | None = None,
    labels: Labels | None = None,
    *,
    split: str = "test",
    out: str | os.PathLike | None = None,
    seed: int = 0,
) -> dict:
    """CCC of a student with its teacher's labels, and with people's ratings where the bank has them.

    Confidence intervals (95 %) are bootstrapped over clips, because views of one clip are not independent; below
    ``FEWEST_CLIPS`` there is none, and ``low`` and ``high`` are None. Ratings belong to clips: the prediction for a clip is the
    mean over its views.

    Args:
        path: a run, a student or a model.
        bank: the audio.
        views: default: clean views drawn from the bank, 5 s at most.
        labels: the teacher's labels of these views; without them only ratings are compared.
        split: train, validation or test.
        out: directory for eval_SPLIT.json and eval_SPLIT.png; default: none are written.
        seed: of the bootstrap.

    Returns:
        ``{"split", "views", "clips", "notes": [warnings about small samples], "teacher": {dimension: {"ccc", "low",
        "high"}, "mean": …} | None, "human": … | None}``

    Raises:
        MismatchError: the labels have other dimensions than the student, or another bank's views.
        UsageError: nothing to compare with, or the split is empty or has only one view.
    """
    if views is None:
        views = draw(bank, per_clip=1, eval_per_clip=1, mix=0.0, gain_db=(0.0, 0.0))
    views.check(bank)
    infer, dimensions, teacher = load(path)
    if labels is not None and labels.dimensions != dimensions:
        raise MismatchError(f"the student puts out {', '.join(dimensions)}; the labels are {', '.join(labels.dimensions)}")
    rated = [name for name in dimensions if name in DIMENSIONS and np.isfinite(bank.clips[name]).any()]
    if labels is None and not rated:
        raise UsageError("nothing to compare with: give --views and --labels, or a bank whose corpus has ratings")
    rows = views.where(split)
    if not len(rows):
        raise UsageError(f"the views have no {split!r} split; they have {', '.join(sorted(set(views.columns['split'])))}")
    if len(rows) < 2:
        raise UsageError(f"the {split!r} split has one view; a CCC compares how values vary, and needs two at least")
    predicted = predict_views(infer, bank, views, rows)
    clips = views.columns["clip"][rows]
    report = {
        "path": str(path),
        "split": split,
        "views": len(rows),
        "clips": len(np.unique(clips)),
        "student_teacher": teacher,
        "notes": [],
        "teacher": None,
        "human": None,
    }
    panels = []
    if labels is not None:
        target = labels.values[rows].astype(np.float64)
        report["teacher"] = _scores(predicted, target, clips, dimensions, seed)
        report["notes"] += _notes(report["clips"], "clips")
        panels += [(f"teacher ({labels.about['teacher']['name']})", dimensions, predicted, target, report["teacher"])]
    if rated:
        ids, first = np.unique(clips, return_inverse=True)
        means = np.stack([np.bincount(first, predicted[:, dimensions.index(d)]) / np.bincount(first) for d in rated], axis=1)
        ratings = np.stack([bank.clips[name][ids] for name in rated], axis=1).astype(np.float64)
        known = np.isfinite(ratings).all(axis=1)
        if known.sum() >= 2:
            report["human"] = _scores(means[known], ratings[known], ids[known], rated, seed)
            panels += [("people's ratings", rated, means[known], ratings[known], report["human"])]
            report["notes"] += _notes(int(known.sum()), "rated clips")
        else:
            report["notes"].append(f"{known.sum()} clips have ratings: no comparison with people; a CCC needs two at least")
    if not panels:
        raise UsageError(f"the {split} split has ratings of {known.sum()} clips; a CCC needs two at least, or give --labels")
    if out is not None:
        write_json(Path(out) / f"eval_{split}.json", report)
        plots.scatter(Path(out) / f"eval_{split}.png", panels, f"{Path(path).name}, {split} split")
    return report


@computing()
def evaluate_teacher(
    teacher: Callable[[np.ndarray], np.ndarray],
    bank: Bank,
    *,
    split: str = "test",
    batch_size: int = 8,
    longest: float = 30.0,
    out: str | os.PathLike | None = None,
    seed: int = 0,
    progress: Callable[..., None] | None = None,
) -> dict:
    """CCC of a teacher with people's ratings, on whole clips.

    A Transformer gets batches of clips of nearly equal length, padded to the next second and masked, so that its values are
    those of the clip alone; every other teacher gets one clip at a time.

    Args:
        teacher: from ``teachers.load``.
        bank: of a corpus that has ratings.
        split: train, validation or test.
        batch_size: clips in a batch, per device.
        longest: longer clips are cut to that many seconds.
        out: directory for teacher_SPLIT.json and teacher_SPLIT.png; default: none are written.
        seed: of the bootstrap.
        progress: called with (clips done, clips in all).

    Returns:
        ``{"teacher", "split", "clips", "cut", "notes", "human": {dimension: {"ccc", "low", "high"}, "mean": …}}``; rated clips
        below 50 ms are left out.

    Raises:
        UsageError: the split has no ratings of the teacher's dimensions.
    """
    names = teacher.dimensions
    if not all(name in DIMENSIONS for name in names):
        raise UsageError(f"teacher {teacher.name} puts out {', '.join(names)}; people rated {', '.join(DIMENSIONS)}")
    ratings = np.stack([bank.clips[name] for name in names], axis=1).astype(np.float64)
    clips = np.flatnonzero(
        (bank.clips["split"] == split) & np.isfinite(ratings).all(axis=1) & (bank.clips["samples"] >= SHORTEST)
    )
    if len(clips) < 2:
        raise UsageError(
            f"the {split} split has {len(clips)} rated clips; a CCC needs two at least: choose another --split, or build the "
            "bank from a corpus with ratings (--corpus csv, msp-podcast or iemocap)"
        )
    limit = round(longest * SAMPLING_RATE)
    samples = np.minimum(bank.clips["samples"][clips], limit)
    predicted, done = np.empty((len(clips), len(names))), 0
    # teachers.attribute is out of reach: training imports this module, and does not know teachers
    masks, devices = getattr(teacher, "masks", False), getattr(teacher, "devices", 1)
    widths = -(-samples // SAMPLING_RATE) * SAMPLING_RATE if masks else samples
    for batch in batch_by_length(widths, batch_size * devices if masks else 1):
        waves = np.zeros((len(batch), widths[batch[0]]), np.float32)
        for wave, clip, length in zip(waves, clips[batch], samples[batch], strict=True):
            wave[:length] = bank.wave(clip, length)
        predicted[batch] = teacher(waves, samples[batch]) if masks else teacher(waves)
        done += len(batch)
        if progress:
            progress(done, len(clips))
    report = {
        "teacher": teacher.name,
        "split": split,
        "clips": len(clips),
        "cut": int((bank.clips["samples"][clips] > limit).sum()),
        "notes": _notes(len(clips), "rated clips"),
        "human": _scores(predicted, ratings[clips], clips, names, seed),
    }
    if out is not None:
        write_json(Path(out) / f"teacher_{split}.json", report)
        panel = ("people's ratings", names, predicted, ratings[clips], report["human"])
        plots.scatter(Path(out) / f"teacher_{split}.png", [panel], f"{teacher.name}, {split} split", "teacher")
    return report


def _scores(predicted: np.ndarray, target: np.ndarray, groups: np.ndarray, names, seed: int) -> dict:
    """CCC per dimension with its interval, which is None where there are too few groups (clips) for one."""
    score = metrics.ccc(predicted, target)
    ends = [[None] * len(names)] * 2
    if len(np.unique(groups)) >= FEWEST_CLIPS:
        ends = [[round(float(x), 4) for x in end] for end in metrics.bootstrap_ccc(predicted, target, groups=groups, seed=seed)]
    scores = {
        name: {"ccc": round(float(value), 4), "low": low, "high": high}
        for name, value, low, high in zip(names, score, *ends, strict=True)
    }
    return {**scores, "mean": round(float(score.mean()), 4)}


def _notes(clips: int, what: str) -> list[str]:
    """Warnings about a CCC of few clips."""
    if clips < FEWEST_CLIPS:
        return [f"{clips} {what} are too few for a confidence interval (it takes {FEWEST_CLIPS}); the CCC itself says little"]
    if clips < FEW_CLIPS:
        return [f"with {clips} {what} the 95 % intervals are too narrow: they hold about 9 times in 10"]
    return []
