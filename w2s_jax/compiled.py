"""Libraries that are compiled on first use with the machine's own compiler, and kept in a private cache directory.

A cached library is code that gets executed, so it lies in a directory that only this user can write, belongs to this user, and
ends with the checksum of the rest, which is compared first: the linker would end the process at a truncated one. One that is
damaged, foreign or does not load is compiled again, once. Where the user's cache directory cannot serve, a private one among
the temporary files does.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import signal
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

#: Seconds that a compiler may take for a library, and for its version.
COMPILE_SECONDS, VERSION_SECONDS = 300, 20
#: Checksum of a library → the library, of those that this process has loaded.
_LOADED: dict[bytes, ctypes.CDLL] = {}


def load(
    name: str,
    command: Sequence[str],
    flags: Sequence[str],
    sources: Sequence[str | os.PathLike],
    parts: Sequence[str],
    version_seconds: float = VERSION_SECONDS,
) -> ctypes.CDLL:
    """A library compiled for this CPU, from a cache directory where it is there already.

    Args:
        name: what its file's name begins with.
        command: the compiler's first words.
        flags: of the compiler.
        sources: files, which may lie elsewhere next time.
        parts: what the result depends on besides: the content of the sources, versions of headers.
        version_seconds: that the compiler may take to say its version.

    Raises:
        OSError, subprocess.SubprocessError: the compiler, the headers or every directory do not work.
    """
    version = run([*command, "--version"], version_seconds)
    # all that the result depends on; a home directory may be shared by machines with different CPUs
    texts = [*parts, *command, version, *flags, platform.machine(), _cpu()]
    file = f"{name}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:16]}.so"
    refused = []
    for directory in _places():
        try:
            _make_private(directory)
            with contextlib.suppress(OSError):  # not there yet, or not to be trusted
                return _open(directory / file)
            build([*command, *flags, *map(str, sources)], directory / file)
            return _open(directory / file)
        except OSError as error:
            refused.append(str(error))
    raise OSError("no directory for the compiled kernel: " + "; ".join(refused))


def build(command: Sequence[str], path: Path) -> None:
    """Compile a library to ``path`` and put its checksum behind it, where the linker does not look."""
    # a name of its own until it is whole: other processes may be compiling the same
    handle, draft = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        run([*command, "-o", draft], COMPILE_SECONDS)
        os.chmod(draft, 0o700)
        content = Path(draft).read_bytes()
        Path(draft).write_bytes(content + hashlib.sha256(content).digest())
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def describe_failure(error: subprocess.CalledProcessError) -> str:
    """A compiler's failure in one line."""
    lines = (error.stderr or "").strip().splitlines() or ["no message"]
    line = next((line for line in lines if "error" in line.lower()), lines[-1])
    return f"{error.cmd[0]} ended with {error.returncode}: {line.strip()}"


def _places() -> Iterator[Path]:
    """Where the library may lie, the first choice first."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # no home directory
        yield (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "w2s_jax"
    yield Path(tempfile.gettempdir()) / f"w2s_jax-{os.geteuid()}"


def _make_private(directory: Path) -> None:
    """Make the directory if it is missing; refuse one that others can write."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        unsafe = (
            f"{directory} is not safe for the compiled kernel: expected one of the user {os.geteuid()} that nobody else can "
            f"write, got owner {status.st_uid}, mode {stat.filemode(status.st_mode)}; delete it, or chown it and chmod 700"
        )
        warnings.warn(unsafe, stacklevel=2)
        raise PermissionError(unsafe)


def _open(path: Path) -> ctypes.CDLL:
    """Load a library that is this user's and whole.

    Raises:
        OSError: it is not there, somebody else's, damaged, or does not load.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with open(descriptor, "rb", closefd=False) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise PermissionError(f"{path} can be written by others")
            content = file.read()
        checksum = hashlib.sha256(content[:-32]).digest()
        if content[-32:] != checksum:
            raise OSError(f"{path} is damaged")
        if checksum not in _LOADED:
            # what was looked at, whatever has got that name meanwhile
            seen = f"/proc/self/fd/{descriptor}"
            _LOADED[checksum] = ctypes.CDLL(seen if os.path.exists(seen) else str(path))
            descriptor = None  # stays open: the linker would take the next library of that name for this one
        return _LOADED[checksum]
    finally:
        if descriptor is not None:
            os.close(descriptor)


def run(command: Sequence[str], seconds: float) -> str:
    """What a command prints; it and all that it started are ended when the time is over."""
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=nothing, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed, errors)
    return printed


def _cpu() -> str:
    """The model and abilities of this machine's CPU, which -march=native compiles for."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
