"""A trained student as plain files: model.safetensors (every array by its path) and config.json (what they mean)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from w2s_jax import SAMPLING_RATE, __version__, models
from w2s_jax.artifacts import MismatchError, UsageError, W2SError, read_json, write_atomic, write_json
from w2s_jax.devices import computing

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_student(directory: str | Path, name: str, fields: dict, variables: dict, about: dict) -> None:
    """Write a student directory.

    Args:
        directory: where to; made when missing. config.json is written last, so a directory with one is whole.
        name, fields: what ``models.build`` needs to make the module again; how it ran (``models.RUNNING``) is left out.
        variables: the collections ``params``, ``batch_stats`` and ``frontend``.
        about: what travels with the weights: ``dimensions`` (names, in output order) and ``teacher`` (provenance of the
            labels, with its licence) are required; anything else that JSON can hold is kept.
    """
    directory = Path(directory)
    # safetensors writes an array's memory as it lies, transposed or not
    arrays = {"/".join(path): np.ascontiguousarray(leaf) for path, leaf in flatten_dict(variables).items()}

    def write(temporary: Path) -> None:
        try:
            save_file(arrays, temporary, {"format": "w2s-student"})
        except SafetensorError as error:  # its kind of OSError
            raise OSError(str(error)) from error

    write_atomic(directory / WEIGHTS, write)
    config = {
        "format": "w2s-student",
        "version": 1,
        "student": name,
        "fields": {field: value for field, value in fields.items() if field not in models.RUNNING},
        "sampling_rate": SAMPLING_RATE,
        **about,
        "w2s_jax": __version__,
    }
    write_json(directory / CONFIG, config)


@computing()
def load_student(directory: str | Path) -> tuple[nn.Module, dict, dict]:
    """Read a student directory, or a run directory that has one in ``student/``.

    Returns:
        The linen module, its variables (float32 arrays), and config.json as a dict.

    Raises:
        UsageError: there is no student at that place.
        MismatchError: the arrays are not those of the student that config.json names; lists every difference.
        W2SError: a file is damaged.
    """
    directory = Path(directory)
    if (directory / "student" / CONFIG).exists():
        directory = directory / "student"
    config = read_json(directory / CONFIG, "student")
    if config.get("format") != "w2s-student":
        raise UsageError(f"{directory / CONFIG} does not describe a student of w2s_jax")
    student = models.build(config["student"], **config["fields"])
    try:
        arrays = load_file(directory / WEIGHTS)
    except FileNotFoundError as error:
        raise UsageError(f"no weights at {directory} (it has no {WEIGHTS})") from error
    except SafetensorError as error:
        raise W2SError(f"{directory / WEIGHTS} is damaged: {error}") from error
    shapes = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, SAMPLING_RATE)))
    expected = {"/".join(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
    check_arrays(arrays, expected, f"{directory / WEIGHTS} against student {config['student']}")
    variables = unflatten_dict({tuple(path.split("/")): array for path, array in arrays.items()})
    return student, variables, config


#: What torch.compile and DataParallel put before the names of a model that they wrap.
WRAPPERS = ("_orig_mod.", "module.")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names of tensors → the same without ``_orig_mod.`` and ``module.``, where every one begins so, in any order.

    Example:
        >>> unwrapped(["module._orig_mod.adv.bias", "module._orig_mod.adv.weight"])["module._orig_mod.adv.bias"]
        'adv.bias'
    """
    names = list(names)
    bare = names
    while prefix := next((p for p in WRAPPERS if bare and all(name.startswith(p) for name in bare)), None):
        bare = [name.removeprefix(prefix) for name in bare]
    return dict(zip(names, bare, strict=True))


def check_arrays(arrays: dict, expected: dict[str, tuple], what: str) -> None:
    """Refuse arrays by name unless names and shapes are exactly the expected ones and every value is finite.

    Raises:
        MismatchError: lists all that is missing (-), unexpected (+), of another shape or not finite (!).
    """
    refuse(differences(arrays, expected), what)


def differences(arrays: dict, expected: dict[str, tuple]) -> list[str]:
    """What ``check_arrays`` complains of, a line each."""
    faults = [f"- {name} {tuple(expected[name])}" for name in sorted(set(expected) - set(arrays))]
    faults += [f"+ {name} {arrays[name].shape}" for name in sorted(set(arrays) - set(expected))]
    for name in sorted(set(arrays) & set(expected)):
        if tuple(arrays[name].shape) != tuple(expected[name]):
            faults.append(f"! {name}: {arrays[name].shape}, expected {tuple(expected[name])}")
        elif not np.isfinite(arrays[name]).all():
            faults.append(f"! {name}: not finite")
    return faults


def refuse(faults: list[str], what: str) -> None:
    """Raise the MismatchError that lists the faults, if there are any."""
    if faults:
        raise MismatchError(f"{what}: {len(faults)} differences: {'; '.join(faults)}")
