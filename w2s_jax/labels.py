"""Labels: what a teacher said of every view, in parquet shards with provenance."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from w2s_jax.artifacts import MismatchError, UsageError, W2SError, read_json, write_atomic
from w2s_jax.views import Views

#: Views in a shard: what a kill can cost at most.
SHARD_VIEWS = 256


@dataclass(frozen=True)
class Labels:
    """Labels of all views of a table.

    Attributes:
        dimensions: names of the outputs.
        values: float32 [views, dimensions], row i belongs to view i.
        members: the same of every teacher whose mean ``values`` is, by name; empty for a single teacher.
        about: labels.json: the teacher (name, fingerprint, licence, stand_in), fingerprints of bank and views.
    """

    dimensions: tuple[str, ...]
    values: np.ndarray
    members: dict[str, np.ndarray]
    about: dict


def columns(teacher: dict) -> tuple[str, ...]:
    """The columns of a shard after ``view``, from a teacher's provenance: its dimensions, then those of each member."""
    members = [f"{member['name']}_{name}" for member in teacher.get("members", ()) for name in teacher["dimensions"]]
    return (*teacher["dimensions"], *members)


def shards(views: Views) -> list[np.ndarray]:
    """The rows of each shard. Views of one length stand together, so that a batch never mixes lengths."""
    order = np.argsort(views.columns["samples"], kind="stable")
    return [order[at : at + SHARD_VIEWS] for at in range(0, len(order), SHARD_VIEWS)]


def shard_path(directory: Path, number: int) -> Path:
    """Where shard ``number`` lies."""
    return directory / "shards" / f"{number:05d}.parquet"


def write_shard(directory: Path, number: int, rows: np.ndarray, values: np.ndarray, names: tuple[str, ...]) -> None:
    """Write one shard: rows int64 [n] and values float32 [n, names]."""
    table = pa.table({"view": rows, **{name: values[:, at] for at, name in enumerate(names)}})
    write_atomic(shard_path(directory, number), lambda path: pq.write_table(table, path))


def read_shard(directory: Path, number: int, rows: np.ndarray, names: tuple[str, ...]) -> np.ndarray | None:
    """The values of one shard, float32 [n, names]; None if it is missing, damaged or not of these rows."""
    try:
        table = pq.read_table(shard_path(directory, number))
        values = np.stack([table[name].to_numpy() for name in names], axis=1)
        whole = np.array_equal(table["view"].to_numpy(), rows) and values.dtype == np.float32 and np.isfinite(values).all()
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    return values if whole else None


def read(directory: str | os.PathLike, views: Views) -> Labels:
    """Read the labels of a table of views.

    Raises:
        UsageError: there are no labels.
        MismatchError: they belong to other views.
        W2SError: a shard is missing or damaged (names it, and the command that makes only that one again).
    """
    directory = Path(directory)
    about = read_json(directory / "labels.json", "labels")
    if about.get("format") != "w2s-labels":
        raise UsageError(f"{directory / 'labels.json'} does not describe labels of w2s_jax")
    if about["views"] != views.fingerprint:
        raise MismatchError(
            f"the labels at {directory} belong to views {about['views']}, but these are views {views.fingerprint}; "
            "label these views (w2s label) or give the views that were labelled"
        )
    dimensions, names = tuple(about["teacher"]["dimensions"]), columns(about["teacher"])
    values = np.full((len(views), len(names)), np.nan, np.float32)
    bad = []
    for number, rows in enumerate(shards(views)):
        shard = read_shard(directory, number, rows, names)
        if shard is None:
            bad.append(shard_path(directory, number).name)
        else:
            values[rows] = shard
    if bad:
        raise W2SError(
            f"{len(bad)} label shards at {directory} are missing or damaged (first: {bad[0]}); "
            "run the same w2s label command again: it makes only those"
        )
    own, *others = np.split(values, len(names) // len(dimensions), axis=1)
    members = {member["name"]: value for member, value in zip(about["teacher"].get("members", ()), others, strict=True)}
    return Labels(dimensions, own, members, about)
