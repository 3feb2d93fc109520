"""How this copy of w2s_jax was installed, and which extra brings what: for commands in messages that work as they are."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

#: The modules that each extra brings, under the names that they are imported by. Where two extras bring one, the first counts.
EXTRAS = {
    "train": (
        "jax", "flax", "grain", "librosa", "matplotlib", "ml_collections", "optax", "orbax", "pyarrow", "safetensors",
        "tensorboardX",
    ),
    "teacher": ("safetensors", "speechmos", "transformers"),
    "export": ("jax", "flax", "onnx", "safetensors", "tensorflow", "tf2onnx"),
    "litert": ("ai_edge_litert",),
    "c": ("ziglang",),
    "wasm": ("wasmtime", "ziglang"),
    "quickstart": ("espeakng_loader",),
    "openvino": ("openvino",),
}  # fmt: skip


def extra_of(module: str) -> str | None:
    """The extra that brings a module, or None: the base install has it, or it is none of ours."""
    return next((extra for extra, modules in EXTRAS.items() if module.partition(".")[0] in modules), None)


def program(name: str) -> str:
    """What to type to run a program of this Python environment, such as ``w2s``.

    Returns:
        The bare name if the shell finds this environment's program by it, otherwise the path (relative where that is shorter),
        quoted for a shell. The bare name, too, where the environment has no such program.
    """
    here = Path(sys.executable).parent / (f"{name}.exe" if os.name == "nt" else name)
    on_path = shutil.which(name)
    if not here.exists() or (on_path and Path(on_path).absolute() == here.absolute()):
        return name
    return shlex.quote(_short(here))


def pip_install(extra: str, here: bool = True) -> str:
    """The command that installs an extra from where this copy came from: a clone, a URL, or an index.

    Args:
        extra: its name in pyproject.toml.
        here: into this environment; otherwise into the one that is active when the command is run.
    """
    pip, clone, url = program("pip") if here else "pip", _clone(), _direct_url()
    if clone is not None:
        constraints = clone / "constraints.txt"
        known = f"-c {shlex.quote(_short(constraints))} " if constraints.is_file() else ""
        editable = "-e " if _direct_url().get("dir_info", {}).get("editable") else ""
        place = "." if clone == Path.cwd() else str(clone)  # pip takes a bare name for a package of an index
        what = shlex.quote(f"{place}[{extra}]")
        return f"{pip} install {known}{editable}{what}"
    if "vcs_info" in url:
        what = f"w2s-jax[{extra}] @ {url['vcs_info'].get('vcs', 'git')}+{url['url']}"
    elif "archive_info" in url:
        what = f"w2s-jax[{extra}] @ {url['url']}"
    else:
        what = f"w2s-jax[{extra}]"
    return f"{pip} install {shlex.quote(what)}"


def _clone() -> Path | None:
    """The source checkout that this copy runs in or was installed from, if it still exists."""
    places = [Path(__file__).resolve().parents[1]]
    url = _direct_url()
    if "dir_info" in url and url.get("url", "").startswith("file://"):
        from urllib.request import url2pathname

        places.append(Path(url2pathname(url["url"].removeprefix("file://"))))
    return next((place for place in places if (place / "pyproject.toml").is_file() and (place / "w2s_jax").is_dir()), None)


@functools.cache
def _direct_url() -> dict:
    """The origin of this copy as pip recorded it (PEP 610); empty if it came from an index, or was not installed."""
    try:
        text = metadata.distribution("w2s-jax").read_text("direct_url.json")
        origin = json.loads(text) if text else {}
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def _short(path: Path) -> str:
    """The path relative to the working directory if it is below it, otherwise as it is."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
