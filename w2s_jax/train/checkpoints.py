"""The checkpoints of a run."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from w2s_jax.errors import W2SError
from w2s_jax.files import fingerprint
from w2s_jax.parallel import is_main_process


class Checkpoints:
    """The last two checkpoints of a run: plain arrays, independent of devices, with a checksum.

    They are written in the background; an error there is raised by the next call, or at the end.

    Args:
        directory: of the run's checkpoints; made when missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._bytes = directory.resolve(), 0

    def __enter__(self) -> Checkpoints:
        # the errors that its threads log are raised as well
        self._verbosity = absl.logging.get_verbosity()
        absl.logging.set_verbosity(absl.logging.FATAL)
        _hide_closed_loops()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        with self._disk_errors():
            if is_main_process():
                for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):  # of a kill, or a full disk
                    shutil.rmtree(unfinished, ignore_errors=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            with self._disk_errors():
                self._manager.close()
        except W2SError:
            if kind is None:
                raise
        finally:
            absl.logging.set_verbosity(self._verbosity)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Translate any error of writing into one W2SError that names the directory and the free space."""
        try:
            yield
        except Exception as error:  # orbax and tensorstore have exceptions of their own
            # tensorstore's contain the system's message in a long text
            known = (os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS))
            reason = next((reason for reason in known if reason in str(error)), str(error).strip().split("\n")[0][:200])
            free = shutil.disk_usage(self._directory).free if self._directory.is_dir() else 0
            raise W2SError(
                f"cannot write a checkpoint into {self._directory}: {reason} ({_size(self._bytes)} to write, {_size(free)} "
                "free); the last whole one is kept, and the same command goes on from it"
            ) from error

    def save(self, step: int, trees: dict, best: dict) -> None:
        """Start to write a checkpoint of trees of numpy arrays and of ``best`` (JSON), unless this step has one."""
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        with self._disk_errors():
            if self._manager.latest_step() == step:
                return
            items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
            notes = {**best, "checksum": checksum(trees, best)}
            self._manager.save(step, args=ocp.args.Composite(**items, best=ocp.args.JsonSave(notes)))

    def wait(self) -> None:
        """Wait until the last checkpoint is complete."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    def restore(self, trees: dict) -> tuple[dict, dict] | None:
        """Read the last undamaged checkpoint: trees of the given structure, and ``best``. None if there is no checkpoint.

        Damaged later ones are reported in a warning and deleted; the run will write them again.

        Raises:
            W2SError: all checkpoints are damaged.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
                saved = self._manager.restore(step, args=ocp.args.Composite(**items, best=ocp.args.JsonRestore()))
                restored, best = {name: saved[name] for name in trees}, dict(saved["best"])
                expected = best.pop("checksum", None)  # checkpoints of 0.1 have none
                if expected not in (None, checksum(restored, best)) or set(best) != {"step", "ccc"}:
                    raise W2SError("its content is not what was saved")
            except Exception as error:  # damaged bytes make decoders raise almost anything
                damaged[step] = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
                continue
            for later, reason in damaged.items():
                if is_main_process():
                    warnings.warn(
                        f"{self._directory / str(later)} is damaged ({reason}); going on from step {step}, the one before",
                        stacklevel=2,
                    )
                self._manager.delete(later)
            return restored, best
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise W2SError(
                f"every checkpoint in {self._directory} is damaged ({step}: {reason}); delete that directory to train from the "
                "beginning"
            )
        return None


def checksum(trees: dict, best: dict) -> str:
    """Checksum of the arrays of a checkpoint, in their order, and of its ``best``."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]
    return fingerprint(best, [[str(leaf.dtype), leaf.shape] for leaf in leaves], *(leaf.tobytes() for leaf in leaves))


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


@functools.cache
def _hide_closed_loops() -> None:
    """Hide the tracebacks that Python prints when one array could not be written and tensorstore's threads report the others to
    an event loop that is closed by then.
    """
    default_hook = sys.unraisablehook

    def show(raised) -> None:
        function = raised.exc_traceback and raised.exc_traceback.tb_frame.f_code.co_name
        if not (function == "call_soon_threadsafe" and str(raised.exc_value) == "Event loop is closed"):
            default_hook(raised)

    sys.unraisablehook = show
