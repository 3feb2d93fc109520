"""Let a teacher label every view, shard by shard; what is finished stays finished, and any number of processes may help."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
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
from w2s_jax.teachers import Teacher, hear, provenance
from w2s_jax.views import RENDERING, Views

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

    Several processes may run this on one ``out`` at once, on one machine or on several that share a file system with locks:
    each takes the next shard that nobody has, and takes over the shards of one that dies. All return when all is done. Views
    are rendered ahead while the teacher computes.

    Args:
        bank, views: what to label; they belong together.
        teacher: who labels.
        out: the directory of the labels.
        batch_size: views of one length that each device hears at once; the labels do not depend on it.
        force: relabel from nothing where ``out`` holds labels of another teacher or other views.
        progress: called with (views done by anyone, views in all, views per second of this process).

    Returns:
        labels.json as a dict.

    Raises:
        MismatchError: views and bank, or labels that are already there, do not belong together.
        W2SError: the teacher gave a value that is not finite (names the view), or its weights are not the published ones.
    """
    views.check(bank)
    if getattr(teacher, "doubt", None):
        raise W2SError(teacher.doubt)
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
        with shares.door():
            _claim(out, about, force, shares)
        done, labelled, began = 0, 0, time.perf_counter()

        def advance(count: int, own: bool) -> None:
            nonlocal done, labelled
            done += count
            labelled += count if own else 0
            if progress:
                progress(done, len(views), views_per_second=labelled / max(time.perf_counter() - began, 1e-9))

        def keep(job: _Batch, heard: list) -> None:
            shard = job.shard
            shard.values[job.places] = np.concatenate(heard, axis=1)
            shard.left -= len(job.places)
            advance(len(job.places), own=True)
            if shard.left == 0:
                broken = np.flatnonzero(~np.isfinite(shard.values).all(axis=1))
                if len(broken):
                    what = f"teacher {teacher.name} gave {shard.values[broken[0]]} for view {shard.rows[broken[0]]}"
                    raise W2SError(f"{what}: not finite")
                labels.write_shard(out, shard.number, shard.rows, shard.values, names)
                shares.free(shard.number)

        pending = deque()
        work = _shards(out, views, names, shares, advance)
        for job in _ahead(_batches(bank, views, work, batch_size * getattr(teacher, "devices", 1))):
            if job is not None:
                pending.append((job, hear(teacher, job.waves)))
            while len(pending) > (job is not None):  # an accelerator computes while its last values are put away
                keep(*pending.popleft())
        while pending:
            keep(*pending.popleft())
        with shares.door():
            write_json(out / "labels.json", about)
    return about


@dataclass
class _Shard:
    """A shard of this process, and how many of its views have no values yet."""

    number: int
    rows: np.ndarray
    values: np.ndarray
    left: int


@dataclass(frozen=True)
class _Batch:
    """Rendered views of one length, and their places in their shard."""

    shard: _Shard
    places: np.ndarray
    waves: np.ndarray


def _shards(out: Path, views: Views, names: tuple[str, ...], shares: Shares, advance: Callable) -> Iterator[_Shard | None]:
    """The shards that this process shall make: those that nobody has taken, then those that others took and did not finish.

    None comes before it waits for another process, which may in turn be waiting for what this one has not put away yet.
    """

    def whole(number: int) -> bool:
        return labels.read_shard(out, number, shards[number], names) is not None

    def mine(number: int) -> Iterator[_Shard]:
        rows = shards[number]
        if whole(number):  # by another process, since
            shares.free(number)
            advance(len(rows), own=False)
        else:
            yield _Shard(number, rows, np.empty((len(rows), len(names)), np.float32), len(rows))

    shards = labels.shards(views)
    missing = [number for number in range(len(shards)) if not whole(number)]
    advance(sum(map(len, shards)) - sum(len(shards[number]) for number in missing), own=False)
    # hosts of one job begin at different places, so that without locks between them they still share the work
    first = len(missing) * jax.process_index() // jax.process_count()
    elsewhere = []
    for number in missing[first:] + missing[:first]:
        if shares.take(number):
            yield from mine(number)
        else:
            elsewhere.append(number)
    for number in elsewhere:
        yield None
        shares.take(number, wait=True)
        yield from mine(number)


def _batches(bank: Bank, views: Views, shards: Iterator[_Shard | None], size: int) -> Iterator[_Batch | None]:
    """Rendered batches of equal length, shard after shard; None is passed on."""
    for shard in shards:
        if shard is None:
            yield None
            continue
        samples = views.columns["samples"][shard.rows]
        for length in np.unique(samples):
            places = np.flatnonzero(samples == length)
            for at in range(0, len(places), size):
                batch = places[at : at + size]
                yield _Batch(shard, batch, render_on_host(bank, views, shard.rows[batch]))


def _ahead(items: Iterator) -> Iterator:
    """The same items, made in a thread that is a few items ahead."""
    ready, stop = queue.Queue(maxsize=_AHEAD), threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def make() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # it is raised where the items are used
            put((None, error))

    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()


def _claim(out: Path, about: dict, force: bool, shares: Shares) -> None:
    """Note whose labels these will be before the first one is written, so that another teacher's are never mixed in."""
    plan = out / "plan.json"
    if force:
        shares.alone()
        for stale in [*(out / "shards").glob("*.parquet"), out / "labels.json"]:
            stale.unlink(missing_ok=True)
    elif plan.exists():
        try:
            before = labels.check(read_json(plan, "label plan"), plan)
            differing = _differing(before, about)
        except MismatchError:  # it says what to do
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
    """What of a plan is not as it was, where that changes the labels."""
    old, new = before.get("teacher", {}), now["teacher"]
    pairs = [("views", before.get("views"), now["views"])]
    pairs += [(f"teacher's {what}" if what != "name" else "teacher", old.get(what), new.get(what)) for what in _IDENTITY]
    return [f"{what}: {a} there, {b} now" for what, a, b in pairs if a != b]


#: What makes a teacher another one; the fingerprint tells, the rest says why.
_IDENTITY = ("name", "dtype", "normalisation", "fingerprint")
