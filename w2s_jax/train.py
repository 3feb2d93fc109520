"""Train a student on a teacher's labels: a pure step, and a driver that can be killed at any point."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from jax import Array, lax
from ml_collections import ConfigDict

from w2s_jax import __version__, checkpoint, convert, metrics, models
from w2s_jax.artifacts import MismatchError, UsageError, W2SError, locked, read_json, write_json
from w2s_jax.bank import Bank
from w2s_jax.evaluate import predict_views
from w2s_jax.labels import Labels
from w2s_jax.losses import distillation_loss
from w2s_jax.render import Recipe, mix, pieces, recipes, render, rows
from w2s_jax.views import Views

#: Steps in one dispatch. On CPUs XLA runs a convolution inside a loop many times slower, so there each step is a dispatch of
#: its own (measured: experiments/README.md); accelerators get many.
SCAN_STEPS = {"cpu": 1, "gpu": 32, "tpu": 32}
#: Consecutive steps that take views of one length, so that a scan has one shape.
LENGTH_RUN = 16
#: Fewer validation views than this say too little about the spread of predictions to calibrate on.
CALIBRATION_VIEWS = 100


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
    axis_name: str | None = None,
) -> tuple[State, dict[str, Array]]:
    """One update: the same function under jit and, with ``axis_name``, under pmap.

    Args:
        state: before the step.
        batch: waveforms float32 [B, T] and standardised labels float32 [B, D].
        student, frontend: the module and its fixed collection; under pmap the module has the same ``axis_name``.
        optimizer: an optax transformation.
        l2: weight of the squared error.
        ema: decay of the averaged weights.
        axis_name: of the pmap; the loss then sees the moments of the whole global batch.

    Returns:
        The state after the step, and loss [], ccc [D], gradient_norm [].
    """
    waves, targets = batch

    def loss_of(params):
        prediction, changed = student.apply(
            {"params": params, "batch_stats": state.batch_stats, "frontend": frontend},
            waves, train=True, mutable=["batch_stats"],
        )  # fmt: skip
        loss, concordance = distillation_loss(prediction, targets, l2=l2, axis_name=axis_name)
        return loss, (changed["batch_stats"], concordance)

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
    return after, {"loss": loss, "ccc": concordance, "gradient_norm": optax.tree.norm(gradients)}


def train_steps(state: State, bank: Array, table: Recipe, targets: Array, chosen: Array, samples: int, step: Callable):
    """Several steps in one dispatch, nothing from the host: render, run and update.

    Args:
        state: before the first step.
        bank: int16 [rows, ROW].
        table: recipes of all training views, arrays [V].
        targets: standardised labels float32 [V, D].
        chosen: int32 [S, B], the views of each step's batch, all of length ``samples``.
        samples: length of the views.
        step: ``train_step`` with everything but state and batch bound.

    Returns:
        The state after S steps, and the metrics of each, [S, ...].
    """

    def body(state: State, index: Array):
        recipe = jax.tree.map(lambda column: column[index], table)
        return step(state, (render(bank, recipe, samples), targets[index]))

    return scan_steps(body, state, chosen)


def train_steps_from_host(state: State, batch: tuple, step: Callable):
    """``train_steps`` for a bank that the device cannot hold: the pieces of S batches, gathered on the host.

    ``batch`` is (own int16 [S, B, T], partner int16 [S, B, T], gain [S, B], partner_level [S, B], targets [S, B, D]).
    """

    def body(state: State, one):
        *heard, targets = one
        return step(state, (mix(*heard), targets))

    return scan_steps(body, state, batch)


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


class Batches:
    """Which views make the batch at a step: a pure function of (seed, step), whatever was run before.

    Each length's views are gone through epoch by epoch in shuffled order; lengths take turns in runs of ``LENGTH_RUN``
    steps, each as often as it has views.
    """

    def __init__(self, samples: np.ndarray, batch_size: int, steps: int, seed: int) -> None:
        self.lengths, counts = np.unique(samples, return_counts=True)
        self._members = [np.flatnonzero(samples == length) for length in self.lengths]
        runs = -(-steps // LENGTH_RUN)
        self._turn = np.random.default_rng([seed, 0]).choice(len(counts), size=runs, p=counts / counts.sum())
        self._before = [np.concatenate([[0], np.cumsum(self._turn == k)]) for k in range(len(counts))]
        self._batch_size, self._seed, self._orders = batch_size, seed, {}

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        """The length of the views at a step, and their rows int64 [B]."""
        run, within = divmod(step, LENGTH_RUN)
        kind = int(self._turn[run])
        earlier = int(self._before[kind][run]) * LENGTH_RUN + within
        members = self._members[kind]
        epochs, places = np.divmod(np.arange(earlier * self._batch_size, (earlier + 1) * self._batch_size), len(members))
        return int(self.lengths[kind]), members[[self._order(kind, int(e))[p] for e, p in zip(epochs, places, strict=True)]]

    def _order(self, kind: int, epoch: int) -> np.ndarray:
        if (kind, epoch) not in self._orders:
            if len(self._orders) > 4 * len(self._members):  # a batch looks at one epoch or two
                self._orders.clear()
            self._orders[kind, epoch] = np.random.default_rng([self._seed, 1, kind, epoch]).permutation(
                len(self._members[kind])
            )
        return self._orders[kind, epoch]

    def until(self, step: int) -> int:
        """The step at which another length may begin."""
        return (step // LENGTH_RUN + 1) * LENGTH_RUN if len(self.lengths) > 1 else 1 << 62


def train(
    config: ConfigDict,
    bank: Bank,
    views: Views,
    labels: Labels,
    workdir: str | os.PathLike,
    *,
    progress: Callable[..., None] | None = None,
) -> dict:
    """Train a student. Run again after a kill, it goes on from the last checkpoint and ends bit for bit where an unbroken
    run ends on the same devices.

    Args:
        config: as ``w2s_jax.config.default``.
        bank, views, labels: what to train on; they belong together.
        workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/ and student/, the best by mean CCC on the
            validation views (the last where there are none).
        progress: called with (steps done, steps in all, **figures).

    Returns:
        A summary: step and validation CCC of the best student, and the speed.

    Raises:
        MismatchError: bank, views and labels, a run that is already there, or the weights to start from, do not belong
            together.
        Interrupted: SIGINT or SIGTERM came; a checkpoint of the last step is written.
        W2SError: the loss is not finite; names the step and its views. The last good checkpoint is kept.
    """
    views.check(bank)
    workdir = Path(workdir)
    training = views.where("train")
    if not len(training):
        raise UsageError("the views have no training split; build the bank with one")
    if config.steps < 1 or config.batch_size < 2 or config.eval_every < 1 or config.log_every < 1:
        raise UsageError("expected steps ≥ 1, batch_size ≥ 2 (CCC belongs to a set), eval_every ≥ 1, log_every ≥ 1")
    if not 0 < config.crop <= 1:
        raise UsageError(f"crop is the share of a view that a step hears, above 0 and at most 1; got {config.crop}")
    student = models.build(config.student, dimensions=len(labels.dimensions), **config.fields)
    with locked(workdir), _signals() as stop:
        return _Run(config, bank, views, labels, workdir, student, training, stop, progress).run()


class _Run:
    """The driver's state; one method per thing that it does."""

    def __init__(self, config, bank, views, labels, workdir, student, training, stop, progress) -> None:
        self.config, self.bank, self.views, self.labels = config, bank, views, labels
        self.workdir, self.student, self.training, self.stop, self.progress = workdir, student, training, stop, progress
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
        self.taken, self.pretrained = self.start()
        self.claim()

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
        """Refuse a directory that holds another run; note this one's configuration."""
        config = json.loads(self.config.to_json())
        del config["pretrained"]  # the weights are known by their content, wherever they lie
        about = {
            "config": config,
            "pretrained": self.pretrained,
            "bank": self.bank.fingerprint,
            "views": self.views.fingerprint,
            "teacher": self.labels.about["teacher"],
            "w2s_jax": __version__,
        }
        path = self.workdir / "config.json"
        if path.exists():
            before, now = _flat(read_json(path, "run")), _flat(about)
            differing = [f"{k}: {before.get(k)} there, {now.get(k)} now" for k in before | now if before.get(k) != now.get(k)]
            if differing:
                raise MismatchError(
                    f"{self.workdir} holds another run ({'; '.join(differing)}); choose another --workdir, or delete it"
                )
        write_json(path, about)

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
        self.frontend = variables["frontend"]
        return initial_state(variables, self.optimizer)

    def run(self) -> dict:
        config = self.config
        self.batches = Batches(self.views.columns["samples"][self.training], config.batch_size, config.steps, config.seed)
        state = self.initial()
        self.infer = jax.jit(partial(self.student.apply, train=False))
        scan = config.scan_steps or SCAN_STEPS.get(jax.default_backend(), 1)
        best = {"step": 0, "ccc": None}
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        with ocp.CheckpointManager((self.workdir / "checkpoints").resolve(), options=options) as checkpoints:
            if checkpoints.latest_step() is not None:
                shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.kept(state))
                items = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
                args = ocp.args.Composite(**items, best=ocp.args.JsonRestore())
                saved = checkpoints.restore(checkpoints.latest_step(), args=args)
                state, best = saved["state"], saved["best"]
                self.frontend = saved.get("frontend", self.frontend)
            step = partial(
                train_step, student=self.student, frontend=self.frontend, optimizer=self.optimizer, l2=config.l2, ema=config.ema
            )
            dispatch = self.dispatcher(cropped(step, config.crop, config.seed))
            done = int(state.step)
            self.log = _Log(self.workdir, done, self.labels.dimensions)
            with self.log:
                began, first = time.perf_counter(), done
                while done < config.steps:
                    end = min(done + scan, config.steps, self.batches.until(done), _next(done, config.eval_every))
                    pairs = [self.batches(at) for at in range(done, end)]
                    chosen = np.stack([pair[1] for pair in pairs])
                    state, measured = dispatch(state, pairs[0][0], chosen)
                    self.check(np.asarray(measured["loss"]), chosen, done)
                    if any(at % config.log_every == 0 for at in range(done + 1, end + 1)) or end == config.steps:
                        self.report(measured, end, (end - first) / (time.perf_counter() - began))
                    done = end
                    if done % config.eval_every == 0 or done == config.steps:
                        paused = time.perf_counter()
                        best = self.evaluate(state, done, best)
                        self.save(checkpoints, state, best)
                        began += time.perf_counter() - paused  # the speed is that of training
                    if self.stop.number:
                        if checkpoints.latest_step() != done:
                            self.save(checkpoints, state, best)
                        raise Interrupted(self.stop.number, done, self.workdir)
                seconds = time.perf_counter() - began
        return {
            "student": str(self.workdir / "student"),
            "steps": config.steps,
            "best_step": best["step"],
            "validation_ccc": best["ccc"],
            "clips_per_second": round((config.steps - first) * config.batch_size / seconds, 1) if done > first else None,
            "seconds": round(seconds, 1),
        }

    def dispatcher(self, step: Callable) -> Callable:
        """A jitted function (state, samples, chosen [S, B]) → (state, metrics), the bank on the device where it fits."""
        limit = self.config.bank_gib * 2**30 or _memory() / 2
        if self.bank.samples * 2 <= limit:
            on_device = jax.device_put(rows(self.bank))
            table = jax.tree.map(jnp.asarray, recipes(self.bank, self.views, self.training))
            targets = jnp.asarray(self.targets)
            run = jax.jit(partial(train_steps, step=step), static_argnames="samples", donate_argnums=0)
            return lambda state, samples, chosen: run(
                state, on_device, table, targets, jnp.asarray(chosen, jnp.int32), samples=samples
            )
        run_host = jax.jit(partial(train_steps_from_host, step=step), donate_argnums=0)

        def from_host(state: State, samples: int, chosen: np.ndarray):
            heard = [pieces(self.bank, self.views, self.training[batch]) for batch in chosen]
            return run_host(state, (*map(np.stack, zip(*heard, strict=True)), self.targets[chosen]))

        return from_host

    def check(self, losses: np.ndarray, chosen: np.ndarray, done: int) -> None:
        """Stop at the first loss [S] that is not finite; later ones would only follow from it."""
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            where = ", ".join(str(view) for view in self.training[chosen[bad[0]]])
            raise W2SError(
                f"the loss is {losses[bad[0]]} at step {done + int(bad[0]) + 1} (views {where}); "
                "lower learning_rate, or look at these views' labels"
            )

    def report(self, measured: dict, end: int, rate: float) -> None:
        measured = jax.device_get(measured)
        figures = {
            "loss": float(measured["loss"].mean()),
            **{f"ccc/{d}": float(c) for d, c in zip(self.labels.dimensions, measured["ccc"].mean(axis=0), strict=True)},
            "gradient_norm": float(measured["gradient_norm"].mean()),
            "learning_rate": float(self.schedule(end - 1)),
            "clips_per_second": rate * self.config.batch_size,
        }
        self.log.write("train", end, figures)
        if self.progress:
            self.progress(end, self.config.steps, loss=figures["loss"], clips_per_second=figures["clips_per_second"])

    def evaluate(self, state: State, step: int, best: dict) -> dict:
        """CCC of the averaged weights on the validation views; a better student than the best so far is kept."""
        params, batch_stats = state.average
        variables = {"params": params, "batch_stats": batch_stats, "frontend": self.frontend}
        validation, concordance = self.views.where("validation"), None
        mean, deviation = self.mean, self.deviation
        if len(validation):
            raw = predict_views(partial(self.infer, variables), self.bank, self.views, validation)
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
            checkpoint.save_student(
                self.workdir / "student",
                self.config.student,
                {"dimensions": len(self.labels.dimensions), **self.config.fields.to_dict()},
                jax.device_get({**variables, "params": in_units(params, mean, deviation)}),
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

    def kept(self, state: State) -> dict:
        """The arrays of a checkpoint: a front end that was taken over need not be, bit for bit, what ``init`` computes."""
        return {"state": state, "frontend": self.frontend} if self.pretrained else {"state": state}

    def save(self, checkpoints: ocp.CheckpointManager, state: State, best: dict) -> None:
        items = {name: ocp.args.StandardSave(tree) for name, tree in self.kept(state).items()}
        checkpoints.save(int(state.step), args=ocp.args.Composite(**items, best=ocp.args.JsonSave(best)))


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


class _Log:
    """metrics.jsonl and TensorBoard events; after a resumption, nothing of the steps that are run again."""

    def __init__(self, workdir: Path, done: int, dimensions: tuple[str, ...]) -> None:
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # a kill can leave half a line
                if json.loads(line)["step"] <= done:
                    kept.append(line + "\n")
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._file.writelines(kept)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=done + 1 if done else None)

    def write(self, kind: str, step: int, figures: dict[str, float]) -> None:
        line = {"step": step, "kind": kind, **{key: round(value, 6) for key, value in figures.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in figures.items():
            self._board.add_scalar(f"{kind}/{key}", value, step)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._board.close()


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


def _memory() -> float:
    """Bytes of memory of the device that holds the bank."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
