"""The description of a run: its arguments, all that follows from them before the first step, and its config.json."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from w2s_jax import __version__, checkpoint, convert, models
from w2s_jax.bank import Bank
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.feed import Batches, divide
from w2s_jax.files import fingerprint, read_json, write_json
from w2s_jax.labels import Labels
from w2s_jax.models import forms
from w2s_jax.models.wav2small import Wav2SmallStudent
from w2s_jax.parallel import PARALLEL, Jit, Layout, Pmap, is_main_process, lay_out
from w2s_jax.train import units
from w2s_jax.train.checkpoints import Checkpoints
from w2s_jax.train.step import State
from w2s_jax.views import Views

#: To be increased with every change of the loss, the step, rendering or a student that makes a run compute other numbers from
#: the same settings. A run is resumed only with the version that it was started with.
NUMERICS = 1
#: The format of a run's config.json.
VERSION = 1

#: Settings that may change when a run is resumed: its length, and how often it is evaluated and logged.
_LENGTH = ("steps", "eval_every", "log_every")
#: Settings that config.json leaves out: they say where and how a run is computed, not what it computes. Weights to start from
#: are identified by their content, not by their path.
_UNRECORDED = {"pretrained", "parallel", "bank_placement", "bank_gib", "workers", "scan_steps"}


#: Setting → what its value has to be, in words and as a function.
LIMITS = {
    **dict.fromkeys(("steps", "eval_every", "log_every", "accumulate"), ("at least 1", lambda value: value >= 1)),
    "batch_size": ("at least 2: a CCC compares how values vary", lambda value: value >= 2),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "l2", "jitter"), ("a number of at least 0", lambda value: 0 <= value < math.inf)
    ),
    "clip_norm": ("a number above 0", lambda value: 0 < value < math.inf),
    "warmup": ("a share of the steps, 0 to 1", lambda value: 0 <= value <= 1),
    "ema": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "crop": ("a share of each view, above 0 and at most 1", lambda value: 0 < value <= 1),
    "seed": ("a whole number of at least 0 and below 2³¹", lambda value: 0 <= value < 2**31),
    **dict.fromkeys(("scan_steps", "data_shards", "workers"), ("at least 0", lambda value: value >= 0)),
    "bank_gib": ("at least 0", lambda value: 0 <= value < math.inf),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run: the arguments of ``train``, and all that follows from them before the first step."""

    config: ConfigDict
    bank: Bank
    views: Views
    labels: Labels
    workdir: Path
    profile: bool = False
    progress: Callable[..., None] | None = None
    say: Callable[[str], None] | None = None

    def check(self) -> None:
        """Refuse settings and views that cannot be trained on.

        Raises:
            UsageError, MismatchError: as ``train``.
        """
        config = self.config
        self.views.check(self.bank)
        if not len(self.training_views):
            raise UsageError("the views have no training split; build the bank with one")
        if len(self.validation_views) == 1:
            raise UsageError(
                "there is one validation view, and a CCC compares how values vary: it needs two at least. Draw more of each "
                "clip (w2s views draw --eval-per-clip), or build the bank with more validation clips"
            )
        for name, (expected, fits) in LIMITS.items():
            if not fits(config[name]):
                raise UsageError(f"{name} is {config[name]}; expected {expected}")
        for name in sorted({"dimensions", *models.RUNNING} & set(config.fields)):
            way = {"dimensions": "the labels decide it", "axis_name": "training sets it"}.get(name, f"use --set {name}=VALUE")
            raise UsageError(f"fields.{name} cannot be set: {way}")
        if config.jitter and not isinstance(self.student, Wav2SmallStudent):
            raise UsageError(f"{config.student} has no jitter: only Wav2Small students run as streams; set jitter=0")
        if config.parallel not in PARALLEL:
            raise UsageError(f"parallel is {config.parallel!r}; expected {' or '.join(PARALLEL)}")

    def message(self, text: str) -> None:
        """Pass a message to ``say``, in the main process."""
        if self.say and is_main_process():
            self.say(text)

    @cached_property
    def training_views(self) -> np.ndarray:
        """Rows of the views that are trained on."""
        return self.views.where("train")

    @cached_property
    def validation_views(self) -> np.ndarray:
        """Rows of the views that the best student is chosen on."""
        return self.views.where("validation")

    @cached_property
    def units(self) -> units.Units:
        """Mean and deviation of the training labels."""
        return units.measure(self.labels.values[self.training_views])

    @cached_property
    def schedule(self) -> optax.Schedule:
        """The learning rate: a linear warm-up, then a cosine decay to 0."""
        peak, steps = self.config.learning_rate, self.config.steps
        return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, round(self.config.warmup * steps)), max(2, steps))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipped gradients; only kernels decay, scales and biases do not."""

        def is_kernel(params: dict) -> dict:
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        return optax.chain(
            optax.clip_by_global_norm(self.config.clip_norm),
            optax.adamw(self.schedule, weight_decay=self.config.weight_decay, mask=is_kernel),
        )

    @cached_property
    def layout(self) -> Layout:
        """Devices and data shards: ``config.data_shards``, or where that is 0 the number that the run was started with."""
        data_shards, path = self.config.data_shards, self.workdir / "config.json"
        if not data_shards and path.exists():
            data_shards = read_json(path, "run").get("config", {}).get("data_shards", 0)
        return lay_out(data_shards, self.config.batch_size, self.config.accumulate)

    @cached_property
    def parallel(self) -> Jit | Pmap:
        """How the devices run a step together."""
        return PARALLEL[self.config.parallel](self.layout)

    @cached_property
    def fields(self) -> dict:
        """Fields of the student's module."""
        return {"dimensions": len(self.labels.dimensions), **self.config.fields.to_dict()}

    @cached_property
    def student(self) -> nn.Module:
        """The module that is evaluated and saved."""
        return models.build(self.config.student, **self.fields)

    @cached_property
    def training_student(self) -> nn.Module:
        """The student with the fields that say how it is computed in training."""
        fields = {"axis_name": self.parallel.axis_name, "dtype": self.config.dtype, "form": self.config.form}
        defaults = {"axis_name": None, "dtype": "float32", "form": "auto"}
        changed = {name: value for name, value in fields.items() if value != defaults[name]}
        if not hasattr(self.student, "axis_name") and "batch_stats" not in models.shapes(self.student):
            changed.pop("axis_name", None)  # it has no moments to take over devices
        return models.build(self.config.student, **self.fields, **changed)

    @cached_property
    def kernel(self) -> str:
        """What computes the student's convolutions in training."""
        form, dtype = getattr(self.training_student, "form", None), jnp.dtype(self.config.dtype)
        if form is None:
            return "xla"
        shape = (getattr(self.training_student, "kernel", 3), getattr(self.training_student, "stride", 1))
        return "native" if forms.trains_natively(form, *shape, dtype, self.parallel.axis_name) else forms.resolve(form)

    @cached_property
    def pretrained(self) -> tuple[dict, dict | None]:
        """Variables that the student takes over from ``config.pretrained``, and their provenance."""
        source = self.config.pretrained
        if not source:
            return {}, None
        if not Path(source).exists() and ocp.utils.checkpoint_steps(self.workdir / "checkpoints"):
            # a checkpoint has all that a resumed run needs; without the weights only their name can be compared
            recorded = read_json(self.workdir / "config.json", "run").get("pretrained")
            if recorded and recorded["source"] == convert.last_name(source):
                return {}, recorded
        return convert.start(self.config.student, self.student, self.labels.dimensions, source)

    @cached_property
    def shard_of_view(self) -> np.ndarray:
        """The data shard of each training view, int32 [V]."""
        return divide(self.views.columns["clip"][self.training_views], self.layout.data_shards)

    @cached_property
    def batches(self) -> Batches:
        """The views of every step."""
        samples, config = self.views.columns["samples"][self.training_views], self.config
        divided = self.shard_of_view, self.layout.data_shards
        return Batches(samples, config.batch_size, config.steps, config.seed, *divided)

    @cached_property
    def about(self) -> dict:
        """The content of config.json: what makes this run another one than others."""
        config = {key: value for key, value in json.loads(self.config.to_json()).items() if key not in _UNRECORDED}
        return {
            "format": "w2s-run",
            "version": VERSION,
            "config": config | {"data_shards": self.layout.data_shards},
            "pretrained": self.pretrained[1],
            "bank": self.bank.fingerprint,
            "views": self.views.fingerprint,
            "teacher": self.labels.about["teacher"],
            "numerics": NUMERICS,
            "computed": {"kernel": self.kernel, "platform": jax.default_backend(), "jax": jax.__version__},
            "w2s_jax": __version__,
        }

    def write_config(self, done: int, planned_steps: int) -> None:
        """Write config.json. ``planned_steps`` is the length that the run had before.

        Raises:
            UsageError: more steps are done than the run shall have.
        """
        steps = self.config.steps
        if done > steps:
            raise UsageError(f"{self.workdir} has {done} steps behind it, more than steps={steps}; set steps to more than that")
        if is_main_process():
            write_json(self.workdir / "config.json", self.about | {"checksum": _checksum(self.about)})
        if steps != planned_steps:
            self.message(
                f"the run was to have {planned_steps} steps and now has {steps}: it goes on from step {done} with the "
                f"schedule over {steps} steps, where the learning rate is {float(self.schedule(done)):.3g} now"
            )

    def initial_variables(self) -> dict:
        """The student's variables before the first step: random, or taken over from ``config.pretrained``.

        Raises:
            UsageError: the student needs longer views, or has no output layer ``adv``.
        """
        shortest = int(self.config.crop * min(self.batches.lengths))
        if shortest < self.student.minimum_samples:
            raise UsageError(
                f"a step is given {shortest} samples of the shortest views; {self.config.student} needs "
                f"{self.student.minimum_samples}: draw longer views, or set crop=1"
            )
        init = jax.jit(self.student.init)  # compiled, because most of an eager init is a forward pass that is not needed
        variables = init(jax.random.key(self.config.seed), jnp.zeros((1, int(self.batches.lengths[0]))))
        if set(variables["params"].get("adv", ())) != {"kernel", "bias"}:
            raise UsageError(
                f"student {self.config.student} has no output layer adv, an nn.Dense with bias, which takes up the unit of the "
                f"labels; it has {', '.join(variables['params'])} (see w2s_jax.models.Student)"
            )
        taken = jax.tree.map(jnp.asarray, self.pretrained[0])
        if "adv" in taken.get("params", {}):
            taken["params"] = units.unfold_units(taken["params"], self.units)
        return jax.device_get({name: {**tree, **taken.get(name, {})} for name, tree in variables.items()})

    def checkpoint_trees(self, state: State, frontend: dict) -> dict:
        """The arrays of a checkpoint. A front end that was taken over can differ from what ``init`` computes."""
        return {"state": state, "frontend": frontend} if self.pretrained[1] else {"state": state}

    def restore(self, checkpoints: Checkpoints, state: State, frontend: dict) -> tuple[State, dict, dict]:
        """State and front end of the last checkpoint, or of step 0; and the evaluation of the student in student/.

        Warns:
            UserWarning: that student is damaged, so the best is lost; its step is None then.
        """
        best = {"step": 0, "ccc": None}
        restored = checkpoints.restore(self.checkpoint_trees(state, frontend))
        if restored is None:
            return state, frontend, best
        trees, saved = restored
        if not saved["step"]:  # stopped before the first evaluation: there is no best student yet
            return trees["state"], trees.get("frontend", frontend), best
        try:
            best = {"step": None, "ccc": None}
            about = checkpoint.load_student(self.workdir / "student")[2]
            best = {"step": about["step"], "ccc": about.get("validation_ccc")}
        except W2SError as error:
            if is_main_process():
                warnings.warn(
                    f"{error}; so the best student, of step {saved['step']}, is lost, and that of the last step is kept",
                    stacklevel=2,
                )
        return trees["state"], trees.get("frontend", frontend), best


def check_resumable(workdir: Path, about: dict) -> int:
    """Refuse a directory that holds another run than ``about``, the content of config.json, describes.

    Returns:
        The number of steps that the run in the directory was planned for; without one, that of ``about``.

    Raises:
        UsageError: something else than a run, or config.json has another version, or is missing beside checkpoints.
        MismatchError: another run that has checkpoints; lists the differences.
        W2SError: config.json is damaged.

    Warns:
        UserWarning: another kernel, platform or JAX, which round differently.
    """
    for file, what in (("plan.json", "a bank or labels"), ("bank.json", "a bank"), ("export.json", "a model directory")):
        if (workdir / file).exists():
            raise UsageError(f"{workdir} is {what} (it has {file}); choose another --workdir")
    path, begun = workdir / "config.json", any((workdir / "checkpoints").glob("[0-9]*"))
    if not path.exists():
        if begun:
            raise UsageError(
                f"{workdir} has checkpoints, but no {path.name} that describes their run; choose another --workdir"
            )
        return about["config"]["steps"]
    before = read_json(path, "run")
    version = before.get("version", 1)
    if version != VERSION:
        raise UsageError(f"{path} has version {version}, expected {VERSION}; another version of w2s_jax made this run")
    expected = _checksum(before)
    if before.pop("checksum", expected) != expected:  # runs of 0.1 have none
        raise W2SError(f"{path} is damaged, or was changed by hand: its checksum is not right; choose another --workdir")
    old, new = flatten_dict(before, sep="."), flatten_dict(about, sep=".")
    old.setdefault("numerics", 1)  # runs of 0.1 do not record it
    if "config.steps" in old:
        old.setdefault("config.jitter", 0.0)  # of before there was one
    free = {"format", "version", "w2s_jax", *(f"config.{name}" for name in _LENGTH)}
    differing = [key for key in old | new if old.get(key) != new.get(key) and key not in free]
    rounding = [key for key in differing if key.startswith("computed.") and key in old]
    differing = [key for key in differing if not key.startswith("computed.")]

    def describe(keys: list[str]) -> str:
        return "; ".join(f"{key.removeprefix('computed.')}: {old.get(key)} there, {new.get(key)} now" for key in keys)

    if differing and "config.student" in old and not begun:
        return about["config"]["steps"]  # that run ended before its first checkpoint: there is nothing to lose
    if differing:
        made = f", made by w2s_jax {old.get('w2s_jax')}," if "numerics" in differing else ""
        raise MismatchError(
            f"{workdir} holds another run{made} ({describe(differing)}); choose another --workdir, or delete it"
        )
    if rounding and is_main_process():
        warnings.warn(
            f"{workdir} was computed in another way so far ({describe(rounding)}); it goes on, but will not end bit for bit "
            "where an unbroken run ends",
            stacklevel=2,
        )
    steps = old.get("config.steps")
    return steps if isinstance(steps, int) else about["config"]["steps"]


def planned_steps(workdir: str | os.PathLike, otherwise: int) -> int:
    """The number of steps that the run in a directory is planned for; ``otherwise`` where there is none."""
    path = Path(workdir) / "config.json"
    config = read_json(path, "run").get("config") if path.is_file() else None
    steps = config.get("steps") if isinstance(config, dict) else None
    return steps if isinstance(steps, int) else otherwise


def _checksum(about: dict) -> str:
    return fingerprint({**about, "checksum": None})
