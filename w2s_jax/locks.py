"""Locks between processes and machines: on a directory, and on the parts of a job that they share."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from w2s_jax.errors import W2SError


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Lock ``directory`` for this process, so that two runs never write into the same place.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        W2SError: another process has locked it, or the directory cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+")  # noqa: SIM115 (held until the block ends)
    except OSError as error:
        raise W2SError(f"cannot write into {directory}: {error.strerror or error}") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: no lock; writing is still atomic
            pass
        except OSError as error:
            raise W2SError(f"{directory} is in use by another w2s process; wait for it or choose another directory") from error
        yield


class Shares:
    """Distributes the numbered parts of a job over the processes that work on one directory.

    A part is a byte of one lock file, ``directory``/.lock. The operating system releases the locks of a process when it ends,
    however it ends, so that the parts of a killed process are free again. Locks work between the processes of a machine, and
    between machines that share a file system with locks (NFS has them). Without locks (Windows) every part is always free:
    then start one process only.

    Args:
        directory: of the job; made when missing.

    Raises:
        W2SError: the directory cannot be written.
    """

    _EXCLUSIVE, _PRESENT, _PARTS = 0, 1, 2  # bytes of the lock file; they can be locked without existing

    def __init__(self, directory: str | os.PathLike) -> None:
        self._directory = Path(directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = open(self._directory / ".lock", "a+")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise W2SError(f"cannot write into {directory}: {error.strerror or error}") from error

    def __enter__(self) -> Shares:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # releases all locks

    def _lock(self, byte: int, mode: str) -> bool:
        try:
            import fcntl
        except ImportError:
            return True
        flags = {"wait": fcntl.LOCK_EX, "take": fcntl.LOCK_EX | fcntl.LOCK_NB, "share": fcntl.LOCK_SH, "free": fcntl.LOCK_UN}
        try:
            fcntl.lockf(self._file, flags[mode], 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        return True

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Run the block in one process at a time, after waiting for the others; then count this process as present."""
        self._lock(self._EXCLUSIVE, "wait")
        try:
            yield
            self._lock(self._PRESENT, "share")
        finally:
            self._lock(self._EXCLUSIVE, "free")

    def require_alone(self) -> None:
        """Refuse to go on if another process is present; to be called inside ``exclusive``.

        Raises:
            W2SError: another process is present.
        """
        if not self._lock(self._PRESENT, "take"):
            raise W2SError(f"{self._directory} is in use by another w2s process; wait for it or choose another directory")

    def take(self, part: int, wait: bool = False) -> bool:
        """Lock a part; False if another process has locked it. With ``wait``, try again until it is free."""
        # polling, because the kernel's blocking lock reports a deadlock where two processes wait for parts of each other. It
        # judges by processes, and here another thread of the process finishes its part and frees it
        while not self._lock(self._PARTS + part, "take"):
            if not wait:
                return False
            time.sleep(0.1)
        return True

    def free(self, part: int) -> None:
        """Unlock a part."""
        self._lock(self._PARTS + part, "free")
