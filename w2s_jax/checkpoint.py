"""A trained student as plain files: model.safetensors (arrays by their paths) and config.json (their meaning)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from w2s_jax import SAMPLING_RATE, __version__, models
from w2s_jax.devices import computing
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.files import fingerprint, read_json, write_atomic, write_json
from w2s_jax.names import check_dimensions, line

WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: The format of config.json.
VERSION = 1
#: Keys of config.json that hold checksums: of the weights, and of the other keys.
SUMS = ("weights", "checksum")
#: Keys of config.json → type of their values.
_KINDS = {"student": str, "fields": dict, "sampling_rate": int, "dimensions": list, "teacher": dict}
#: The same of its teacher.
_OF_TEACHER = {"name": str, "fingerprint": str, "licence": str, "stand_in": bool}
_JSON = {str: "a text", dict: "an object", int: "a whole number", list: "a list", bool: "true or false"}


def save_student(directory: str | Path, name: str, fields: dict, variables: dict, about: dict) -> None:
    """Write a student directory.

    Args:
        directory: made when missing. config.json is written last, so a directory that has one is complete.
        name, fields: arguments of ``models.build``; fields of how it is computed (``models.RUNNING``) are left out.
        variables: the collections ``params``, ``batch_stats`` and ``frontend``.
        about: the rest of config.json: ``dimensions`` (names, in output order) and ``teacher`` (provenance of the labels,
            with its licence) are required; anything else that JSON can hold is allowed.
    """
    directory = Path(directory)
    # safetensors writes memory in its order, so a transposed array would be saved wrongly
    arrays = {"/".join(path): np.ascontiguousarray(leaf) for path, leaf in flatten_dict(variables).items()}

    def write(temporary: Path) -> None:
        try:
            save_file(arrays, temporary, {"format": "w2s-student"})
        except SafetensorError as error:  # its kind of OSError
            raise OSError(str(error)) from error

    write_atomic(directory / WEIGHTS, write)
    config = {
        "format": "w2s-student",
        "version": VERSION,
        "student": name,
        "fields": {field: value for field, value in fields.items() if field not in models.RUNNING},
        "sampling_rate": SAMPLING_RATE,
        **{key: value for key, value in about.items() if key not in SUMS},
        "w2s_jax": __version__,
        "weights": fingerprint(directory / WEIGHTS),
    }
    config["checksum"] = _checksum(config)
    write_json(directory / CONFIG, config)


def find_student(directory: str | Path) -> Path:
    """The student directory of a run, ``directory``/student, or else ``directory`` itself."""
    inside = Path(directory) / "student"
    return inside if (inside / CONFIG).exists() else Path(directory)


@computing()
def load_student(directory: str | Path) -> tuple[nn.Module, dict, dict]:
    """Read a student directory, or a run directory that has one in ``student/``.

    Returns:
        The linen module, its variables (float32 arrays), and config.json as a dict.

    Raises:
        UsageError: there is no student at that place.
        MismatchError: the arrays are not those of the student that config.json names; lists every difference.
        W2SError: a file is damaged, or config.json has another version or an invalid value.
    """
    directory = find_student(directory)
    config = read_json(directory / CONFIG, "student")
    if config.get("format") != "w2s-student":
        raise UsageError(f"{directory / CONFIG} does not describe a student of w2s_jax")
    check_config(config, directory / CONFIG)
    try:
        student = models.build(config["student"], **config["fields"])
    except W2SError as error:
        raise type(error)(f"{directory / CONFIG}: {error}") from error
    if student.dimensions != len(config["dimensions"]):
        counts = f"{student.dimensions} outputs, but {len(config['dimensions'])} names of dimensions"
        raise MismatchError(f"{directory / CONFIG}: the student has {counts}")
    if "weights" in config and (directory / WEIGHTS).is_file():
        actual = fingerprint(directory / WEIGHTS)
        if actual != config["weights"]:
            reason = f"its fingerprint is {actual}, but {line(config['weights'], 16)} in {CONFIG}"
            raise W2SError(f"{directory / WEIGHTS} is damaged: {reason}; copy it again, or train again")
    try:
        arrays = load_file(directory / WEIGHTS)
    except FileNotFoundError as error:
        raise UsageError(f"no weights at {directory} (it has no {WEIGHTS})") from error
    except SafetensorError as error:
        raise W2SError(f"{directory / WEIGHTS} is damaged: {error}") from error
    try:
        shapes = models.shapes(student)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:  # fields that are valid one by one, but not together
        raise W2SError(f"{directory / CONFIG}: its fields make no student: {line(error, 200)}") from error
    expected = {"/".join(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
    check_arrays(arrays, expected, f"{directory / WEIGHTS} against student {config['student']}")
    variables = unflatten_dict({tuple(path.split("/")): array for path, array in arrays.items()})
    return student, variables, config


#: Prefixes that torch.compile and DataParallel add to the names of a model that they wrap.
WRAPPERS = ("_orig_mod.", "module.")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Map names of tensors to names without ``_orig_mod.`` and ``module.``, where all begin with them, in any order.

    Example:
        >>> unwrapped(["module._orig_mod.adv.bias", "module._orig_mod.adv.weight"])["module._orig_mod.adv.bias"]
        'adv.bias'
    """
    names = list(names)
    bare = names
    while prefix := next((p for p in WRAPPERS if bare and all(name.startswith(p) for name in bare)), None):
        bare = [name.removeprefix(prefix) for name in bare]
    return dict(zip(names, bare, strict=True))


def _checksum(config: dict) -> str:
    return fingerprint({key: value for key, value in config.items() if key != "checksum"})


def check_config(config: dict, path: Path) -> None:
    """Check the content of a student's config.json.

    Raises:
        W2SError: names the key, its value and the expected one; or the checksum is wrong, or the version is another.
    """
    if config.get("version") != VERSION or isinstance(config["version"], bool):
        version = line(repr(config.get("version")), 40)
        raise W2SError(f"{path} has version {version}, expected {VERSION}; read it with the w2s_jax that wrote it")
    if "checksum" in config and config["checksum"] != _checksum(config):
        raise W2SError(f"{path} is damaged, or was changed by hand: its checksum is not right; copy it again, or train again")
    for what, kinds, where in (("", _KINDS, config), ("teacher.", _OF_TEACHER, config.get("teacher"))):
        for key, kind in kinds.items():
            if not isinstance(where, dict) or not isinstance(where.get(key), kind) or (kind is int and where[key] is True):
                value = line(repr(where.get(key)), 40) if isinstance(where, dict) else "missing"
                raise W2SError(f"{path}: {what}{key} is {value}, expected {_JSON[kind]}")
    if config["sampling_rate"] != SAMPLING_RATE:
        raise W2SError(f"{path}: sampling_rate is {config['sampling_rate']}, expected {SAMPLING_RATE}")
    check_dimensions(config["dimensions"], path)
    for key in ("name", "licence"):
        if config["teacher"][key] != line(config["teacher"][key]):
            raise W2SError(f"{path}: teacher.{key} is {line(ascii(config['teacher'][key]), 60)}, expected one printable line")
    if (pretrained := config.get("pretrained")) is not None:  # else the weights started from nothing
        parts = pretrained if isinstance(pretrained, dict) else {}
        for key in ("what", "source", "fingerprint", "licence"):
            if not isinstance(parts.get(key), str):
                raise W2SError(f"{path}: pretrained.{key} is {line(repr(parts.get(key)), 40)}, expected a text")
    if (scores := config.get("validation_ccc")) is not None:  # else there were no validation views
        fits = isinstance(scores, dict) and all(isinstance(scores.get(name), (int, float)) for name in config["dimensions"])
        if not fits:
            raise W2SError(f"{path}: validation_ccc is {line(repr(scores), 60)}, expected a number for each dimension")


def check_arrays(arrays: dict, expected: dict[str, tuple], what: str) -> None:
    """Refuse arrays by name unless names and shapes are exactly the expected ones and every value is finite.

    Raises:
        MismatchError: lists all that is missing (-), unexpected (+), of another shape or not finite (!).
    """
    refuse(differences(arrays, expected), what)


def differences(arrays: dict, expected: dict[str, tuple]) -> list[str]:
    """The differences that ``check_arrays`` refuses, a line each."""
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
