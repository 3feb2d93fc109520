"""Locks on directories, and on parts of the work on one, between processes and machines."""

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
    """Hold ``directory`` for this process, so that two runs never write into the same place.

    The lock is the operating system's and goes with the process, however that ends.

    Raises:
        W2SError: another process holds it, or the directory cannot be written.
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
        except ImportError:  # Windows: no lock, the atomic renames still hold
            pass
        except OSError as error:
            raise W2SError(f"{directory} is in use by another w2s process; wait for it or choose another directory") from error
        yield


class Shares:
    """How several processes share the work on one directory: who does which part, by locks that the operating system keeps.

    The locks go with their process, however that ends, so the parts of one that was killed are free again. They hold between
    the processes of a machine, and between machines whose shared file system has locks (NFS has). Where there are none
    (Windows), every part is always free: then start one process.

    Args:
        directory: what is shared; made when missing.

    Raises:
        W2SError: the directory cannot be written.
    """

    _DOOR, _PRESENCE, _PARTS = 0, 1, 2  # bytes of the lock file, which need not exist to be locked

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
        self._file.close()  # lets go of every lock

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
    def door(self) -> Iterator[None]:
        """One process at a time: what is decided here is seen by all that come later. Waits for its turn."""
        self._lock(self._DOOR, "wait")
        try:
            yield
            self._lock(self._PRESENCE, "share")
        finally:
            self._lock(self._DOOR, "free")

    def alone(self) -> None:
        """Inside the door, before starting over.

        Raises:
            W2SError: another process is at work here.
        """
        if not self._lock(self._PRESENCE, "take"):
            raise W2SError(f"{self._directory} is in use by another w2s process; wait for it or choose another directory")

    def take(self, part: int, wait: bool = False) -> bool:
        """Take a part; False if another process has it. With ``wait``, look again until it is free."""
        # not "wait" in the kernel: two processes whose threads wait for each other's parts are no deadlock, but it says so
        while not self._lock(self._PARTS + part, "take"):
            if not wait:
                return False
            time.sleep(0.1)
        return True

    def free(self, part: int) -> None:
        """Let go of a part."""
        self._lock(self._PARTS + part, "free")
