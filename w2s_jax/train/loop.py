"""The training loop: dispatches steps, logs, evaluates, writes checkpoints, and stops on a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from w2s_jax import checkpoint, metrics, models, plots
from w2s_jax.bank import Bank
from w2s_jax.devices import computing, memory_use, peak_flops
from w2s_jax.errors import UsageError, W2SError
from w2s_jax.evaluate import predict_views
from w2s_jax.feed import DeviceFeed, HostFeed, StepInput, plan
from w2s_jax.labels import Labels
from w2s_jax.locks import locked
from w2s_jax.log import Log, trace
from w2s_jax.models import native
from w2s_jax.parallel import gather_rows, is_main_process, max_over_processes, translate_xla_errors, wait_for_all
from w2s_jax.train import units
from w2s_jax.train.checkpoints import Checkpoints
from w2s_jax.train.run import Run, check_resumable
from w2s_jax.train.step import State, initial_state, train_steps
from w2s_jax.views import Views

#: Steps in one dispatch. On CPUs XLA runs a convolution inside a loop many times slower, so there each step is a dispatch of
#: its own (measured: experiments/README.md); accelerators get many.
SCAN_STEPS = {"cpu": 1, "gpu": 32, "tpu": 32}
#: The most steps in one dispatch where batches come from the host: all of them are on the device at once.
HOST_SCAN_STEPS = 4
#: Dispatches in a trace.
TRACED_DISPATCHES = 5
#: With fewer validation views the spread of predictions is too uncertain to calibrate on.
CALIBRATION_VIEWS = 100


class Interrupted(W2SError):
    """A signal stopped the run after a last checkpoint; exit code 128 + the signal's number, as shells count."""

    def __init__(self, number: int, step: int, workdir: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} at step {step}; run the same command to go on from {workdir}"
        )
        self.exit_code = 128 + number


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
    message: Callable[[str], None] | None = None,
) -> dict:
    """Train a student on all devices of all processes. A run that was killed is resumed from its last checkpoint, and ends bit
    for bit where an unbroken run ends on the same devices.

    A run, finished or not, can be made longer or shorter: with another ``config.steps`` (or ``eval_every``, ``log_every``) and
    all else as before it is resumed from its last checkpoint, with the learning rates that the schedule over the new number of
    steps has from there on. That differs from a run that had this length from the beginning, whose earlier steps had other
    rates. The best student of all steps is kept.

    Args:
        config: as ``w2s_jax.config.default``.
        bank, views, labels: what to train on; they belong together.
        workdir: gets config.json, metrics.jsonl, training.png, tensorboard/, checkpoints/ and student/, the best by mean CCC on
            the validation views (the last where there are none). Many processes (``parallel.join``) share it; process 0 writes.
        profile: write a trace of a few steps to workdir/profile.
        progress: called with (steps done, steps in all, **figures).
        message: called with lines about how the run is laid out.

    Returns:
        A summary: step and validation CCC of the best student, and the speed.

    Raises:
        UsageError: settings, devices and views that do not go together.
        MismatchError: bank, views and labels, a run that is already there, or the weights to start from, do not belong
            together; or the run was started by a version of this package that computes something else (``NUMERICS``).
        Interrupted: this or another process received SIGINT or SIGTERM; a checkpoint of the last step is written.
        W2SError: the loss is not finite; names the step and its views. Or the disk is full: names the file. The last good
            checkpoint is kept. Or another process has died, or every checkpoint is damaged.

    Warns:
        UserWarning: a checkpoint is damaged, and the run is resumed from the one before; or it was started with another
            kernel, platform or JAX, which round differently.
    """
    run = Run(
        config=config, bank=bank, views=views, labels=labels, workdir=Path(workdir),
        profile=profile, progress=progress, say=message,
    )  # fmt: skip
    run.check()
    with contextlib.ExitStack() as contexts:
        if is_main_process():
            contexts.enter_context(locked(run.workdir))
        signals = contexts.enter_context(_catch_signals())
        contexts.enter_context(translate_xla_errors(str(run.workdir)))
        planned_steps = check_resumable(run.workdir, run.about)
        variables = run.initial_variables()
        state = jax.device_get(initial_state(variables, run.optimizer))
        checkpoints = contexts.enter_context(Checkpoints(run.workdir / "checkpoints"))
        state, frontend, best = run.restore(checkpoints, state, variables.get("frontend", {}))
        run.write_config(int(state.step), planned_steps)
        log = contexts.enter_context(Log(run.workdir, int(state.step), every=run.config.log_every, active=is_main_process()))
        return _Loop(run, int(state.step), frontend, best, log, checkpoints, signals).run(state)


class _Dispatch(NamedTuple):
    """Steps that were given to the devices at once: ``start`` (excluded) to ``end``."""

    state: State  # after the last of them
    metrics: dict[str, Array]  # [S, …]
    rows: np.ndarray  # their views among the training views, [S, local devices, b]
    samples: int
    start: int
    end: int


class _Loop:
    """Runs the steps of a run."""

    def __init__(self, run: Run, step: int, frontend: dict, best: dict, log: Log, checkpoints: Checkpoints, signals) -> None:
        self._run, self._frontend, self._best = run, frontend, best
        self._log, self._checkpoints, self._signals = log, checkpoints, signals
        self._progress = run.progress if is_main_process() else None
        peak = peak_flops(jax.local_devices()[0], run.config.dtype)
        # the devices of a CPU share its cores
        count = jax.process_count() if jax.default_backend() == "cpu" else len(run.layout.devices)
        self._speed = _Speed(run.config.batch_size, peak and peak * count, step)
        self._flops = lru_cache(partial(training_flops, run.student))
        self._apply = jax.jit(partial(run.student.apply, train=False))

    def run(self, state: State) -> dict:
        config, workdir = self._run.config, self._run.workdir
        done = int(state.step)
        if self._best["step"] is None:  # the best student is lost: this one takes its place
            self._evaluate(state, done)
        pending = None  # a dispatch whose metrics were not read yet: the devices get the next one first
        for dispatch in self._dispatches(self._run.parallel.replicate(state), done):
            if pending:
                self._finish(pending)
            pending, done = dispatch, dispatch.end
            evaluates = done % config.eval_every == 0 or done == config.steps
            if not (evaluates or self._may_stop(dispatch)):
                continue
            self._finish(pending)
            pending = None
            stopped = max_over_processes(self._signals.received)
            if evaluates or stopped:
                began = time.perf_counter()
                if evaluates:
                    self._evaluate(dispatch.state, done)
                trees = self._run.checkpoint_trees(jax.device_get(dispatch.state), self._frontend)
                self._checkpoints.save(done, trees, self._best)
                self._speed.paused += time.perf_counter() - began
            if stopped:
                self._checkpoints.wait()
                wait_for_all("stopped")  # a launcher may kill the rest when one process ends
                raise Interrupted(stopped, done, workdir)
        seconds, speed = self._speed.seconds, self._speed.figures(done).get("clips_per_second")
        self._checkpoints.wait()
        if is_main_process():
            with contextlib.suppress(UsageError):  # the log of a finished run is empty, which was said
                plots.plot_run(workdir)
        return {
            "student": str(workdir / "student"),
            "steps": config.steps,
            "best_step": self._best["step"],
            "validation_ccc": self._best["ccc"],
            "clips_per_second": speed and round(speed, 1),
            "seconds": round(seconds, 1),
            "picture": str(workdir / "training.png"),
        }

    def _may_stop(self, dispatch: _Dispatch) -> bool:
        """Whether to look for signals after a dispatch. Many processes must do so together, so they do when they log."""
        return self._logs(dispatch) if jax.process_count() > 1 else bool(self._signals.received)

    def _logs(self, dispatch: _Dispatch) -> bool:
        every = self._run.config.log_every
        return dispatch.end // every > dispatch.start // every or dispatch.end == self._run.config.steps

    def _feed(self) -> tuple[DeviceFeed | HostFeed, int]:
        """The source of batches, and the steps in one dispatch; the bank is where ``plan`` puts it."""
        run, config = self._run, self._run.config
        decided = plan(run.bank, run.views, run.training_views, run.shard_of_view, run.layout, config)
        run.message(decided.reason)
        reason = config.form == "auto" and hasattr(run.student, "form") and native.unavailable()
        if reason and jax.default_backend() == "cpu":
            run.message(f"XLA's convolutions are used, about three times as slow as the compiled kernel, because: {reason}")
        targets = units.standardise(run.labels.values[run.training_views], run.units)
        scan = config.scan_steps or SCAN_STEPS.get(jax.default_backend(), 1)
        data = (run.bank, run.views, run.training_views)
        if decided.placement == "device":
            return DeviceFeed(*data, run.shard_of_view, targets, run.layout, run.batches), scan
        return HostFeed(*data, targets, run.layout, run.batches, config.workers), min(scan, HOST_SCAN_STEPS)

    def _dispatches(self, state: State, done: int) -> Iterator[_Dispatch]:
        """Give the steps after ``done`` to the devices, dispatch by dispatch."""
        run, config = self._run, self._run.config
        feed, scan = self._feed()
        steps = run.parallel.compile(
            partial(
                train_steps,
                render_batch=feed.render_batch,
                student=run.training_student,
                frontend=self._frontend,
                optimizer=run.optimizer,
                l2=config.l2,
                ema=config.ema,
                accumulate=config.accumulate,
                crop=config.crop,
                jitter=config.jitter,
                seed=config.seed,
                axis_name=run.parallel.axis_name,
            )
        )
        data = run.parallel.shard(feed.data)
        feed.data = None  # the devices have it
        inputs, compiled, traced = feed.batches(done, config.steps), set(), 0
        with contextlib.ExitStack() as tracing:
            while done < config.steps:
                next_evaluation = (done // config.eval_every + 1) * config.eval_every
                end = min(done + scan, config.steps, run.batches.next_run(done), next_evaluation)
                began = time.perf_counter()
                chunk = StepInput(*zip(*(next(inputs) for _ in range(done, end)), strict=True))
                self._speed.waited += time.perf_counter() - began
                shape = chunk.samples[0], end - done
                begins = run.profile and not traced and shape in compiled  # or compiling would fill the trace
                if begins or traced == TRACED_DISPATCHES:
                    jax.block_until_ready(state)
                    tracing.close()
                if begins:
                    tracing.enter_context(trace(run.workdir / "profile", run.message))
                traced += begins or traced > 0
                compiled.add(shape)
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chunk.inputs)
                state, measured = steps(state, data, stacked, chunk.samples[0])
                yield _Dispatch(state, measured, np.stack(chunk.rows), chunk.samples[0], done, end)
                done = end
        if run.profile and not traced:
            run.message("no trace was written: every dispatch had to be compiled; train more steps, or set scan_steps=1")

    def _finish(self, dispatch: _Dispatch) -> None:
        """Wait for a dispatch, check its losses, and log it."""
        measured = jax.device_get(dispatch.metrics)
        self._check_losses(measured["loss"], dispatch)
        config = self._run.config
        clips = (dispatch.end - dispatch.start) * config.batch_size
        self._speed.add(clips * self._flops(round(dispatch.samples * config.crop)), dispatch.end)
        if self._logs(dispatch) and is_main_process():
            self._write_log(measured, dispatch.end)

    def _check_losses(self, losses: np.ndarray, dispatch: _Dispatch) -> None:
        """Stop at the first loss [S] that is not finite; later ones would only follow from it."""
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            views = ", ".join(str(view) for view in self._run.training_views[dispatch.rows[bad[0]].ravel()])
            raise W2SError(
                f"the loss is {losses[bad[0]]} at step {dispatch.start + int(bad[0]) + 1} (views {views}); "
                "lower learning_rate, or look at these views' labels"
            )

    def _write_log(self, measured: dict[str, np.ndarray], step: int) -> None:
        """Log the means of a dispatch's metrics [S, …], memory and speed."""
        memory, speed = memory_use(jax.local_devices()), self._speed.figures(step)
        concordance = zip(self._run.labels.dimensions, measured["ccc"].mean(axis=0), strict=True)
        figures = {
            "loss": float(measured["loss"].mean()),
            **{f"ccc/{name}": float(ccc) for name, ccc in concordance},
            **{name: float(measured[name].mean()) for name in ("gradient_norm", "update_norm", "parameter_norm")},
            "learning_rate": float(self._run.schedule(step - 1)),
            **{f"memory_{name}_gib": memory[name] / 2**30 for name in ("in_use", "peak") if name in memory},
            **speed,
        }
        self._log.write("train", step, figures)
        if self._progress:
            shown = {name: figures[name] for name in ("loss", "clips_per_second") if name in figures}
            self._progress(step, self._run.config.steps, **shown)

    def _evaluate(self, state: State, step: int) -> None:
        """Compute the CCC of the averaged weights on the validation views; save the student if it is the best so far."""
        run = self._run
        params, batch_stats = jax.device_get(state.average)
        variables = {"params": params, "batch_stats": batch_stats, "frontend": self._frontend}
        concordance, unit = None, run.units
        if len(run.validation_views):
            raw = self._predict(variables, run.validation_views)
            labels = run.labels.values[run.validation_views].astype(np.float64)
            if run.config.calibrate and len(labels) >= CALIBRATION_VIEWS:
                unit = units.calibrate(raw, labels, run.units.deviation)
            scores = metrics.ccc(raw * unit.deviation + unit.mean, labels)
            concordance = {name: float(score) for name, score in zip(run.labels.dimensions, scores, strict=True)}
            concordance["mean"] = float(scores.mean())
            self._log.write("validation", step, {f"ccc/{name}": score for name, score in concordance.items()})
            if self._progress:
                self._progress(step, run.config.steps, validation_ccc=concordance["mean"])
        best = self._best["ccc"]
        if concordance is None or best is None or concordance["mean"] > best["mean"]:
            self._best = {"step": step, "ccc": concordance}
            if is_main_process():
                self._save_student({**variables, "params": units.fold_units(params, unit)})

    def _save_student(self, variables: dict) -> None:
        run, pretrained = self._run, self._run.pretrained[1]
        about = {
            "dimensions": list(run.labels.dimensions),
            "teacher": run.labels.about["teacher"],
            **({"pretrained": pretrained} if pretrained else {}),
            "bank": run.bank.fingerprint,
            "views": run.views.fingerprint,
            "step": self._best["step"],
            "validation_ccc": self._best["ccc"],
        }
        checkpoint.save_student(run.workdir / "student", run.config.student, run.fields, variables, about)

    def _predict(self, variables: dict, rows: np.ndarray) -> np.ndarray:
        """Standardised predictions for some views, float64 [n, D]; each process computes a part, on all its devices."""
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))

        def infer(waves: np.ndarray) -> Array:
            return self._apply(variables, jax.device_put(waves, NamedSharding(mesh, PartitionSpec("batch"))))

        count = -(-len(rows) // jax.process_count())
        own = rows[jax.process_index() * count :][:count]
        raw = np.zeros((0, len(self._run.labels.dimensions)))
        if len(own):
            raw = predict_views(infer, self._run.bank, self._run.views, own, devices=mesh.size)
        return gather_rows(raw.astype(np.float32), count).astype(np.float64)


class _Speed:
    """Clips per second and shares of time, since the end of the first dispatch, which compiles.

    Args:
        batch_size: clips in a step.
        limit: FLOP/s that the devices can compute, if that is known.
        step: the number of steps that are done.
    """

    def __init__(self, batch_size: int, limit: float | None, step: int) -> None:
        self._batch_size, self._limit, self._first_step = batch_size, limit, step
        self._began, self.waited, self.paused, self._flops = None, 0.0, 0.0, 0  # waited for data, paused: seconds

    def add(self, flops: int, step: int) -> None:
        """Count the steps up to ``step``, which took ``flops`` operations."""
        self._flops += flops
        if self._began is None:
            self._began, self._first_step = time.perf_counter(), step
            self.waited, self.paused, self._flops = 0.0, 0.0, 0

    @property
    def seconds(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began - self.paused

    def figures(self, step: int) -> dict[str, float]:
        """What metrics.jsonl records about speed after ``step``."""
        if step == self._first_step:
            return {}
        seconds, clips = self.seconds, (step - self._first_step) * self._batch_size
        figures = {"clips_per_second": clips / seconds, "waiting_share": self.waited / seconds}
        return figures | ({"arithmetic_share": self._flops / seconds / self._limit} if self._limit else {})


def training_flops(student: nn.Module, samples: int) -> int:
    """Floating-point operations of training on one clip: 2 per multiply-accumulate, 3 × those of the forward pass.

    The three are the forward pass, the gradient of the inputs and that of the weights. The front end is counted as if it were
    trained, too (3 % of Wav2Small); optimiser, BatchNorm and activations are not counted.

    >>> training_flops(models.build("wav2small"), 80_000)
    2345802246
    """
    return 2 * 3 * models.macs(student, samples)


class _Signals:
    """``received`` is the number of the first signal that asked the run to stop, 0 if there was none."""

    received = 0


@contextlib.contextmanager
def _catch_signals() -> Iterator[_Signals]:
    """Record the first SIGINT or SIGTERM, so that the loop stops after a checkpoint; a second one ends the process at once."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def handle(number, _frame):
        if signals.received:
            os._exit(128 + number)
        signals.received = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
