"""The training step, a pure function: render, forward, loss, gradient, update, average.

It is the same on one device and, with an ``axis_name`` to reduce over, on every device of a ``shard_map`` or a ``pmap``.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array, lax

from w2s_jax.losses import distillation_loss

#: Samples that a crop leaves at least.
SHORTEST_CROP = 64


class State(struct.PyTreeNode):
    """All that a step changes. ``average`` is the exponential moving average of (params, batch_stats) that is evaluated."""

    step: Array
    params: dict
    batch_stats: dict
    optimizer: optax.OptState
    average: tuple[dict, dict]


def initial_state(variables: dict, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step, from a student's collections ``params`` and, where it has them, ``batch_stats``."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        optimizer=optimizer.init(params),
        average=jax.tree.map(jnp.copy, (params, batch_stats)),  # a copy, so that both can be donated
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
    crop: float = 1.0,
    jitter: float = 0.0,
    seed: int = 0,
    axis_name: str | None = None,
) -> tuple[State, dict[str, Array]]:
    """Update the student once.

    Args:
        state: before the step.
        batch: waveforms float32 [B, T] and standardised labels float32 [B, D]; with ``axis_name``, this device's part of the
            global batch.
        student, frontend: the module, built with the same ``axis_name``, and its constants.
        optimizer: an optax transformation.
        l2: weight of the squared error.
        ema: decay of the averaged weights.
        accumulate: number of parts that the batch is split into to save memory. The loss is still that of the whole batch, so
            each part's forward pass is computed twice; BatchNorm sees the moments of a part.
        crop: share of each waveform that is used, from a random start that all waveforms share. The label stays that of the
            whole view. This regularises like dropout over time, and makes steps cheaper.
        jitter: deviation of the level and offset that the student gives normalised waveforms (``frontend.jitter``).
        seed: of the crop's start and the jitter, functions of (seed, state.step).
        axis_name: of the devices that share the global batch.

    Returns:
        The state after the step, and loss [], ccc [D], gradient_norm [], update_norm [], parameter_norm [].
    """
    waves, targets = batch
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    waves = random_crop(waves, crop, key)
    shaken = {"jitter": {"key": jax.random.key_data(key), "deviation": jnp.float32(jitter)}} if jitter else {}

    def compute_loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats, "frontend": frontend, **shaken}
        prediction, batch_stats = forward(student, variables, waves, accumulate)
        loss, concordance = distillation_loss(prediction, targets, l2=l2, axis_name=axis_name)
        return loss, (batch_stats, concordance)

    (loss, (batch_stats, concordance)), gradients = jax.value_and_grad(compute_loss, has_aux=True)(state.params)
    if axis_name is not None:
        # the loss is global, so each device's gradient is that of the sum of the devices' equal losses: the mean counts it once
        gradients = lax.pmean(gradients, axis_name)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # the decay is smaller during the first steps s: min(ema, (1 + s) / (10 + s))
    decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step)) if ema else 0.0
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, (params, batch_stats))
    state = State(
        step=state.step + 1, params=params, batch_stats=batch_stats, optimizer=optimizer_state, average=average
    )  # fmt: skip
    return state, {
        "loss": loss,
        "ccc": concordance,
        "gradient_norm": optax.tree.norm(gradients),
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(params),
    }


def random_crop(waves: Array, share: float, key: Array) -> Array:
    """Crop [B, T] to ``share`` of its length, at a random start that all rows share."""
    if share == 1.0:
        return waves
    length = max(round(waves.shape[1] * share), SHORTEST_CROP)
    start = jax.random.randint(key, (), 0, waves.shape[1] - length + 1)
    return lax.dynamic_slice_in_dim(waves, start, length, axis=1)


def forward(student: nn.Module, variables: dict, waves: Array, accumulate: int = 1) -> tuple[Array, dict]:
    """Run the student in training mode, in ``accumulate`` parts of the batch: predictions [B, D] and new batch_stats."""

    def apply(part: Array):
        prediction, updated = student.apply(variables, part, train=True, mutable=["batch_stats"])
        return prediction, updated.get("batch_stats", {})

    if accumulate == 1:
        return apply(waves)
    # part i has every accumulate-th view from i on: as many views of every data shard as any other part
    parts = waves.reshape(-1, accumulate, waves.shape[1]).swapaxes(0, 1)
    # a CPU gets no loop: XLA runs convolutions inside one many times slower
    unroll = accumulate if jax.default_backend() == "cpu" else 1
    # checkpoint: a part's activations are recomputed for its gradient instead of being stored
    body = jax.checkpoint(lambda _, part: (None, apply(part)))
    _, (prediction, batch_stats) = lax.scan(body, None, parts, unroll=unroll)
    prediction = prediction.swapaxes(0, 1).reshape(-1, prediction.shape[-1])
    return prediction, jax.tree.map(lambda leaf: leaf.mean(axis=0), batch_stats)


def train_steps(
    state: State, data, inputs, samples: int, *, render_batch: Callable, **arguments
) -> tuple[State, dict[str, Array]]:
    """Run S steps in one dispatch, without the host: render each step's batch, and update.

    Args:
        state: before the first step.
        data: what stays on the device, for ``render_batch``.
        inputs: a tree of arrays [S, …], what ``render_batch`` needs of each step.
        samples: length T of the views.
        render_batch: (data, inputs of one step, samples) → batch; of ``feed.DeviceFeed`` or ``feed.HostFeed``.
        arguments: those of ``train_step``.

    Returns:
        The state after S steps, and the metrics of each, [S, …].
    """

    def step(state: State, inputs):
        return train_step(state, render_batch(data, inputs, samples), **arguments)

    return scan_steps(step, state, inputs)


def scan_steps(step: Callable, state: State, inputs) -> tuple[State, dict[str, Array]]:
    """Apply ``step(state, inputs)`` to each index of the inputs' leading axis: the last state, and stacked metrics."""
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return lax.scan(step, state, inputs)
    # a single step without a loop, which would cost a CPU its threads
    state, metrics = step(state, jax.tree.map(lambda leaf: leaf[0], inputs))
    return state, jax.tree.map(lambda leaf: leaf[None], metrics)
