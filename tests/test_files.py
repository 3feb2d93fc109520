"""Writing: a kill at any moment leaves the old or the new, writers do not disturb each other, and nobody else's files go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from w2s_jax import files
from w2s_jax.errors import W2SError
from w2s_jax.files import write_atomic

#: A process that writes ``new`` over ``old`` and is killed before its nth event of the file system; EXCHANGE=0 is a system
#: without renameat2.
WRITER = """
import os, signal, sys
from pathlib import Path
from w2s_jax import files

kind, path, fatal, exchange = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if exchange == "0":
    files._exchange = lambda one, other: False

def write(temporary):
    if kind == "file":
        temporary.write_text("new")
    else:
        temporary.mkdir()
        for name in ("weights", "figures"):
            (temporary / name).write_text("new")

import ctypes
ctypes.CDLL(None)  # what the first use opens is no event of the writing
count = 0
def kill(event, arguments):
    global count
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
files.write_atomic(path, write)
"""


def content(path: Path) -> set[str]:
    return {file.read_text() for file in (path.iterdir() if path.is_dir() else [path])}


@pytest.mark.parametrize("kind, exchange", [("file", 1), ("directory", 1), ("directory", 0)])
def test_a_kill_between_any_two_system_calls_leaves_the_old_or_the_new(tmp_path, kind, exchange):
    seen = []
    for fatal in range(1, 60):
        place = tmp_path / str(fatal)
        place.mkdir()
        path = place / "model"
        write_atomic(path, lambda t: t.write_text("old") if kind == "file" else fill(t, "old"))
        child = subprocess.run([sys.executable, "-c", WRITER, kind, path, str(fatal), str(exchange)], check=False)
        files.mend(path)
        seen.append(content(path))
        assert seen[-1] in ({"old"}, {"new"})
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        files._swept.discard(place)
        write_atomic(path, lambda t: t.write_text("newest") if kind == "file" else fill(t, "newest"))
        assert content(path) == {"newest"}
        assert os.listdir(place) == ["model"]  # what the killed process left is gone
    assert child.returncode == 0
    assert len(seen) > 5
    assert seen[0] == {"old"}
    assert seen[-2] == {"new"}  # killed in the tidying up


def fill(directory: Path, text: str) -> None:
    directory.mkdir()
    for name in ("weights", "figures"):
        (directory / name).write_text(text)


def test_nobody_elses_files_are_removed(tmp_path):
    for name in ("model.tmp", "model.old.tmp", ".w2s-notes.tmp"):
        fill(tmp_path / name, "the user's")
    (tmp_path / "file.tmp").write_text("the user's")
    for _ in range(2):
        write_atomic(tmp_path / "model", lambda t: fill(t, "ours"))
        write_atomic(tmp_path / "file", lambda t: t.write_text("ours"))
    assert content(tmp_path / "model.tmp") == content(tmp_path / "model.old.tmp") == content(tmp_path / "file.tmp")
    assert content(tmp_path / ".w2s-notes.tmp") == {"the user's"}
    assert sorted(os.listdir(tmp_path)) == [".w2s-notes.tmp", "file", "file.tmp", "model", "model.old.tmp", "model.tmp"]


@pytest.mark.parametrize("exchange", [True, False])
def test_many_writers_at_once_leave_one_whole_result_and_readers_see_only_whole_ones(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path, texts, bad = tmp_path / "views", [str(writer) * 100_000 for writer in range(8)], []
    write_atomic(path, lambda t: t.write_text(texts[0]))

    def write(text: str) -> None:
        try:
            for _ in range(10):
                write_atomic(path, lambda t: t.write_text(text))
                write_atomic(tmp_path / "model", lambda t: fill(t, text))
        except W2SError as error:
            bad.append(error)

    def read() -> None:
        while any(writer.is_alive() for writer in writers):
            bad.extend({path.read_text()} - set(texts))

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in (*writers, reader):
        thread.join()
    assert not bad
    assert len(content(tmp_path / "model")) == 1
    assert sorted(os.listdir(tmp_path)) == ["model", "views"]


def test_the_temporary_place_of_a_living_process_is_left_alone(tmp_path):
    def write(temporary: Path) -> None:
        temporary.write_text("slow")
        code = "import sys; from w2s_jax.files import write_json; write_json(sys.argv[1], {})"
        subprocess.run([sys.executable, "-c", code, tmp_path / "other.json"], check=True)  # sweeps the same directory
        assert temporary.exists()

    write_atomic(tmp_path / "file", write)
    assert sorted(os.listdir(tmp_path)) == ["file", "other.json"]


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "file", lambda t: t.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(W2SError, match="cannot write .*file: No space left on device"):
        write_atomic(tmp_path / "file", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", lambda t: (t.write_text("half"), (_ for _ in ()).throw(KeyboardInterrupt)))
    assert os.listdir(tmp_path) == ["file"]
    assert content(tmp_path / "file") == {"old"}


def test_the_longest_file_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    write_atomic(path, lambda t: t.write_text("x"))
    write_atomic(path, lambda t: t.write_text("y"))
    assert content(path) == {"y"}
