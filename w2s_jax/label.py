"""Let a teacher label every view, shard by shard; what is finished stays finished."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from w2s_jax import __version__, labels
from w2s_jax.artifacts import MismatchError, W2SError, locked, read_json, write_json
from w2s_jax.bank import Bank
from w2s_jax.render import render_on_host
from w2s_jax.teachers import Teacher, provenance
from w2s_jax.views import Views


def label(
    bank: Bank,
    views: Views,
    teacher: Teacher,
    out: str | os.PathLike,
    *,
    batch_size: int = 16,
    force: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict:
    """Label all views. Run again after a kill, it keeps the finished shards and makes the rest; the result is the same.

    Args:
        bank, views: what to label; they belong together.
        teacher: who labels.
        out: the directory of the labels.
        batch_size: views of one length that the teacher hears at once.
        force: relabel from nothing where ``out`` holds labels of another teacher or other views.
        progress: called with (views done, views in all, views per second of this run).

    Returns:
        labels.json as a dict.

    Raises:
        MismatchError: views and bank, or labels that are already there, do not belong together.
        W2SError: the teacher gave a value that is not finite; names the view.
    """
    views.check(bank)
    out = Path(out)
    about = {
        "format": "w2s-labels",
        "version": 1,
        "bank": bank.fingerprint,
        "views": views.fingerprint,
        "count": len(views),
        "teacher": provenance(teacher),
        "w2s_jax": __version__,
    }
    with locked(out):
        _claim(out, about, force)
        done, labelled, began = 0, 0, time.perf_counter()
        for number, rows in enumerate(labels.shards(views)):
            if labels.read_shard(out, number, rows, teacher.dimensions) is None:
                values = np.empty((len(rows), len(teacher.dimensions)), np.float32)
                samples, made = views.columns["samples"][rows], 0
                for length in np.unique(samples):
                    places = np.flatnonzero(samples == length)
                    for at in range(0, len(places), batch_size):
                        batch = places[at : at + batch_size]
                        values[batch] = teacher(render_on_host(bank, views, rows[batch]))
                        labelled += len(batch)
                        made += len(batch)
                        if progress:
                            progress(done + made, len(views), labelled / (time.perf_counter() - began))
                broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
                if len(broken):
                    raise W2SError(f"teacher {teacher.name} gave {values[broken[0]]} for view {rows[broken[0]]}: not finite")
                labels.write_shard(out, number, rows, values, teacher.dimensions)
            done += len(rows)
            if progress:
                progress(done, len(views), labelled / (time.perf_counter() - began))
        write_json(out / "labels.json", about)
    return about


def _claim(out: Path, about: dict, force: bool) -> None:
    """Note whose labels these will be before the first one is written, so that another teacher's are never mixed in."""
    plan = out / "plan.json"
    if plan.exists() and not force:
        before = read_json(plan, "label plan")
        differing = [
            f"{what}: {a} there, {b} now"
            for what, a, b in [
                ("views", before.get("views"), about["views"]),
                ("teacher", before.get("teacher", {}).get("name"), about["teacher"]["name"]),
                ("teacher's fingerprint", before.get("teacher", {}).get("fingerprint"), about["teacher"]["fingerprint"]),
            ]
            if a != b
        ]
        if differing:
            raise MismatchError(
                f"{out} holds labels of something else ({'; '.join(differing)}); choose another --out, or --force to relabel"
            )
    elif force:
        for stale in [*(out / "shards").glob("*"), out / "labels.json"]:
            stale.unlink(missing_ok=True)
    write_json(plan, about)
