"""Published checkpoints: found on a disk or the Hugging Face hub, read tensor by tensor into Flax, without PyTorch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from w2s_jax.checkpoint import differences, refuse, unwrapped
from w2s_jax.errors import UsageError, W2SError, missing_extra
from w2s_jax.files import fingerprint, read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        directory: where it lies.
        config: its config.json.
        files: its safetensors files.
        repository: the hub's name of the published one that it stands for.
        revision: the commit on the hub; None where a plain directory does not say.
    """

    directory: Path
    config: dict
    files: tuple[Path, ...]
    repository: str
    revision: str | None

    @property
    def fingerprint(self) -> str:
        """Of every byte of the weights."""
        return fingerprint(*self.files)


def find(repository: str, member: str, checkpoint_dir: str | os.PathLike | None, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a teacher, from a directory or from the hub (and its cache).

    Args:
        repository: its name on the Hugging Face hub.
        member: the teacher's short name, which a directory of several teachers may have for a folder.
        checkpoint_dir: the directory with config.json and model.safetensors, or one that has it as a folder named like the
            teacher or like the repository; default: the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        UsageError: nothing there, only pickled weights, no network; says which file, from where, and the offline way.
    """
    if checkpoint_dir is None:
        directory, weights = _download(repository, revision)
    else:
        root = Path(checkpoint_dir)
        places = [root, root / member, root / repository.split("/")[1], root / repository]
        directory = next((place for place in places if (place / CONFIG).is_file()), None)
        if directory is None:
            raise UsageError(
                f"no checkpoint of teacher {member} at {root}: expected {CONFIG} and {WEIGHTS} of {repository} there or in "
                f"its folder {member}/ or {repository.split('/')[1]}/"
            )
        weights = _find_weights(directory, repository)
    commit = directory.name if directory.parent.name == "snapshots" else None
    note = directory / ".cache" / "huggingface" / "download" / f"{WEIGHTS}.metadata"  # left by `hf download --local-dir`
    if note.is_file():
        commit = note.read_text().split("\n", 1)[0]
    return Checkpoint(directory, read_json(directory / CONFIG, "checkpoint"), weights, repository, commit or revision)


def expect(checkpoint: Checkpoint, config: object, settings: dict) -> None:
    """Refuse a configuration that gives the same tensors another meaning.

    Raises:
        UsageError: names every setting (an attribute of ``config``) that is not as expected.
    """
    found = {name: getattr(config, name) for name in settings}
    wrong = [f"{name} is {found[name]!r}, expected {value!r}" for name, value in settings.items() if found[name] != value]
    if wrong:
        raise UsageError(f"{checkpoint.directory} is another build than {checkpoint.repository}: {'; '.join(wrong)}")


def _read_index(index: Path) -> list[str]:
    """The files that an index of shards names."""
    names = read_json(index, "checkpoint").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise W2SError(f"{index} is damaged: expected a weight_map from tensors to files")
    return sorted(set(names.values()))


def _find_weights(directory: Path, repository: str) -> tuple[Path, ...]:
    """The safetensors files of a directory, one or as its index lists them."""
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    if (directory / INDEX).is_file():
        names = _read_index(directory / INDEX)
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UsageError(
                f"the checkpoint at {directory} is incomplete: {INDEX} lists {', '.join(missing)} as well; "
                f"fetch it from {repository}"
            )
        return tuple(directory / name for name in names)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    if pickles:
        raise UsageError(
            f"{directory} has only pickled weights ({', '.join(pickles)}); a pickle can run any code when it is opened, so "
            f"it is not read: fetch {WEIGHTS} from {repository}, or convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    raise UsageError(f"the checkpoint at {directory} has no {WEIGHTS}; fetch it from {repository}")


def _download(repository: str, revision: str | None) -> tuple[Path, tuple[Path, ...]]:
    """Directory and safetensors files of a repository on the hub, from the cache where they are there."""
    config, weights = (_fetch(repository, name, revision) for name in (CONFIG, WEIGHTS))
    if config and weights:
        return config.parent, (weights,)
    index = _fetch(repository, INDEX, revision) if config else None
    if index is None:
        lacking = f"{WEIGHTS} (pickled weights are never read)" if config else CONFIG
        raise UsageError(f"{repository} has no {lacking}; {_offline(repository)}")
    return config.parent, tuple(filter(None, (_fetch(repository, name, revision) for name in _read_index(index))))


def _fetch(repository: str, name: str, revision: str | None) -> Path | None:
    """One file of a repository; None if the repository does not have it."""
    try:
        from huggingface_hub import errors, hf_hub_download
        from huggingface_hub.utils import logging
    except ModuleNotFoundError as error:
        raise missing_extra("huggingface_hub", "teacher") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would tell of every retry what the error below says once
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except errors.RepositoryNotFoundError as error:
        raise UsageError(f"the Hugging Face hub has no {repository}, or it is private; {_offline(repository)}") from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repository} has no revision {revision!r} on the Hugging Face hub") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        cause = error
        while cause.__cause__ or cause.__context__:  # the hub's own message does not say what went wrong
            cause = cause.__cause__ or cause.__context__
        reason = str(cause).split("\n", 1)[0]
        raise UsageError(
            f"cannot fetch {name} of {repository} from the Hugging Face hub ({reason}); {_offline(repository)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _offline(repository: str) -> str:
    return (
        f"without a network: fetch {CONFIG} and {WEIGHTS} elsewhere (hf download {repository} --local-dir DIR), "
        "bring DIR here, and give --checkpoint-dir DIR"
    )


def torch_name(path: tuple[str, ...]) -> str:
    """What PyTorch calls a Flax parameter: ("encoder", "layer_norm", "scale") → "encoder.layer_norm.weight"."""
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    return ".".join((*path[:-1], leaf))


#: Newer PyTorch names the two parts of a weight norm differently.
SPELLINGS = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@contextlib.contextmanager
def _open(checkpoint: Checkpoint, file: Path) -> Iterator:
    """Open a safetensors file; errors say what is wrong with it and what to do."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise missing_extra("safetensors", "teacher") from error
    try:
        with safe_open(file, "numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError, TypeError) as error:
        raise W2SError(
            f"{file} is damaged or only partly downloaded ({error}); delete it and fetch it again from {checkpoint.repository}"
        ) from error


def _list_tensors(checkpoint: Checkpoint, file: Path) -> list[str]:
    with _open(checkpoint, file) as tensors:
        return list(tensors.keys())


#: Weights that only pre-training uses. A checkpoint need not have the first, which is a part of Hugging Face's modules; and it
#: may have the others, which are not.
UNUSED = ("masked_spec_embed",)
LEFT_OUT = ("quantizer.", "project_q.", "project_hid.")


def read(checkpoint: Checkpoint, expected: dict, place: Callable[[tuple[str, ...], np.ndarray], Array]) -> dict:
    """Stream the tensors of a checkpoint into a tree of Flax parameters; strict, but for weights that inference never touches.

    Names may begin with ``_orig_mod.`` and ``module.`` (torch.compile, DataParallel), if all do.

    Args:
        checkpoint: what ``find`` found.
        expected: the tree, with leaves that have a ``shape`` (from ``jax.eval_shape``).
        place: called with path and float32 array, one at a time; returns what goes into the tree.

    Returns:
        The tree.

    Raises:
        MismatchError: lists every missing, unexpected, mis-shaped or non-finite tensor. Nothing is left at a random value;
            what is missing of ``UNUSED`` is zero.
        W2SError: a file is truncated or damaged.
    """
    # Flax's layout is torch's backwards: Linear [out, in] and [in, out], Conv1d [out, in, width] and [width, in, out]
    wanted = {
        torch_name(path): (path, leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape)
        for path, leaf in flatten_dict(expected).items()
    }
    tree, faults, found = {}, [], set()
    bare = unwrapped(key for file in checkpoint.files for key in _list_tensors(checkpoint, file))
    for file in checkpoint.files:
        with _open(checkpoint, file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                name = bare[key]
                for new, old in SPELLINGS.items():
                    name = name.replace(new, old)
                if name in found:
                    faults.append(f"! {key}: there twice")
                elif name not in wanted:
                    if not name.startswith(LEFT_OUT):
                        faults.append(f"+ {key} {tuple(tensors.get_slice(key).get_shape())}")
                else:
                    path, shape = wanted[name]
                    array = tensors.get_tensor(key).astype(np.float32, copy=False)
                    fault = differences({key: array}, {key: shape})
                    faults += fault
                    if not fault:
                        tree[path] = place(path, np.ascontiguousarray(array.T) if path[-1] == "kernel" else array)
                found.add(name)
    for name, (path, shape) in wanted.items():
        if name not in found and path[-1] in UNUSED:
            tree[path] = place(path, np.zeros(shape, np.float32))
            found.add(name)
    faults += [f"- {name} {shape}" for name, (_, shape) in sorted(wanted.items()) if name not in found]
    refuse(faults, f"{checkpoint.directory} against {checkpoint.repository}")
    return unflatten_dict(tree)
