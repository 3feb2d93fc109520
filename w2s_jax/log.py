"""A training run's log (metrics.jsonl and TensorBoard), and traces of where its time goes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from w2s_jax.errors import W2SError
from w2s_jax.files import write_atomic


class Log:
    """Writes a run's metrics.jsonl and TensorBoard events; a resumed run's log has every step once.

    A line is ``{"step", "kind", figure: value, …}``, kind ``train`` or ``validation``.

    Args:
        workdir: of the run.
        done: steps that the run has done; lines of later steps, and a last line that a kill cut off, are dropped.
        every: steps between lines; a run that was stopped earlier has none.
        active: False makes a log that writes nothing, for all processes of a run but the main one.
    """

    def __init__(self, workdir: str | os.PathLike, done: int, *, every: int = 1, active: bool = True) -> None:
        self._open = contextlib.ExitStack()
        self._file = self._board = None
        if not active:
            return
        self._path, self._events = Path(workdir) / "metrics.jsonl", Path(workdir) / "tensorboard"
        lines, lost = read_log(self._path)
        if lost:
            warnings.warn(f"{self._path} is damaged: {lost} lines of it cannot be read and are left out", stacklevel=2)
        if done >= every and not lines:
            warnings.warn(f"{self._path} has no line of the {done} steps that are done", stacklevel=2)
        text = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= done)
        write_atomic(self._path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        with _disk_errors(self._path):
            # unbuffered: a buffer that could not be written would be written once more when the file is closed
            self._file = self._open.enter_context(self._path.open("ab", buffering=0))
        with _disk_errors(self._events):
            self._board = _Board(self._events, done)
            self._open.callback(self._board.close)

    def write(self, kind: str, step: int, figures: dict[str, float]) -> None:
        """Add a line; it is on its way to the disk when this returns.

        Raises:
            W2SError: the disk is full; names the file.
        """
        if self._file is None:
            return
        line = {"step": step, "kind": kind, **{key: round(value, 6) for key, value in figures.items()}}
        left = (json.dumps(line) + "\n").encode()
        with _disk_errors(self._path):
            while left:
                left = left[self._file.write(left) :]
        with _disk_errors(self._events):
            self._board.add({f"{kind}/{key}": value for key, value in figures.items()}, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        self._open.close()


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Translate an OSError of writing into one that names the path and the free space."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise W2SError(
            f"cannot write {path}: {error.strerror or error} ({free:.1f} MiB free); the last whole checkpoint is kept, and the "
            "same command goes on from it"
        ) from error


class _Board:
    """Writes TensorBoard's events in this thread: tensorboardX's own writer has a thread in which errors are lost."""

    def __init__(self, directory: Path, done: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = event_pb2.Event, scalar
        self._writer = EventsWriter(str(directory / "events"))
        if done:  # tells TensorBoard to hide the events of later steps, which a kill left
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(event_pb2.Event(step=done + 1, file_version="brain.Event:2"))
            self._writer.write_event(event_pb2.Event(step=done + 1, session_log=start))

    def add(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # all was flushed, or that failed and was reported
            self._writer.close()


def read_log(path: Path) -> tuple[list[dict], int]:
    """Read metrics.jsonl: its valid lines (objects with a step), and the number of others, a cut-off last line not counted."""
    valid, lost = [], 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    parts = text.split("\n")
    for number, part in enumerate(parts, start=1):
        try:
            line = json.loads(part)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**53:
            valid.append(line)
        elif number < len(parts):  # a kill can cut the last one off
            lost += 1
    return valid, lost


@contextlib.contextmanager
def trace(directory: str | os.PathLike, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Record a trace of devices and host inside the ``with`` block, into ``directory``/plugins/profile/DATE.

    Keep the block to a few dispatches that are already compiled: a trace takes megabytes a second. Wait for the last result
    inside the block (``jax.block_until_ready``), or its end is missing.

    Args:
        directory: usually WORKDIR/profile.
        say: called at the end with a line that explains how to open the trace.
    """
    with jax.profiler.trace(os.fspath(directory)):
        yield
    # jaxlib overwrites this function of TensorFlow with a bool, after which TensorFlow can convert no model
    hook = sys.modules.get("tensorflow.python.profiler.trace")
    if hook is not None and not callable(hook.enabled):
        hook.enabled = hook._pywrap_traceme.traceme_enabled
    if say:
        files = sorted(Path(directory).glob("plugins/profile/*/*.trace.json.gz"))
        where = files[-1] if files else directory
        say(
            f"trace: open {where} at ui.perfetto.dev, or pip install tensorboard tensorboard-plugin-profile and "
            f"run tensorboard --logdir {directory}"
        )
