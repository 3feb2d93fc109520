"""Many devices and many processes: one program over a mesh (jit), or the same program on each device (pmap)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax.errors import UsageError, W2SError

#: The name of the axis of all devices, under pmap and in the mesh.
AXIS = "batch"


class Layout(NamedTuple):
    """Which devices train, and which groups of views they hear: device ``i`` those from ``i · per_device`` on."""

    devices: tuple[jax.Device, ...]  # of all processes; those of one process are neighbours
    shards: int

    @property
    def per_device(self) -> int:
        return self.shards // len(self.devices)

    @property
    def local(self) -> range:
        """The places of this process's devices among all."""
        mine = [at for at, device in enumerate(self.devices) if device.process_index == jax.process_index()]
        return range(mine[0], mine[-1] + 1)

    @property
    def local_groups(self) -> range:
        return range(self.local.start * self.per_device, self.local.stop * self.per_device)


def lay_out(shards: int, batch_size: int, accumulate: int = 1) -> Layout:
    """All devices of all processes, and ``shards`` groups of views for them; 0 is one for each device.

    Raises:
        UsageError: the devices cannot share the groups, or the groups a batch, or a batch its parts, without a remainder.
    """
    devices = tuple(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
    shards = shards or len(devices)
    if shards < 1 or shards % len(devices):
        raise UsageError(f"{len(devices)} devices cannot share {shards} data shards; set data_shards to a multiple of them")
    if accumulate < 1 or batch_size % shards or batch_size // len(devices) % accumulate:
        raise UsageError(
            f"batch_size is {batch_size} in all; expected a multiple of {shards} data shards, and on each of "
            f"{len(devices)} devices a multiple of accumulate={accumulate}"
        )
    return Layout(devices, shards)


class Jit:
    """One program over a mesh of all devices: the batch is one global array that is sharded over them."""

    axis_name = None

    def __init__(self, layout: Layout) -> None:
        self._mesh = Mesh(np.array(layout.devices), (AXIS,))

    def everywhere(self, tree: Any) -> Any:
        """A tree of arrays, the same in every process, to every device."""
        return jax.device_put(jax.device_get(tree), NamedSharding(self._mesh, P()))

    def split(self, tree: Any, axis: int = 0) -> Any:
        """A tree of numpy arrays whose ``axis`` is the local devices, each part to its device."""
        sharding = NamedSharding(self._mesh, P(*[None] * axis, AXIS))
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)

    def compiled(self, hear: Callable, steps: Callable) -> Callable:
        """``steps(state, chosen, hear)`` as a function (state, data, chosen, signals, samples) → (state, measured).

        Args:
            hear: one device's (data, one step's choice, samples) → its part of a batch.
            steps: from the state, the choice of each step and a function from a step's choice to its global batch.
        """

        @partial(jax.jit, static_argnames="samples", donate_argnums=0, out_shardings=NamedSharding(self._mesh, P()))
        def run(state, data, chosen, signals, samples):
            def device_hears(data, one):
                data, one = jax.tree.map(lambda leaf: leaf[0], (data, one))
                return hear(data, one, samples)

            # each device reads its own part of the bank: left to itself, XLA would gather all of it
            everyone_hears = jax.shard_map(device_hears, mesh=self._mesh, in_specs=P(AXIS), out_specs=P(AXIS))
            state, measured = steps(state, chosen, partial(everyone_hears, data))
            return state, {**measured, "signal": signals.max()}

        return lambda state, data, chosen, signals, samples: run(
            state, data, self.split(chosen, 1), self.split(signals), samples=samples
        )


class Pmap:
    """The same program on each device, whose step reduces over the axis ``AXIS``. The state has no device axis."""

    axis_name = AXIS

    def __init__(self, layout: Layout) -> None:
        self._devices = [layout.devices[at] for at in layout.local]

    def everywhere(self, tree: Any) -> Any:
        """See ``Jit.everywhere``; pmap copies it to the devices at every call."""
        return jax.device_put(jax.device_get(tree), self._devices[0])

    def split(self, tree: Any) -> Any:
        """See ``Jit.split``."""
        return jax.pmap(lambda tree: tree)(tree) if jax.tree.leaves(tree) else tree

    def compiled(self, hear: Callable, steps: Callable) -> Callable:
        """See ``Jit.compiled``; ``steps`` gets a function to one device's part of the batch."""

        def run(state, data, chosen, signals, samples):
            state, measured = steps(state, chosen, lambda one: hear(data, one, samples))
            return state, {**measured, "signal": lax.pmax(signals, AXIS)}

        return jax.pmap(run, AXIS, in_axes=(None, 0, 1, 0), out_axes=None, static_broadcasted_argnums=4)


PARALLEL = {"jit": Jit, "pmap": Pmap}


def gathered(values: np.ndarray, count: int) -> np.ndarray:
    """The rows that every process has for itself, process 0's first: float32 [n, D] each, n ≤ ``count`` → [all, D]."""
    if jax.process_count() == 1:
        return values
    padded = np.full((count, values.shape[1]), np.nan, np.float32)
    padded[: len(values)] = values
    everyone = multihost_utils.process_allgather(padded).reshape(-1, values.shape[1])
    sizes = multihost_utils.process_allgather(np.int32(len(values)))
    kept = (np.arange(count) < np.asarray(sizes)[:, None]).ravel()
    return np.asarray(everyone)[kept]


def first() -> bool:
    """Whether this is the process that writes and tells."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Make this process one of several for JAX: found out by JAX on TPU slices and under Slurm, else as given.

    Args:
        coordinator: HOST:PORT of process 0.
        processes, process: how many there are, and which one this is, from 0.

    Raises:
        UsageError: the others cannot be found.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Turn two of XLA's errors into such as say what to do: memory that does not suffice, and another process that has gone.

    Raises:
        W2SError: names what ran out, or this process, and what to do.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise W2SError(
                f"{what}: a step needs more memory than there is ({str(error).splitlines()[0][:200]}); set a smaller "
                "batch_size, or accumulate=N, which computes the same batch in N parts"
            ) from error
        gone = re.search("gloo|nccl|connection|unavailable|heartbeat|deadline|coordination|peer", str(error), re.IGNORECASE)
        if jax.process_count() == 1 or not gone:
            raise
        first = str(error).splitlines()[0][:200]
        raise W2SError(
            f"{what}: process {jax.process_index()} of {jax.process_count()} lost the others ({first}); one of them has ended "
            "or cannot be reached: look at its output, and start all of them again, they go on from the last checkpoint"
        ) from error
