"""How this project reads and writes files: atomically, with checksums, and never without end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from w2s_jax.errors import UsageError, W2SError


def fingerprint(*parts: object) -> str:
    """A short stable name (16 hex digits of SHA-256) for JSON-like values, bytes and files (as Path)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, bytes):
            digest.update(hashlib.sha256(part).digest())
        else:
            digest.update(hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest())
    return digest.hexdigest()[:16]


def write_atomic(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` and rename the result to ``path``: a reader sees all of it or nothing.

    ``write`` may make a file or a directory; its temporary path has the final name, in a directory ``.w2s-….tmp`` beside it
    that no other writer has. A kill at any moment leaves the old or the new, and at most such a directory, which a later
    process removes; nobody else's files are touched. What is renamed has been flushed to the disk, so that a power failure
    leaves the old or the new as well.

    Raises:
        W2SError: the disk is full, or the place cannot be written; names the path and the cause.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        with _temporary_place(path.parent) as place:
            temporary = place / path.name
            write(temporary)
            _flush(temporary)
            if temporary.is_dir():
                _replace_directory(temporary, path, place / _OLD)
            else:
                os.replace(temporary, path)
    except OSError as error:
        raise W2SError(f"cannot write {path}: {error.strerror or error}") from error


_LOCK, _OLD = ".w2s-lock", ".w2s-old"  # in a temporary place, beside what is being written
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_swept: set[Path] = set()


@contextlib.contextmanager
def _temporary_place(parent: Path) -> Iterator[Path]:
    """A new directory that is this writer's as long as it holds the lock in it; removed at the end with all that is left."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=".w2s-", suffix=".tmp", dir=parent))
        try:
            lock = open(place / _LOCK, "a")  # noqa: SIM115 (held until the block ends)
        except FileNotFoundError:
            continue  # a sweeper came between
        if _locked(lock) is not False and (os.name == "nt" or os.fstat(lock.fileno()).st_nlink):
            break
        lock.close()
    try:
        with lock:
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _locked(file: IO) -> bool | None:
    """Lock a file for this process, without waiting: whether it could; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        return False
    return True


def _places(parent: Path) -> list[Path]:
    """Temporary places in a directory, of whomever."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        return [
            Path(entry)
            for entry in entries
            if re.fullmatch(r"\.w2s-\w+\.tmp", entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    return []


def _sweep(parent: Path) -> None:
    """Remove what killed processes left in a directory, once a process.

    A process that is gone has no lock any more, whatever has its number now; where there are no locks, nothing is removed.
    """
    if parent in _swept:
        return
    _swept.add(parent)
    for place in _places(parent):
        with contextlib.suppress(OSError):
            if os.listdir(place) and not (place / _LOCK).exists():
                continue  # not made here
            for old in (place / _OLD).glob("*"):
                _put_back(place, parent / old.name)
            if os.name == "nt":
                (place / _LOCK).unlink(missing_ok=True)  # Windows does not remove a file that is open
                shutil.rmtree(place, ignore_errors=True)
                continue
            with open(place / _LOCK, "a") as lock:
                if _locked(lock):
                    shutil.rmtree(place, ignore_errors=True)


def mend(path: str | os.PathLike) -> None:
    """Put back a directory whose replacement was killed half-way.

    Where the operating system exchanges two directories at once (Linux) there is nothing to mend. Elsewhere the old one is
    moved away first, and this moves it back if the new one never came.
    """
    path = Path(path)
    if not os.path.lexists(path):
        for place in _places(path.parent):
            _put_back(place, path)


def _put_back(place: Path, path: Path) -> None:
    if not os.path.lexists(path) and (place / path.name).exists():  # otherwise the new one has come, and went later
        with contextlib.suppress(OSError):  # not there, or another process was faster
            os.rename(place / _OLD / path.name, path)


def _replace_directory(new: Path, path: Path, old: Path) -> None:
    """Put ``new`` in the place of ``path``; what was there ends up beside ``new``, or in ``old``."""
    while True:  # more than once if a reader has put the old one back, or another writer was faster
        try:
            os.rename(new, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and not (os.name == "nt" and path.exists()):
                raise
        if _exchange(new, path):
            return
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, old / path.name)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one system call; False where that is not possible (not Linux, or an old file system)."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return renameat2(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), exchange) == 0


def _flush(path: Path) -> None:
    """Have the content of a file, or of all files in a directory, on the disk: a rename may get there earlier than it."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write JSON with a stable key order, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | os.PathLike, what: str) -> dict:
    """Read a JSON object; ``what`` names the artifact in the error message.

    Raises:
        UsageError: there is no such file.
        W2SError: the file is not a JSON object.
    """
    path = Path(path)
    mend(path.parent)
    try:
        value = json.loads(read_text(path, what))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"no {what} at {path.parent} (it has no {path.name})") from error
    except W2SError:
        raise
    except (ValueError, RecursionError) as error:
        raise W2SError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise W2SError(f"{path} is damaged: expected a JSON object, got {type(value).__name__}")
    return value


#: No text file that this project reads is larger, in bytes: a table of some millions of clips.
LARGEST_TEXT = 2**28


def open_regular(path: str | os.PathLike, what: str, limit: int = LARGEST_TEXT) -> BinaryIO:
    """Open a file that a user named, and never wait for it or read without end.

    Args:
        path: the file.
        what: it should be, for the message.
        limit: bytes that it may have.

    Raises:
        FileNotFoundError, NotADirectoryError: no such file; the caller knows what to say.
        UsageError: not a regular file (a FIFO, a device, a directory), larger than the limit, or not readable.
    """
    name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fsdecode(path))
    try:
        # a blocking open of a FIFO would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UsageError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}; expected {what}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file, but a pipe or a device"
        if stat.S_ISREG(status.st_mode):
            raise UsageError(f"{name} is too large: {status.st_size:,} bytes; expected {what} of at most {limit:,} bytes")
        raise UsageError(f"cannot read {name}: it is {kind}; expected {what}")
    return os.fdopen(descriptor, "rb")


def read_text(path: str | os.PathLike, what: str, limit: int = 2**24) -> str:
    """The UTF-8 text of a small file. Arguments and errors: see :func:`open_regular`.

    Raises:
        W2SError: the file is not UTF-8.
    """
    with open_regular(path, what, limit) as file:
        try:
            return file.read(limit + 1).decode("utf-8")
        except UnicodeDecodeError as error:
            raise W2SError(f"{path} is damaged: not UTF-8 ({error.reason} at byte {error.start})") from error
