"""Weights into our modules: timm's MobileNet trunks, audEERING's Wav2Small 17K (and back), and where a training starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from w2s_jax import DIMENSIONS, checkpoint, models
from w2s_jax.checkpoint import check_arrays, differences, refuse, unwrapped
from w2s_jax.devices import computing
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.files import fingerprint
from w2s_jax.models import RUNNING, mobilenet
from w2s_jax.models.frontend import MEL_FLOOR
from w2s_jax.models.mobilenet import Architecture, Bottleneck, Conv, Fused, MobileNetStudent, Separable, Trunk, Universal
from w2s_jax.models.wav2small import Wav2Small17K

#: timm's name → table and width multiplier.
TIMM: dict[str, tuple[Architecture, float]] = {
    "mobilenetv3_small_050": (mobilenet.V3_SMALL, 0.5),
    "mobilenetv3_small_075": (mobilenet.V3_SMALL, 0.75),
    "mobilenetv3_small_100": (mobilenet.V3_SMALL, 1.0),
    "mobilenetv3_large_075": (mobilenet.V3_LARGE, 0.75),
    "mobilenetv3_large_100": (mobilenet.V3_LARGE, 1.0),
    "mobilenetv4_conv_small_035": (mobilenet.V4_SMALL, 0.35),
    "mobilenetv4_conv_small_050": (mobilenet.V4_SMALL, 0.5),
    "mobilenetv4_conv_small": (mobilenet.V4_SMALL, 1.0),
    "mobilenetv4_conv_medium": (mobilenet.V4_MEDIUM, 1.0),
    "mobilenetv4_conv_large": (mobilenet.V4_LARGE, 1.0),
}

#: Row of a table → our layer → timm's names of its convolution and its BatchNorm.
LAYERS: dict[type, dict[str, tuple[str, str]]] = {
    Conv: {"conv": ("conv", "bn1")},
    Separable: {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")},
    Bottleneck: {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")},
    Fused: {"expand": ("conv_exp", "bn1"), "project": ("conv_pwl", "bn2")},
    Universal: {
        "before": ("dw_start.conv", "dw_start.bn"),
        "expand": ("pw_exp.conv", "pw_exp.bn"),
        "middle": ("dw_mid.conv", "dw_mid.bn"),
        "project": ("pw_proj.conv", "pw_proj.bn"),
    },
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

STEM = "conv_stem.weight"
#: Parts that our trunks end before, and a counter that is not used with a fixed momentum.
LEFT_OUT_HEADS, LEFT_OUT_COUNTER = ("classifier.", "conv_head.", "norm_head."), "num_batches_tracked"


def timm_key(architecture: Architecture, path: tuple[str, ...]) -> str:
    """What timm calls one of our arrays: ("stage2_0", "expand", "norm", "scale") → "blocks.2.0.bn1.weight" (V3)."""
    place, *layers, part, leaf = path
    if place == "stem":
        return f"{'conv_stem' if part == 'conv' else 'bn1'}.{LEAVES[leaf]}"
    stage, number = place.removeprefix("stage").split("_")
    if layers == ["squeeze"]:
        module = f"se.conv_{part}"
    else:
        conv, norm = LAYERS[type(architecture.stages[int(stage)][int(number)])][layers[0]]
        module = conv if part == "conv" else norm
    return f"blocks.{stage}.{number}.{module}.{LEAVES[leaf]}"


@computing()
def timm_trunk(name: str, arrays: Mapping[str, np.ndarray], fold_stem: bool = False) -> dict:
    """The variables of a trunk from timm's state dict; strict.

    Args:
        name: timm's name of the model, one of ``TIMM``.
        arrays: its state dict as numpy arrays: convolutions [out, in / groups, k, k], BatchNorms [channels]. Of these,
            ``classifier.*``, ``conv_head.*``, ``norm_head.*`` and every ``num_batches_tracked`` are left out: they may be
            there or not, and are not checked. Everything else must fit.
        fold_stem: turn a first convolution of three input channels, [out, 3, k, k], into one of one channel by adding the
            three up: the same output for an image whose three channels are equal. Changes nothing in a one-channel one.

    Returns:
        ``{"params": …, "batch_stats": …}``, float32, for ``Trunk(*TIMM[name])``, or for the entries ``trunk`` of the student
        with the same table and width.

    Raises:
        UsageError: no such model.
        MismatchError: lists every missing, unexpected, mis-shaped or non-finite tensor.

    Example:
        >>> trunk = Trunk(*TIMM["mobilenetv4_conv_small"])  # doctest: +SKIP
        >>> features = trunk.apply(timm_trunk("mobilenetv4_conv_small", arrays), image)  # doctest: +SKIP
    """
    if name not in TIMM:
        raise UsageError(f"no trunk for timm's {name!r}; there are: {', '.join(TIMM)}")
    architecture, width = TIMM[name]
    arrays = {
        key: np.asarray(array)
        for key, array in arrays.items()
        if not key.startswith(LEFT_OUT_HEADS) and key.split(".")[-1] != LEFT_OUT_COUNTER
    }
    three = STEM in arrays and arrays[STEM].ndim == 4 and arrays[STEM].shape[1] == 3
    if three and fold_stem:
        arrays[STEM] = arrays[STEM].astype(np.float32).sum(axis=1, keepdims=True)

    shapes = jax.eval_shape(Trunk(architecture, width).init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    paths, expected = {}, {}
    for path, leaf in flatten_dict(shapes).items():
        key = timm_key(architecture, path[1:])  # without the collection
        paths[path] = key
        expected[key] = leaf.shape if len(leaf.shape) == 1 else tuple(leaf.shape[axis] for axis in (3, 2, 0, 1))
    faults = differences(arrays, expected)
    if three and not fold_stem:
        hint = "; fold_stem=True adds its three input channels up, which suits an image whose channels are equal"
        faults = [fault + hint if fault.startswith(f"! {STEM}:") else fault for fault in faults]
    refuse(faults, f"arrays against timm's {name} with one input channel")

    tree = {path: arrays[key].astype(np.float32) for path, key in paths.items()}
    tree = {path: array if array.ndim == 1 else array.transpose(2, 3, 1, 0) for path, array in tree.items()}
    return unflatten_dict(tree)


def load_timm(path: str | os.PathLike, name: str, fold_stem: bool = False) -> dict:
    """The variables of a trunk from a safetensors file of timm's; strict.

    Args:
        path: the file, for example the model.safetensors of a repository ``timm/…`` on the Hugging Face hub.
        name, fold_stem: as in ``timm_trunk``.

    Returns:
        ``{"params": …, "batch_stats": …}``, as from ``timm_trunk``.

    Raises:
        UsageError: no such model or file, or the file is a pickle, which is never read.
        MismatchError: as in ``timm_trunk``.
        W2SError: the file is damaged or not safetensors.
    """
    return timm_trunk(name, _read(path), fold_stem)


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by their names outside of any wrapper; a pickle is refused unopened."""
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except OSError as error:
        raise UsageError(f"cannot read weights at {path}: {error.strerror}") from error
    if head == b"PK" or head[:1] == b"\x80":  # torch.save's zip archive, and the pickles of older versions
        raise UsageError(
            f"{path} is a pickle, which can run any code when it is opened, so it is not read; fetch the model.safetensors of "
            "the same model, or convert the file where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    try:
        arrays = load_file(path)
        return {bare: arrays[name] for name, bare in unwrapped(arrays).items()}
    except (SafetensorError, TypeError) as error:  # a TypeError is a number format that numpy does not have
        raise W2SError(f"{path} is damaged or not a safetensors file of floats: {error}") from error


#: Axes and shapes of audEERING's published Wav2Small 17K against ours: kind → (theirs to ours, ours to theirs).
_KINDS = {
    "same": (lambda a: a, lambda a: a),
    "dense": (lambda a: a.T, lambda a: a.T),
    "convolution": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "pointwise": (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
    "fourier": (lambda a: a[:, 0].T, lambda a: a.T[:, None]),
}


def _layout_17k() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Name there, path here, and kind, of every tensor."""
    for layer in (f"l{number}" for number in range(1, 8)):
        yield f"vgg7.{layer}.conv.weight", ("params", "vgg7", layer, "conv", "kernel"), "convolution"
        for theirs, collection, ours in (
            ("weight", "params", "scale"),
            ("bias", "params", "bias"),
            ("running_mean", "batch_stats", "mean"),
            ("running_var", "batch_stats", "var"),
        ):
            yield f"vgg7.{layer}.norm.{theirs}", (collection, "vgg7", layer, "norm", ours), "same"
    for name in ("lin", "sof"):
        yield f"vgg7.{name}.weight", ("params", "pool", name, "kernel"), "pointwise"
        yield f"vgg7.{name}.bias", ("params", "pool", name, "bias"), "same"
    yield "adv.weight", ("params", "adv", "kernel"), "dense"
    yield "adv.bias", ("params", "adv", "bias"), "same"
    for part in ("real", "imag"):
        yield f"vgg7.spectrogram_extractor.conv_{part}.weight", ("frontend", "logmel", part), "fourier"
    yield "vgg7.logmel_extractor.melW", ("frontend", "logmel", "mel"), "same"


def _not_weights(name: str) -> bool:
    """PyTorch's counters, and the floor of the logarithm, which is ``frontend.MEL_FLOOR`` here."""
    return name.endswith(".num_batches_tracked") or name == "vgg7.logmel_extractor.amin"


@computing()
def wav2small_17k(arrays: dict[str, np.ndarray]) -> dict:
    """Variables of ``Wav2Small17K`` from audEERING's published file.

    Args:
        arrays: its tensors by the published names (``vgg7.l1.conv.weight``, …, ``adv.bias``), as safetensors gives them.

    Returns:
        The collections params, batch_stats and frontend, float32.

    Raises:
        MismatchError: lists every missing, unexpected, mis-shaped or non-finite tensor.
    """
    module = Wav2Small17K()
    shapes = flatten_dict(models.shapes(module))
    expected = {name: _KINDS[kind][1](np.empty(shapes[path].shape)).shape for name, path, kind in _layout_17k()}
    known = {name: np.asarray(array) for name, array in arrays.items() if not _not_weights(name)}
    check_arrays(known, expected, "these arrays against the published Wav2Small 17K")
    ours = {path: _KINDS[kind][0](known[name]) for name, path, kind in _layout_17k()}
    return unflatten_dict({path: np.ascontiguousarray(array, np.float32) for path, array in ours.items()})


def published_17k(variables: dict) -> dict[str, np.ndarray]:
    """Variables of a ``Wav2Small17K`` by the names and in the shapes of the published one; ``wav2small_17k`` backwards.

    With PyTorch's counters (0) and the logarithm's floor, so that a strict ``load_state_dict`` takes them.
    """
    flat = flatten_dict(variables)
    arrays = {name: np.ascontiguousarray(_KINDS[kind][1](np.asarray(flat[path]))) for name, path, kind in _layout_17k()}
    counters = {f"vgg7.l{layer}.norm.num_batches_tracked": np.zeros((), np.int64) for layer in range(1, 8)}
    return {**arrays, **counters, "vgg7.logmel_extractor.amin": np.array([MEL_FLOOR], np.float32)}


def start(name: str, student: nn.Module, dimensions: Sequence[str], path: str | os.PathLike) -> tuple[dict, dict]:
    """What a student takes over from trained weights before it is trained; strict.

    Args:
        name, student: one of ``models.STUDENTS``, and the module that ``models.build`` made of it.
        dimensions: names of the student's outputs. An output layer is taken over only if it has the same names in the same
            order; it then speaks in the units that it was trained in, as the weights do.
        path: a student directory or a run of the same student, with the same fields but ``dimensions``: all is taken. Or a
            safetensors file: for a MobileNet timm's of the same table and width, of which the trunk is taken (weights for
            colour images take the log-mel image in all three channels); for ``wav2small_17k`` the published one, all of it.

    Returns:
        What replaces entries of the student's variables, ``{"params": {"trunk": …}, …}``, float32; and where it is from, for
        JSON: ``source`` (name of the file or directory), ``what``, ``fingerprint``, ``licence``.

    Raises:
        UsageError: nothing there, a pickle, or nothing that this student can start from.
        MismatchError: the weights are those of another network; lists every difference.
        W2SError: a file is damaged.
    """
    path = Path(path)
    timm = file = None
    if isinstance(student, MobileNetStudent):
        widths = {width: timm for timm, (table, width) in TIMM.items() if table == student.architecture}
        timm = widths.get(student.width)
        file = timm and f"a safetensors file of timm's {timm}"
    elif isinstance(student, Wav2Small17K):
        file = "a safetensors file in audEERING's published layout"
    expected = " or ".join(filter(None, [file, f"the directory of a student or run of {name}"]))
    if path.is_dir():
        return _from_student(name, student, dimensions, path, expected)
    if not path.exists():
        raise UsageError(f"nothing to start {name} from at {path}; expected {expected}")
    if isinstance(student, MobileNetStudent) and not timm:
        known = ", ".join(f"{width:g} ({timm})" for width, timm in widths.items())
        raise UsageError(
            f"timm has no weights for {name} of width {student.width:g}; it has them for width {known}: set fields.width to "
            f"one of these, or give {expected}"
        )
    if not file:
        raise UsageError(f"{path} is a file, from which {name} cannot start; expected {expected}")

    arrays = _read(path)
    if any(key.startswith("params/") for key in arrays):
        raise UsageError(f"{path} holds the arrays of a w2s student; expected {expected}, not the file in it")
    about = {"source": last_name(path), "fingerprint": fingerprint(path)}
    if timm:
        trunk = timm_trunk(timm, arrays, fold_stem=True)
        about |= {"what": f"timm {timm}", "licence": "see the source of the weights"}
        return {collection: {"trunk": tree} for collection, tree in trunk.items()}, about
    differing = _differing_fields(Wav2Small17K(), student)
    if differing:
        raise UsageError(
            f"the published Wav2Small 17K has other fields than this student ({'; '.join(differing)}); "
            f"leave them at their defaults, or give the directory of a student or run of {name} with the same"
        )
    about |= {"what": "audEERING Wav2Small 17K", "licence": "CC BY-NC-SA 4.0"}
    return _without_other_outputs(wav2small_17k(arrays), DIMENSIONS, dimensions), about


def _from_student(name: str, student: nn.Module, dimensions: Sequence[str], path: Path, expected: str) -> tuple[dict, dict]:
    """``start`` from a directory."""
    try:
        theirs, taken, config = checkpoint.load_student(path)
    except UsageError as error:
        raise UsageError(f"{error}; to start {name}, give {expected}") from error
    differing = [f"student: {config['student']} there, {name} here"] if config["student"] != name else []
    differing = differing or _differing_fields(theirs, student)
    if differing:
        raise MismatchError(
            f"the student at {path} is another one than is to be trained ({'; '.join(differing)}); "
            "give one with the same fields, or train with its fields (--set fields.NAME=VALUE)"
        )
    place = checkpoint.find_student(path)
    # a student that was started from other weights hands their terms on
    licences = [part["licence"] for part in (config["teacher"], config.get("pretrained")) if part]
    about = {
        "source": last_name(path),
        "what": f"student {name} of teacher {config['teacher']['name']}",
        "fingerprint": fingerprint(place / checkpoint.WEIGHTS, place / checkpoint.CONFIG),
        "licence": "; ".join(dict.fromkeys(licences)),
    }
    return _without_other_outputs(taken, config["dimensions"], dimensions), about


def last_name(path: str | os.PathLike) -> str:
    """The name of a file or directory; not of what a link points to, which the hub's cache calls by a hash."""
    return Path(os.path.abspath(path)).name


def _differing_fields(there: nn.Module, here: nn.Module) -> list[str]:
    """The fields that decide the arrays of two modules of one class, but ``dimensions``, where they differ."""
    no_matter = ("parent", "name", "dimensions", *RUNNING)
    fields = [field for field in here.__dataclass_fields__ if field not in no_matter]
    pairs = [(field, getattr(there, field), getattr(here, field)) for field in fields]
    return [f"{field}: {theirs} there, {ours} here" for field, theirs, ours in pairs if theirs != ours]


def _without_other_outputs(variables: dict, theirs: Sequence[str], ours: Sequence[str]) -> dict:
    """The variables, without the output layer where its outputs are others."""
    if tuple(theirs) == tuple(ours):
        return variables
    return {**variables, "params": {key: value for key, value in variables["params"].items() if key != "adv"}}
