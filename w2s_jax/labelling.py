"""Label every view by a teacher, shard by shard; finished shards are kept, and any number of processes can share the work."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from w2s_jax import __version__, labels
from w2s_jax.bank import Bank
from w2s_jax.devices import computing
from w2s_jax.errors import MismatchError, W2SError
from w2s_jax.files import read_json, write_json
from w2s_jax.locks import Shares
from w2s_jax.render import render_on_host
from w2s_jax.teachers import Teacher, attribute, label_with_members, provenance
from w2s_jax.views import RENDERING, Views, batch_by_length

#: Batches that are rendered ahead of the teacher.
_AHEAD = 2


@computing()
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

    Several processes can run this on one ``out`` at once, on one machine or on several that share a file system with locks:
    each takes the next free shard, and takes over the shards of a process that dies. All return when all shards are finished.
    Views are rendered ahead while the teacher computes.

    Args:
        bank, views: what to label; they belong together.
        teacher: from ``teachers.load``.
        out: the directory of the labels.
        batch_size: views of one length in a batch, per device; the labels do not depend on it.
        force: relabel from nothing where ``out`` holds labels of another teacher or other views.
        progress: called with (views done by all processes, views in all, views per second of this process).

    Returns:
        labels.json as a dict.

    Raises:
        MismatchError: views and bank, or labels that are already there, do not belong together.
        W2SError: the teacher gave a value that is not finite (names the view), or its weights are not the published ones.
    """
    views.check(bank)
    if doubt := attribute(teacher, "doubt"):
        raise W2SError(doubt)
    out = Path(out)
    about = {
        "format": "w2s-labels",
        "version": 1,
        "bank": bank.fingerprint,
        "views": views.fingerprint,
        "count": len(views),
        "rendering": RENDERING,
        "teacher": provenance(teacher),
        "w2s_jax": __version__,
    }
    about = labels.signed(about)
    names = labels.columns(about["teacher"])
    with Shares(out) as shares:
        with shares.exclusive():
            _claim(out, about, force, shares)
        done, labelled, began = 0, 0, time.perf_counter()

        def advance(count: int, own: bool) -> None:
            nonlocal done, labelled
            done += count
            labelled += count if own else 0
            if progress:
                progress(done, len(views), views_per_second=labelled / max(time.perf_counter() - began, 1e-9))

        def store(batch: _Batch, values: list) -> None:
            shard = batch.shard
            shard.values[batch.places] = np.concatenate(values, axis=1)
            shard.missing -= len(batch.places)
            advance(len(batch.places), own=True)
            if shard.missing == 0:
                bad = np.flatnonzero(~np.isfinite(shard.values).all(axis=1))
                if len(bad):
                    what = f"teacher {teacher.name} gave {shard.values[bad[0]]} for view {shard.rows[bad[0]]}"
                    raise W2SError(f"{what}: not finite")
                labels.write_shard(out, shard.number, shard.rows, shard.values, names)
                shares.free(shard.number)

        pending = deque()
        work = _shards(out, views, names, shares, advance)
        for batch in _ahead(_batches(bank, views, work, batch_size * attribute(teacher, "devices"))):
            if batch is not None:
                pending.append((batch, label_with_members(teacher, batch.waves)))
            while len(pending) > (batch is not None):  # the last values are stored while an accelerator computes the next
                store(*pending.popleft())
        while pending:
            store(*pending.popleft())
        with shares.exclusive():
            write_json(out / "labels.json", about)
    return about


@dataclass
class _Shard:
    """A shard that this process labels."""

    number: int
    rows: np.ndarray
    values: np.ndarray
    missing: int  # views without values


@dataclass(frozen=True)
class _Batch:
    """Rendered views of one length."""

    shard: _Shard
    places: np.ndarray  # of the views in their shard
    waves: np.ndarray


def _shards(out: Path, views: Views, names: tuple[str, ...], shares: Shares, advance: Callable) -> Iterator[_Shard | None]:
    """The shards that this process has to label: free ones, then those that other processes took and did not finish.

    Yields None before it waits for another process, so that the caller stores its pending shards first: that process may be
    waiting for one of them.
    """

    def is_finished(number: int) -> bool:
        return labels.read_shard(out, number, shards[number], names) is not None

    def start(number: int) -> Iterator[_Shard]:
        rows = shards[number]
        if is_finished(number):  # by another process in the meantime
            shares.free(number)
            advance(len(rows), own=False)
        else:
            yield _Shard(number, rows, np.empty((len(rows), len(names)), np.float32), len(rows))

    shards = labels.shards(views)
    missing = [number for number in range(len(shards)) if not is_finished(number)]
    advance(sum(map(len, shards)) - sum(len(shards[number]) for number in missing), own=False)
    # the processes of a job start at different shards, so that they share the work even without locks between their hosts
    first = len(missing) * jax.process_index() // jax.process_count()
    taken = []
    for number in missing[first:] + missing[:first]:
        if shares.take(number):
            yield from start(number)
        else:
            taken.append(number)
    for number in taken:
        yield None
        shares.take(number, wait=True)
        yield from start(number)


def _batches(bank: Bank, views: Views, shards: Iterator[_Shard | None], size: int) -> Iterator[_Batch | None]:
    """Rendered batches of equal length, shard after shard; None is passed on."""
    for shard in shards:
        if shard is None:
            yield None
            continue
        for places in batch_by_length(views.columns["samples"][shard.rows], size):
            yield _Batch(shard, places, render_on_host(bank, views, shard.rows[places]))


def _ahead(items: Iterator) -> Iterator:
    """The same items, made in a thread that is a few items ahead."""
    end, thread = object(), ThreadPoolExecutor(1)
    try:
        upcoming = deque(thread.submit(next, items, end) for _ in range(_AHEAD))
        while (item := upcoming.popleft().result()) is not end:
            upcoming.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # it may be waiting for a shard of another process


def _claim(out: Path, about: dict, force: bool, shares: Shares) -> None:
    """Record the teacher and the views before the first label is written, so that labels of others are never mixed in."""
    plan = out / "plan.json"
    if force:
        shares.require_alone()
        for stale in [*(out / "shards").glob("*.parquet"), out / "labels.json"]:
            stale.unlink(missing_ok=True)
    elif plan.exists():
        try:
            before = labels.check(read_json(plan, "label plan"), plan)
            differing = _differing(before, about)
        except MismatchError:  # its message says what to do
            raise
        except W2SError as error:
            raise W2SError(
                f"{error}. So it is not known whose labels {out} holds; choose another --out, or --force to relabel"
            ) from error
        if differing:
            raise MismatchError(
                f"{out} holds labels of something else ({'; '.join(differing)}); choose another --out, or --force to relabel"
            )
    write_json(plan, about)


def _differing(before: dict, now: dict) -> list[str]:
    """The differences between two plans that change the labels."""
    old, new = before.get("teacher", {}), now["teacher"]
    pairs = [("views", before.get("views"), now["views"])]
    pairs += [(f"teacher's {what}" if what != "name" else "teacher", old.get(what), new.get(what)) for what in _IDENTITY]
    return [f"{what}: {a} there, {b} now" for what, a, b in pairs if a != b]


#: What identifies a teacher; the fingerprint alone would do, the rest explains a difference.
_IDENTITY = ("name", "dtype", "normalisation", "fingerprint")
