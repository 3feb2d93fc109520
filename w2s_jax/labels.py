"""Labels: a teacher's values for every view, in parquet shards with provenance."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from w2s_jax.bank import read_table
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.files import fingerprint, read_json, write_atomic
from w2s_jax.views import RENDERING, Views

#: Views in a shard; a kill loses at most so many labels.
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

    @classmethod
    def read(cls, directory: str | os.PathLike, views: Views) -> Labels:
        """Read the labels of a table of views.

        Raises:
            UsageError: there are no labels.
            MismatchError: they belong to other views, or to views rendered in another way, or have an unknown version.
            W2SError: labels.json or a shard is missing or damaged (names it, and the command that makes only that one again).
        """
        directory = Path(directory)
        try:
            about = check(read_json(directory / "labels.json", "labels"), directory / "labels.json")
        except (UsageError, MismatchError):
            raise
        except W2SError as error:
            raise W2SError(f"{error}; run the same w2s label command again: it writes this file anew") from error
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
        return cls(dimensions, own, members, about)


def columns(teacher: dict) -> tuple[str, ...]:
    """The columns of a shard after ``view``, from a teacher's provenance: its dimensions, then those of each member."""
    members = [f"{member['name']}_{name}" for member in teacher.get("members", ()) for name in teacher["dimensions"]]
    return (*teacher["dimensions"], *members)


def shards(views: Views) -> list[np.ndarray]:
    """The rows of each shard, in order of length, so that shards have few lengths and batches are full."""
    order = np.argsort(views.columns["samples"], kind="stable")
    return [order[at : at + SHARD_VIEWS] for at in range(0, len(order), SHARD_VIEWS)]


def shard_path(directory: Path, number: int) -> Path:
    """The file of shard ``number``."""
    return directory / "shards" / f"{number:05d}.parquet"


def write_shard(directory: Path, number: int, rows: np.ndarray, values: np.ndarray, names: tuple[str, ...]) -> None:
    """Write one shard: rows int64 [n] and values float32 [n, names], with a checksum of both."""
    table = pa.table({"view": rows, **{name: values[:, at] for at, name in enumerate(names)}})
    table = table.replace_schema_metadata({"checksum": _checksum(rows, values, names)})
    write_atomic(shard_path(directory, number), lambda path: pq.write_table(table, path))


def read_shard(directory: Path, number: int, rows: np.ndarray, names: tuple[str, ...]) -> np.ndarray | None:
    """The values of one shard, float32 [n, names]; None if it is missing, damaged or not of these rows."""
    try:
        table = read_table(shard_path(directory, number))
        values = np.stack([table[name].to_numpy() for name in names], axis=1)
        checksum = (table.schema.metadata or {}).get(b"checksum")  # None: written before there were any
        if checksum is not None and checksum.decode() != _checksum(table["view"].to_numpy(), values, names):
            return None
        whole = np.array_equal(table["view"].to_numpy(), rows) and values.dtype == np.float32 and np.isfinite(values).all()
    except Exception:  # damaged bytes make pyarrow raise almost anything
        return None
    return values if whole else None


def _checksum(rows: np.ndarray, values: np.ndarray, names: tuple[str, ...]) -> str:
    return fingerprint(list(names), np.asarray(rows, np.int64).tobytes(), np.asarray(values, np.float32).tobytes())


def signed(about: dict) -> dict:
    """``about`` with a checksum of all its other entries."""
    return {**about, "checksum": fingerprint({key: value for key, value in about.items() if key != "checksum"})}


def check(about: dict, path: Path) -> dict:
    """Check the content of labels.json or plan.json.

    Raises:
        UsageError: ``path`` describes something else.
        MismatchError: an unknown version, or the teacher labelled views that were rendered in another way.
        W2SError: it is damaged or was changed.
    """
    if about.get("format") != "w2s-labels":
        raise UsageError(f"{path} does not describe labels of w2s_jax")
    if about.get("version") != 1:
        raise MismatchError(
            f"{path} describes labels of version {about.get('version')}, this w2s_jax reads version 1: update w2s_jax, or "
            "label again into another --out"
        )
    unsigned = "checksum" not in about and "rendering" not in about  # written before there was either
    whole = isinstance(about.get("teacher"), dict) and isinstance(about.get("views"), str)
    if not whole or not (unsigned or about.get("checksum") == signed(about)["checksum"]):
        raise W2SError(f"{path} is damaged or was changed after it was written")
    if (rendering := about.get("rendering", 1)) != RENDERING:  # version 1 was not recorded
        raise MismatchError(
            f"{path}: the teacher labelled views of rendering {rendering}, this w2s_jax renders version {RENDERING}; "
            "label again (w2s label --force)"
        )
    return about
