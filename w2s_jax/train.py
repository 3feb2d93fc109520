"""Train a student on a teacher's labels: a pure step, and a driver that can be killed at any point.

The step is the same on one device, on many under ``jit`` (a global batch that is sharded over a mesh) and under ``pmap``; many
processes, on many machines, run the driver together.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import absl.logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from w2s_jax import __version__, checkpoint, convert, metrics, models, observe
from w2s_jax.bank import Bank
from w2s_jax.devices import computing
from w2s_jax.errors import MismatchError, UsageError, W2SError
from w2s_jax.evaluate import predict_views
from w2s_jax.feed import Batches, DeviceFeed, HostFeed, divide, plan, stack
from w2s_jax.files import fingerprint, read_json, write_json
from w2s_jax.labels import Labels
from w2s_jax.locks import locked
from w2s_jax.losses import distillation_loss
from w2s_jax.models import forms, native
from w2s_jax.parallel import PARALLEL, first, gathered, lay_out, meet, together
from w2s_jax.views import Views

#: Steps in one dispatch. On CPUs XLA runs a convolution inside a loop many times slower, so there each step is a dispatch of
#: its own (measured: experiments/README.md); accelerators get many.
SCAN_STEPS = {"cpu": 1, "gpu": 32, "tpu": 32}
#: The most steps in one dispatch where batches come from the host: all of them lie on the device at once.
HOST_SCAN_STEPS = 4
#: Dispatches in a trace.
PROFILED = 5
#: Fewer validation views than this say too little about the spread of predictions to calibrate on.
CALIBRATION_VIEWS = 100


#: Of what is computed from the same settings: raised by every change to this package that gives a run other numbers. A run goes
#: on only with the version that it was begun with.
NUMERICS = 1
#: Of a run's config.json.
VERSION = 1

#: Settings that a run may go on with changed: how long it is, and how often it is looked at.
_LENGTH = ("steps", "eval_every", "log_every")
#: Settings that say where and how a run is computed, not what it computes; a run may go on with others. Weights to start from
#: are known by their content, wherever they lie.
_FREE = {"pretrained", "parallel", "bank_placement", "bank_gib", "workers", "scan_steps"}


class Interrupted(W2SError):
    """A signal stopped the run after a last checkpoint; exit code 128 + the signal's number, as shells count."""

    def __init__(self, number: int, step: int, workdir: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} at step {step}; run the same command to go on from {workdir}"
        )
        self.exit_code = 128 + number


class State(struct.PyTreeNode):
    """All that a step changes. ``average`` is the exponential average of (params, batch_stats) that is evaluated."""

    step: Array
    params: dict
    batch_stats: dict
    optimizer: optax.OptState
    average: tuple[dict, dict]


def initial_state(variables: dict, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step, from a student's collections ``params`` and ``batch_stats``."""
    params, batch_stats = variables["params"], variables["batch_stats"]
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        optimizer=optimizer.init(params),
        average=jax.tree.map(jnp.copy, (params, batch_stats)),  # a copy: the step may be given both to overwrite
    )


def train_step(
    state: State,
    batch: tuple[Array, Array],
    *,
    student: nn.Module,
    frontend: dict,
    optimizer: optax.GradientTransformation,
    l2: float = 0.0,
    ema: float = 0.0,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[State, dict[str, Array]]:
    """One update: the same function under jit, whose batch may be sharded over a mesh, and, with ``axis_name``, under pmap.

    Args:
        state: before the step.
        batch: waveforms float32 [B, T] and standardised labels float32 [B, D].
        student, frontend: the module and its fixed collection; under pmap the module has the same ``axis_name``.
        optimizer: an optax transformation.
        l2: weight of the squared error.
        ema: decay of the averaged weights.
        accumulate: parts, of B / accumulate views, that the batch is heard in, one after the other, for want of memory. The
            loss is that of the whole set: each part is heard twice, once for its predictions and once for its gradient.
            BatchNorm sees the moments of a part.
        axis_name: of the pmap; the loss then sees the moments of the whole global batch.

    Returns:
        The state after the step, and loss [], ccc [D], gradient_norm [], update_norm [], parameter_norm [].
    """
    waves, targets = batch

    def predict(params, part: Array):
        prediction, changed = student.apply(
            {"params": params, "batch_stats": state.batch_stats, "frontend": frontend},
            part, train=True, mutable=["batch_stats"],
        )  # fmt: skip
        return prediction, changed["batch_stats"]

    def loss_of(params):
        if accumulate == 1:
            prediction, batch_stats = predict(params, waves)
        else:
            # every accumulate-th view, so that each part has its share of every device's views
            parts = waves.reshape(-1, accumulate, waves.shape[1]).swapaxes(0, 1)
            # what is not kept of a part's forward pass is computed again for its gradient
            again = jax.checkpoint(predict)
            # no loop on a CPU, where XLA runs convolutions inside one many times slower
            unroll = accumulate if jax.default_backend() == "cpu" else 1
            _, (prediction, batch_stats) = lax.scan(lambda _, part: (None, again(params, part)), None, parts, unroll=unroll)
            prediction = prediction.swapaxes(0, 1).reshape(-1, prediction.shape[-1])
            batch_stats = jax.tree.map(lambda leaf: leaf.mean(axis=0), batch_stats)
        loss, concordance = distillation_loss(prediction, targets, l2=l2, axis_name=axis_name)
        return loss, (batch_stats, concordance)

    (loss, (batch_stats, concordance)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    if axis_name is not None:
        # each device's gradient is that of the summed copies of one global loss: the mean counts it once
        gradients = lax.pmean(gradients, axis_name)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # while few steps are behind it the average forgets faster: min(ema, (1 + s) / (10 + s))
    decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step)) if ema else 0.0
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, (params, batch_stats))
    after = State(
        step=state.step + 1, params=params, batch_stats=batch_stats, optimizer=optimizer_state, average=average
    )  # fmt: skip
    measured = {
        "loss": loss,
        "ccc": concordance,
        "gradient_norm": optax.tree.norm(gradients),
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(params),
    }
    return after, measured


def train_steps(state: State, chosen, hear: Callable, step: Callable) -> tuple[State, dict[str, Array]]:
    """Several steps in one dispatch, nothing from the host: render, run and update.

    Args:
        state: before the first step.
        chosen: what ``hear`` needs for each step, arrays [S, ...].
        hear: from one step's part of ``chosen`` to its batch; ``feed.DeviceFeed.hear`` with all but that bound.
        step: ``train_step`` with everything but state and batch bound.

    Returns:
        The state after S steps, and the metrics of each, [S, ...].
    """
    return scan_steps(lambda state, one: step(state, hear(one)), state, chosen)


def scan_steps(body: Callable, state: State, xs):
    """Run ``body(state, x)`` over the leading axis of the arrays ``xs``: the last state, and all outputs stacked."""
    if len(jax.tree.leaves(xs)[0]) > 1:
        return lax.scan(body, state, xs)
    # one step needs no loop, and a loop would cost the CPU its threads
    state, out = body(state, jax.tree.map(lambda x: x[0], xs))
    return state, jax.tree.map(lambda x: x[None], out)


def cropped(step: Callable, share: float, seed: int) -> Callable:
    """A step that hears only a random part of each view, ``share`` of its length; where, is a function of (seed, step).

    The label is still that of the whole view. This regularises a student of a small bank, as dropout over time would, and
    makes steps cheaper; evaluation always hears whole views.
    """
    if share == 1.0:
        return step

    def step_on_a_part(state: State, batch: tuple[Array, Array]):
        waves, targets = batch
        length = max(round(waves.shape[1] * share), 64)
        start = jax.random.randint(jax.random.fold_in(jax.random.key(seed), state.step), (), 0, waves.shape[1] - length + 1)
        return step(state, (lax.dynamic_slice_in_dim(waves, start, length, axis=1), targets))

    return step_on_a_part


@computing()
def train(
    config: ConfigDict,
    bank: Bank,
    views: Views,
    labels: Labels,
    workdir: str | os.PathLike,
    *,
    profile: bool = False,
    progress: Callable[..., None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict:
    """Train a student on all devices of all processes. Run again after a kill, it goes on from the last checkpoint and ends bit
    for bit where an unbroken run ends on the same devices.

    A run, finished or not, can be made longer or shorter: with another ``config.steps`` (or ``eval_every``, ``log_every``) and
    all else as before it goes on from its last checkpoint, on the learning rates that the schedule over the new number of steps
    has from there on. That is not the run that would have been that long from the beginning, whose earlier steps had other
    rates. The best student of all steps is kept.

    Args:
        config: as ``w2s_jax.config.default``.
        bank, views, labels: what to train on; they belong together.
        workdir: gets config.json, metrics.jsonl, training.png, tensorboard/, checkpoints/ and student/, the best by mean CCC on
            the validation views (the last where there are none). Many processes (``parallel.join``) share it; process 0 writes.
        profile: write a trace of a few steps to workdir/profile.
        progress: called with (steps done, steps in all, **figures).
        say: called with lines that tell how the run is laid out.

    Returns:
        A summary: step and validation CCC of the best student, and the speed.

    Raises:
        UsageError: settings, devices and views that do not go together.
        MismatchError: bank, views and labels, a run that is already there, or the weights to start from, do not belong
            together; or the run was begun by a version of this package that computes something else (``NUMERICS``).
        Interrupted: SIGINT or SIGTERM came, to this process or another; a checkpoint of the last step is written.
        W2SError: the loss is not finite; names the step and its views. Or the disk is full: names the file. The last good
            checkpoint is kept. Or another process is gone, or every checkpoint is damaged.

    Warns:
        UserWarning: a checkpoint is damaged, and the run goes on from the one before; or it was begun with another kernel,
            platform or JAX, which round differently.
    """
    views.check(bank)
    workdir = Path(workdir)
    training = views.where("train")
    if not len(training):
        raise UsageError("the views have no training split; build the bank with one")
    if len(views.where("validation")) == 1:
        raise UsageError(
            "there is one validation view, and a CCC compares how values vary: it needs two at least. Draw more of each clip "
            "(w2s views draw --eval-per-clip), or build the bank with more validation clips"
        )
    for name, least in (("steps", 1), ("batch_size", 2), ("eval_every", 1), ("log_every", 1)):
        if config[name] < least:
            raise UsageError(f"{name} is {config[name]}; expected at least {least}" + " (CCC belongs to a set)" * (least == 2))
    for name, zero in (("learning_rate", False), ("clip_norm", False), ("weight_decay", True), ("l2", True)):
        if not (0 < config[name] < float("inf") or (zero and config[name] == 0)):
            raise UsageError(f"{name} is {config[name]}; expected a number above 0{', or 0' * zero}")
    if not 0 < config.crop <= 1:
        raise UsageError(f"crop is the share of a view that a step hears, above 0 and at most 1; got {config.crop}")
    if config.parallel not in PARALLEL:
        raise UsageError(f"parallel is {config.parallel!r}; expected {' or '.join(PARALLEL)}")
    with contextlib.ExitStack() as contexts:
        if first():
            contexts.enter_context(locked(workdir))
        stop = contexts.enter_context(_signals())
        contexts.enter_context(together(str(workdir)))
        return _Run(config, bank, views, labels, workdir, training, stop, profile, progress, say).run()


def planned_steps(workdir: str | os.PathLike, otherwise: int) -> int:
    """How many steps the run in a directory is to have; ``otherwise`` where there is none."""
    path = Path(workdir) / "config.json"
    config = read_json(path, "run").get("config") if path.is_file() else None
    steps = config.get("steps") if isinstance(config, dict) else None
    return steps if isinstance(steps, int) else otherwise


class _Run:
    """The driver's state; one method per thing that it does."""

    def __init__(self, config, bank, views, labels, workdir, training, stop, profile, progress, say) -> None:
        self.config, self.bank, self.views, self.labels = config, bank, views, labels
        self.workdir, self.training, self.stop, self.profile = workdir, training, stop, profile
        self.first = first()
        self.progress, self.say = (progress, say) if self.first else (None, None)
        # CCC does not change when prediction and label are shifted and scaled alike, so the student learns standardised
        # labels, whatever their unit; its output layer takes the unit back when it is saved
        known = labels.values[training].astype(np.float64)
        self.mean, self.deviation = known.mean(axis=0), np.maximum(known.std(axis=0), 1e-6)
        self.targets = ((known - self.mean) / self.deviation).astype(np.float32)
        self.schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, max(1, round(config.warmup * config.steps)), max(2, config.steps)
        )
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(self.schedule, weight_decay=config.weight_decay, mask=_decayed),
        )
        self.layout = lay_out(self.data_shards(), config.batch_size, config.accumulate)
        self.parallel = PARALLEL[config.parallel](self.layout)
        build = partial(models.build, config.student, dimensions=len(labels.dimensions), **config.fields)
        self.student = build()
        # how it is computed in training is not a part of what it is
        how = {"axis_name": self.parallel.axis_name, "dtype": config.dtype, "form": config.form}
        usual = {"axis_name": None, "dtype": "float32", "form": "auto"}
        self.in_training = build(**{name: value for name, value in how.items() if value != usual[name]})
        self.taken, self.pretrained = self.start()
        self.claim()

    def data_shards(self) -> int:
        """``config.data_shards``, or where it is 0 what a run that is there was begun with."""
        path = self.workdir / "config.json"
        if not self.config.data_shards and path.exists():
            return read_json(path, "run").get("config", {}).get("data_shards", 0)
        return self.config.data_shards

    def start(self) -> tuple[dict, dict | None]:
        """What the student takes over from ``config.pretrained``, and where that is from."""
        given = self.config.pretrained
        if not given:
            return {}, None
        if not Path(given).exists() and ocp.utils.checkpoint_steps(self.workdir / "checkpoints"):
            # the checkpoint holds all that a resumed run needs; the same name must do where nothing is left to compare
            noted = read_json(self.workdir / "config.json", "run").get("pretrained")
            if noted and noted["source"] == convert.last_name(given):
                return {}, noted
        return convert.start(self.config.student, self.student, self.labels.dimensions, given)

    def claim(self) -> None:
        """Refuse a directory that holds another run."""
        config = {key: value for key, value in json.loads(self.config.to_json()).items() if key not in _FREE}
        config["data_shards"] = self.layout.shards
        self.about = {
            "format": "w2s-run",
            "version": VERSION,
            "config": config,
            "pretrained": self.pretrained,
            "bank": self.bank.fingerprint,
            "views": self.views.fingerprint,
            "teacher": self.labels.about["teacher"],
            "numerics": NUMERICS,
            "computed": {"kernel": self.kernel(), "platform": jax.default_backend(), "jax": jax.__version__},
            "w2s_jax": __version__,
        }
        #: What ``config.steps`` was when this run was last worked on.
        self.steps_before = config["steps"]
        for file, what in (("plan.json", "a bank or labels"), ("bank.json", "a bank"), ("export.json", "a model directory")):
            if (self.workdir / file).exists():
                raise UsageError(f"{self.workdir} is {what} (it has {file}); choose another --workdir")
        path, begun = self.workdir / "config.json", any((self.workdir / "checkpoints").glob("[0-9]*"))
        if not path.exists():
            if begun:
                raise UsageError(
                    f"{self.workdir} has checkpoints, but no {path.name} that says of what run; choose another --workdir, or "
                    "put it back"
                )
            return
        before = read_json(path, "run")
        version = before.get("version", 1)
        if version != VERSION:
            raise UsageError(f"{path} has version {version}, expected {VERSION}; another version of w2s_jax made this run")
        expected = fingerprint({**before, "checksum": None})
        if before.pop("checksum", expected) != expected:  # runs of 0.1 have none
            raise W2SError(f"{path} is damaged, or was changed by hand: its checksum is not right; choose another --workdir")
        there, now = _flat(before), _flat(self.about)
        there.setdefault("numerics", 1)  # runs of 0.1 do not say
        differing = [key for key in there | now if there.get(key) != now.get(key)]
        computed = [key for key in differing if key.startswith("computed.") and key in there]
        free = {"format", "version", "w2s_jax", *(f"config.{name}" for name in _LENGTH)}
        differing = [key for key in differing if key not in free and not key.startswith("computed.")]

        def shown(keys: list[str]) -> str:
            return "; ".join(f"{key.removeprefix('computed.')}: {there.get(key)} there, {now.get(key)} now" for key in keys)

        if differing and "config.student" in there and not begun:
            return  # it ended before its first checkpoint, so there is nothing to lose
        if differing:
            made = f", made by w2s_jax {there.get('w2s_jax')}," if "numerics" in differing else ""
            raise MismatchError(
                f"{self.workdir} holds another run{made} ({shown(differing)}); choose another --workdir, or delete it"
            )
        if computed and self.first:
            warnings.warn(
                f"{self.workdir} was computed in another way so far ({shown(computed)}); it goes on, but will not end bit for "
                "bit where an unbroken run ends",
                stacklevel=2,
            )
        steps = there.get("config.steps")
        self.steps_before = steps if isinstance(steps, int) else config["steps"]

    def kernel(self) -> str:
        """What computes the student's convolutions in training."""
        form, dtype = getattr(self.in_training, "form", None), jnp.dtype(self.config.dtype)
        if form is None:
            return "xla"
        shape = (getattr(self.in_training, "kernel", 3), getattr(self.in_training, "stride", 1))
        return "native" if forms.trains_natively(form, *shape, dtype, self.parallel.axis_name) else forms.chosen(form)

    def note(self, done: int) -> None:
        """Write the run's config.json; tell of a run whose length is another than before.

        Raises:
            UsageError: more steps are done than there shall be.
        """
        steps = self.config.steps
        if done > steps:
            raise UsageError(f"{self.workdir} has {done} steps behind it, more than steps={steps}; set steps to more than that")
        if self.first:
            write_json(self.workdir / "config.json", self.about | {"checksum": fingerprint({**self.about, "checksum": None})})
        if self.say and steps != self.steps_before:
            self.say(
                f"the run was to have {self.steps_before} steps and now has {steps}: it goes on from step {done} with the "
                f"schedule over {steps} steps, where the learning rate is {float(self.schedule(done)):.3g} now"
            )

    def initial(self) -> State:
        heard = int(self.config.crop * min(self.batches.lengths))
        if heard < self.student.minimum_samples:
            needed = f"{self.config.student} needs {self.student.minimum_samples}"
            raise UsageError(f"a step hears {heard} samples of the shortest views; {needed}: draw longer views, or set crop=1")
        # compiled: most of an eager init goes into a forward pass that nobody reads
        init = jax.jit(self.student.init)
        variables = init(jax.random.key(self.config.seed), jnp.zeros((1, int(self.batches.lengths[0]))))
        taken = jax.tree.map(jnp.asarray, self.taken)
        if "adv" in taken.get("params", {}):
            taken["params"] = out_of_units(taken["params"], self.mean, self.deviation)
        variables = {collection: {**tree, **taken.get(collection, {})} for collection, tree in variables.items()}
        self.frontend = jax.device_get(variables["frontend"])
        return jax.device_get(initial_state(variables, self.optimizer))

    def run(self) -> dict:
        config = self.config
        groups = divide(self.views.columns["clip"][self.training], self.layout.shards)
        samples = self.views.columns["samples"][self.training]
        self.batches = Batches(samples, config.batch_size, config.steps, config.seed, groups, self.layout.shards)
        state = self.initial()
        best = {"step": 0, "ccc": None}
        with Checkpoints(self.workdir / "checkpoints") as checkpoints:
            saved = checkpoints.restore(self.kept(state))
            if saved:
                trees, best = saved
                state, self.frontend = trees["state"], trees.get("frontend", self.frontend)
                best = self.best(best)
            done = self.begun = int(state.step)
            self.note(done)
            dispatch = self.dispatcher(groups)
            state = self.parallel.everywhere(state)
            peak = observe.peak_flops(jax.local_devices()[0], config.dtype)
            # the devices of a CPU share its cores
            units = jax.process_count() if jax.default_backend() == "cpu" else len(self.layout.devices)
            self.limit = peak and peak * units
            with observe.Log(self.workdir, done, active=self.first) as self.log:
                if done and not best["step"]:
                    best = self.evaluate(state, done, best)
                waiting = None  # a dispatch whose figures were not looked at: the next one is given out first
                for dispatched in dispatch(state, done):
                    if waiting:
                        self.settle(*waiting)
                    state, *waiting = dispatched
                    done = waiting[-1]
                    evaluated = done % config.eval_every == 0 or done == config.steps
                    if evaluated or self.stopped:
                        self.settle(*waiting)
                        waiting, paused = None, time.perf_counter()
                        if evaluated:
                            best = self.evaluate(state, done, best)
                        checkpoints.save(done, self.kept(jax.device_get(state)), best)
                        self.began += time.perf_counter() - paused
                    if self.stopped:
                        checkpoints.wait()
                        meet("stopped")  # or a launcher that ends the rest when one ends would cut the checkpoint off
                        raise Interrupted(self.stopped, done, self.workdir)
            seconds = time.perf_counter() - self.began if self.began else 0.0
        if self.first:
            with contextlib.suppress(UsageError):  # no line is left of a finished run, which was said
                observe.plot(self.workdir)
        return {
            "student": str(self.workdir / "student"),
            "steps": config.steps,
            "best_step": best["step"],
            "validation_ccc": best["ccc"],
            "clips_per_second": round((done - self.begun) * config.batch_size / seconds, 1) if done > self.begun else None,
            "seconds": round(seconds, 1),
            "picture": str(self.workdir / "training.png"),
        }

    def dispatcher(self, groups: np.ndarray) -> Callable:
        """A generator (state, first step) → (state, metrics, views' rows [S, devices, b], their length, first and last step) …,
        the bank where ``plan`` puts it."""
        config, layout = self.config, self.layout
        decided = plan(self.bank, self.views, self.training, groups, layout, config)
        if self.say:
            self.say(decided.reason)
            reason = config.form == "auto" and hasattr(self.student, "form") and native.unavailable()
            if reason and jax.default_backend() == "cpu":
                self.say(f"XLA's convolutions are used, about three times as slow as the compiled kernel, because: {reason}")
        given = (self.bank, self.views, self.training)
        if decided.placement == "device":
            feed = DeviceFeed(*given, groups, self.targets, layout, self.batches)
        else:
            feed = HostFeed(*given, self.targets, layout, self.batches, config.workers)
        scan = config.scan_steps or SCAN_STEPS.get(jax.default_backend(), 1)
        if decided.placement == "host":
            scan = min(scan, HOST_SCAN_STEPS)
        step = partial(
            train_step,
            student=self.in_training,
            frontend=self.frontend,
            optimizer=self.optimizer,
            l2=config.l2,
            ema=config.ema,
            accumulate=config.accumulate,
            axis_name=self.parallel.axis_name,
        )
        run = self.parallel.compiled(feed.hear, partial(train_steps, step=cropped(step, config.crop, config.seed)))
        data = self.parallel.split(feed.data)
        feed.data = None  # the devices have it

        def dispatch(state: State, done: int) -> Iterator[tuple]:
            batches, compiled, traced = feed.batches(done, config.steps), set(), 0
            with contextlib.ExitStack() as tracing:
                while done < config.steps:
                    end = min(done + scan, config.steps, self.batches.until(done), _next(done, config.eval_every))
                    asked = time.perf_counter()
                    lengths, rows, chosen = zip(*(next(batches) for _ in range(done, end)), strict=True)
                    self.waited += time.perf_counter() - asked
                    shape = lengths[0], end - done
                    begins = self.profile and not traced and shape in compiled  # or compiling would fill the trace
                    if begins or traced == PROFILED:
                        jax.block_until_ready(state)
                        tracing.close()
                    if begins:
                        tracing.enter_context(observe.trace(self.workdir / "profile", self.say))
                    traced += begins or traced > 0
                    compiled.add(shape)
                    signals = np.full(len(layout.local), self.stop.number, np.int32)
                    state, measured = run(state, data, stack(chosen), signals, lengths[0])
                    yield state, measured, np.stack(rows), lengths[0], done, end
                    done = end
            if self.profile and not traced and self.say:
                self.say("no trace was written: every dispatch had to be compiled; train more steps, or set scan_steps=1")

        return dispatch

    #: The signal that any process had got when a dispatch began that is finished now.
    stopped = 0
    #: The clock of the speed: when it was started, and at which step. The first dispatch, which compiles, is not counted, nor
    #: are evaluations. Since then: seconds that data was waited for, and arithmetic that was done.
    began, begun, waited, arithmetic = 0.0, 0, 0.0, 0

    def settle(self, measured: dict, rows: np.ndarray, samples: int, start: int, end: int) -> None:
        """Wait for a dispatch; check its losses, and report them."""
        measured = jax.device_get(measured)
        self.stopped = int(measured.pop("signal"))
        self.check(measured["loss"], rows, start)
        self.arithmetic += (end - start) * self.config.batch_size * self.flops(round(samples * self.config.crop))
        if not self.began:
            self.began, self.begun, self.waited, self.arithmetic = time.perf_counter(), end, 0.0, 0
        every = self.config.log_every
        if self.first and (end // every > start // every or end == self.config.steps):
            self.report(measured, end, time.perf_counter() - self.began)

    @functools.cache  # noqa: B019 (a run is made once)
    def flops(self, samples: int) -> int:
        return observe.flops(self.student, samples)

    def check(self, losses: np.ndarray, rows: np.ndarray, done: int) -> None:
        """Stop at the first loss [S] that is not finite; later ones would only follow from it."""
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            where = ", ".join(str(view) for view in self.training[rows[bad[0]].ravel()])
            raise W2SError(
                f"the loss is {losses[bad[0]]} at step {done + int(bad[0]) + 1} (views {where}); "
                "lower learning_rate, or look at these views' labels"
            )

    def report(self, measured: dict, end: int, seconds: float) -> None:
        memory = observe.memory(jax.local_devices())
        figures = {
            "loss": float(measured["loss"].mean()),
            **{f"ccc/{d}": float(c) for d, c in zip(self.labels.dimensions, measured["ccc"].mean(axis=0), strict=True)},
            **{name: float(measured[name].mean()) for name in ("gradient_norm", "update_norm", "parameter_norm")},
            "learning_rate": float(self.schedule(end - 1)),
            **{f"memory_{name}_gib": memory[name] / 2**30 for name in ("in_use", "peak") if name in memory},
        }
        speed = {}
        if end > self.begun:
            speed = {"clips_per_second": (end - self.begun) * self.config.batch_size / seconds}
            figures |= speed | {"waiting_share": self.waited / seconds}
            if self.limit:
                figures["arithmetic_share"] = self.arithmetic / seconds / self.limit
        self.log.write("train", end, figures)
        if self.progress:
            self.progress(end, self.config.steps, loss=figures["loss"], **speed)

    def best(self, saved: dict) -> dict:
        """What is known of the student in student/: ``saved``, unless the student was made again since, or is damaged."""
        try:
            about = checkpoint.load_student(self.workdir / "student")[2]
        except W2SError as error:
            if self.first and saved["step"]:
                warnings.warn(
                    f"{error}; so the best student, of step {saved['step']}, is lost, and that of the last step is kept",
                    stacklevel=2,
                )
            return {"step": 0, "ccc": None}
        return {"step": about["step"], "ccc": about.get("validation_ccc")}

    def evaluate(self, state: State, step: int, best: dict) -> dict:
        """CCC of the averaged weights on the validation views; a better student than the best so far is kept."""
        params, batch_stats = jax.device_get(state.average)
        variables = {"params": params, "batch_stats": batch_stats, "frontend": self.frontend}
        validation, concordance = self.views.where("validation"), None
        mean, deviation = self.mean, self.deviation
        if len(validation):
            raw = self.predict(variables, validation)
            known = self.labels.values[validation].astype(np.float64)
            if self.config.calibrate and len(validation) >= CALIBRATION_VIEWS:
                mean, deviation = calibration(raw, known, self.deviation)
            scores = metrics.ccc(raw * deviation + mean, known)
            concordance = {name: float(score) for name, score in zip(self.labels.dimensions, scores, strict=True)}
            concordance["mean"] = float(scores.mean())
            self.log.write("validation", step, {f"ccc/{name}": score for name, score in concordance.items()})
            if self.progress:
                self.progress(step, self.config.steps, validation_ccc=concordance["mean"])
        if concordance is None or best["ccc"] is None or concordance["mean"] > best["ccc"]["mean"]:
            best = {"step": step, "ccc": concordance}
            if not self.first:
                return best
            checkpoint.save_student(
                self.workdir / "student",
                self.config.student,
                {"dimensions": len(self.labels.dimensions), **self.config.fields.to_dict()},
                {**variables, "params": in_units(params, mean, deviation)},
                {
                    "dimensions": list(self.labels.dimensions),
                    "teacher": self.labels.about["teacher"],
                    **({"pretrained": self.pretrained} if self.pretrained else {}),
                    "bank": self.bank.fingerprint,
                    "views": self.views.fingerprint,
                    "step": step,
                    "validation_ccc": concordance,
                },
            )
        return best

    def predict(self, variables: dict, chosen: np.ndarray) -> np.ndarray:
        """Predictions for some views, float64 [n, D]: each process hears its part of them, on all its devices."""
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        if not hasattr(self, "infer"):
            self.infer = jax.jit(partial(self.student.apply, train=False))

        def infer(waves: np.ndarray) -> Array:
            return self.infer(variables, jax.device_put(waves, NamedSharding(mesh, PartitionSpec("batch"))))

        count = -(-len(chosen) // jax.process_count())
        mine = chosen[jax.process_index() * count :][:count]
        width = len(self.labels.dimensions)
        raw = predict_views(infer, self.bank, self.views, mine, devices=mesh.size) if len(mine) else np.zeros((0, width))
        return gathered(raw.astype(np.float32), count).astype(np.float64)

    def kept(self, state: State) -> dict:
        """The arrays of a checkpoint: a front end that was taken over need not be, bit for bit, what ``init`` computes."""
        return {"state": state, "frontend": self.frontend} if self.pretrained else {"state": state}


class Checkpoints:
    """The last two checkpoints of a run: plain arrays that go back to whatever devices there are then, and their checksum.

    They are written in the background; what goes wrong there is raised by the next call, and at the end.

    Args:
        directory: of the run's checkpoints; made when missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._bytes = directory.resolve(), 0

    def __enter__(self) -> Checkpoints:
        # what its threads log is raised as well
        self._verbosity = absl.logging.get_verbosity()
        absl.logging.set_verbosity(absl.logging.FATAL)
        _without_echoes()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        with self._written():
            if first():
                for left in self._directory.glob("*.orbax-checkpoint-tmp*"):  # by a kill, or a full disk
                    shutil.rmtree(left, ignore_errors=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            with self._written():
                self._manager.close()
        except W2SError:
            if kind is None:
                raise
        finally:
            absl.logging.set_verbosity(self._verbosity)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Whatever goes wrong in it is told as one error that names the place."""
        try:
            yield
        except Exception as error:  # orbax's and tensorstore's own kinds
            # tensorstore's have the system's reason in a long text
            known = (os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS))
            reason = next((reason for reason in known if reason in str(error)), str(error).strip().split("\n")[0][:200])
            free = shutil.disk_usage(self._directory).free if self._directory.is_dir() else 0
            raise W2SError(
                f"cannot write a checkpoint into {self._directory}: {reason} ({_size(self._bytes)} to write, {_size(free)} "
                "free); the last whole one is kept, and the same command goes on from it"
            ) from error

    def save(self, step: int, trees: dict, best: dict) -> None:
        """Begin to write a checkpoint, unless there is one of this step: trees of numpy arrays, and what JSON can hold."""
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        with self._written():
            if self._manager.latest_step() == step:
                return
            items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
            noted = {**best, "checksum": checksum(trees, best)}
            self._manager.save(step, args=ocp.args.Composite(**items, best=ocp.args.JsonSave(noted)))

    def wait(self) -> None:
        """Until the last checkpoint is whole."""
        with self._written():
            self._manager.wait_until_finished()

    def restore(self, trees: dict) -> tuple[dict, dict] | None:
        """The last checkpoint that is whole: trees like the given ones, and ``best``. None where there is none yet.

        Later ones are damaged; they are named and deleted, as the run makes them again.

        Raises:
            W2SError: there are checkpoints, and all of them are damaged.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
                saved = self._manager.restore(step, args=ocp.args.Composite(**items, best=ocp.args.JsonRestore()))
                found, best = {name: saved[name] for name in trees}, dict(saved["best"])
                known = best.pop("checksum", None)  # checkpoints of 0.1 have none
                if known not in (None, checksum(found, best)) or set(best) != {"step", "ccc"}:
                    raise W2SError("its content is not what was saved")
            except Exception as error:  # whatever a decoder makes of damaged bytes
                damaged[step] = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
                continue
            for later, reason in damaged.items():
                if first():
                    warnings.warn(
                        f"{self._directory / str(later)} is damaged ({reason}); going on from step {step}, the one before",
                        stacklevel=2,
                    )
                self._manager.delete(later)
            return found, best
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise W2SError(
                f"every checkpoint in {self._directory} is damaged ({step}: {reason}); delete that directory to train from the "
                "beginning"
            )
        return None


def checksum(trees: dict, best: dict) -> str:
    """Of the arrays of a checkpoint, in their order, and of what is noted with them."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]
    return fingerprint(best, [[str(leaf.dtype), leaf.shape] for leaf in leaves], *(leaf.tobytes() for leaf in leaves))


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


@functools.cache
def _without_echoes() -> None:
    """When one array cannot be written, tensorstore's threads tell of all others to an event loop that is closed meanwhile, and
    Python prints a traceback for each; those, which no code of Python has begun, are not shown."""
    shown = sys.unraisablehook

    def show(raised) -> None:
        begun = raised.exc_traceback and raised.exc_traceback.tb_frame.f_code.co_name
        if not (begun == "call_soon_threadsafe" and str(raised.exc_value) == "Event loop is closed"):
            shown(raised)

    sys.unraisablehook = show


def calibration(raw: np.ndarray, known: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, [D] each, that give predictions the moments of their labels: ``raw · deviation + mean``.

    On clips that it was not trained on a student is less sure, so its predictions spread less than the labels, and CCC counts
    that as an error. With the labels' moments CCC is the correlation, the most that shifting and scaling can reach.

    Args:
        raw, known: predictions in the student's own unit and labels, [N, D] each, of views that were not trained on.
        deviation: the unit that training assumed; the result is at most twice and at least half of it.
    """
    scale = known.std(axis=0) / np.maximum(raw.std(axis=0), 1e-6)
    scale = np.clip(scale, deviation / 2, deviation * 2)
    return known.mean(axis=0) - scale * raw.mean(axis=0), scale


def in_units(params: dict, mean: np.ndarray, deviation: np.ndarray) -> dict:
    """Fold ``y · deviation + mean`` (both [D]) into the student's output layer ``adv``."""
    kernel, bias = params["adv"]["kernel"], params["adv"]["bias"]
    scaled = {
        "kernel": (kernel * deviation).astype(kernel.dtype),
        "bias": (bias * deviation + mean).astype(bias.dtype),
    }
    return {**params, "adv": scaled}


def out_of_units(params: dict, mean: np.ndarray, deviation: np.ndarray) -> dict:
    """``in_units`` backwards: make an output layer ``adv`` that speaks in the labels' units give standardised values."""
    return in_units(params, -mean / deviation, 1 / deviation)


class _Stop:
    number = 0


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks for a checkpoint and the end; a second one ends the process at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, _frame):
        if stop.number:
            os._exit(128 + number)
        stop.number = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _decayed(params: dict) -> dict:
    """Weight decay is for kernels; scales and biases are left alone."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _flat(value: dict, prefix: str = "") -> dict:
    out = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return out
