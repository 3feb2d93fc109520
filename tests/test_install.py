"""Commands in messages: they name this environment's programs, and install from where this copy came from."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from w2s_jax import install

CLONE = Path(__file__).resolve().parents[1]


@pytest.fixture
def origin(monkeypatch, tmp_path):
    """Pretend that pip noted this on where the copy came from, and that it runs from site-packages."""

    def pretend(note, place=tmp_path / "site-packages"):
        monkeypatch.setattr(install, "_direct_url", lambda: note)
        monkeypatch.setattr(install, "__file__", str(place / "w2s_jax" / "install.py"))

    return pretend


# the forms are those of pip's documentation: "VCS Support", "Local project installs"
@pytest.mark.parametrize(
    ("note", "command"),
    [
        ({}, ["w2s-jax[train]"]),
        (
            {"url": "https://example.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            ["w2s-jax[train] @ git+https://example.org/a.git"],
        ),
        (
            {"url": "file:///tmp/w2s_jax-1-py3-none-any.whl", "archive_info": {}},
            ["w2s-jax[train] @ file:///tmp/w2s_jax-1-py3-none-any.whl"],
        ),
        ({"url": "file:///gone", "dir_info": {}}, ["w2s-jax[train]"]),
    ],
)
def test_an_extra_is_installed_from_where_the_copy_came_from(origin, note, command):
    origin(note)
    words = shlex.split(install.pip_install("train"))
    assert Path(words[0]).name == "pip" and words[1] == "install"
    assert words[2:] == command


def test_in_a_clone_an_extra_is_installed_from_the_clone(origin, monkeypatch, tmp_path):
    origin({"url": CLONE.as_uri(), "dir_info": {}})  # pip install . from this clone
    monkeypatch.chdir(CLONE)
    assert install.pip_install("train", here=False) == "pip install -c constraints.txt '.[train]'"
    monkeypatch.chdir(tmp_path)  # from elsewhere by its full path: pip takes a bare name for a package of an index
    assert shlex.split(install.pip_install("train"))[2:] == ["-c", f"{CLONE}/constraints.txt", f"{CLONE}[train]"]
    origin({}, CLONE)  # PYTHONPATH=clone, never installed
    assert f"{CLONE}[train]" in install.pip_install("train")


def test_a_program_that_is_not_on_the_path_is_named_by_its_place(monkeypatch, tmp_path):
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "w2s"):
        (programs / name).write_text("#!/bin/sh\necho it was me\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert install.program("w2s") == ".venv/bin/w2s"
    assert subprocess.run(install.program("w2s"), shell=True, capture_output=True, text=True).stdout == "it was me\n"
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin:/bin")  # as after: source .venv/bin/activate
    assert install.program("w2s") == "w2s"
    assert install.program("none") == "none"


def test_every_extra_and_its_modules_are_those_of_pyproject():
    """Both ways: each requirement has a module in the table, each module comes with one of the requirements."""
    extras = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirements = {
        extra: {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines} for extra, lines in extras.items()
    }
    distributions = {
        module: {name.lower().replace("_", "-") for name in names}
        for module, names in metadata.packages_distributions().items()
    }
    assert set(install.EXTRAS) == set(extras) - {"all", "dev"}
    for extra, modules in install.EXTRAS.items():
        brought = {module: distributions.get(module, {module}) & requirements[extra] for module in modules}
        assert all(brought.values()), brought
        missing = requirements[extra] - set().union(*brought.values())
        assert missing <= {"tensorflow", "tensorflow-cpu"}, missing  # one of the two is installed


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("jax", "train"),
        ("orbax.checkpoint", "train"),
        ("transformers", "teacher"),
        ("tensorflow.lite", "export"),
        ("onnx", "export"),
        ("espeakng_loader", "quickstart"),
        ("numpy", None),
        ("w2s_jax.gone", None),
        ("", None),
    ],
)
def test_the_extra_of_a_missing_module(module, extra):
    assert install.extra_of(module) == extra
