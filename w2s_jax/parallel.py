"""Many devices and many processes: the same step on every device, run by ``jit(shard_map(...))`` or by ``pmap``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax.errors import UsageError, W2SError

#: The name of the axis of all devices.
AXIS = "batch"


class Layout(NamedTuple):
    """The devices that train, and how many data shards (disjoint sets of views) they share.

    Device ``i`` has the ``shards_per_device`` shards from ``i · shards_per_device`` on.
    """

    devices: tuple[jax.Device, ...]  # of all processes; those of one process are neighbours
    data_shards: int

    @property
    def shards_per_device(self) -> int:
        """Data shards of one device."""
        return self.data_shards // len(self.devices)

    @property
    def local(self) -> range:
        """Indices into ``devices`` of this process's devices."""
        local = [at for at, device in enumerate(self.devices) if device.process_index == jax.process_index()]
        return range(local[0], local[-1] + 1)

    @property
    def local_shards(self) -> range:
        """The data shards of this process's devices."""
        return range(self.local.start * self.shards_per_device, self.local.stop * self.shards_per_device)


def lay_out(data_shards: int, batch_size: int, accumulate: int = 1) -> Layout:
    """Distribute data shards over all devices of all processes; ``data_shards`` 0 is one for each device.

    Raises:
        UsageError: the shards cannot be divided evenly among the devices, a batch among the shards, or a device's part of a
            batch into ``accumulate`` parts.
    """
    devices = tuple(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
    data_shards = data_shards or len(devices)
    if data_shards < 1 or data_shards % len(devices):
        raise UsageError(
            f"{len(devices)} devices cannot share {data_shards} data shards; set data_shards to a multiple of them"
        )
    if accumulate < 1 or batch_size % data_shards or batch_size // len(devices) % accumulate:
        raise UsageError(
            f"batch_size is {batch_size} in all; expected a multiple of {data_shards} data shards, and on each of "
            f"{len(devices)} devices a multiple of accumulate={accumulate}"
        )
    return Layout(devices, data_shards)


class Jit:
    """Runs a step on all devices as one compiled program over a mesh, ``jit(shard_map(step))``.

    Attributes:
        axis_name: what the step reduces over; None on one device, where there is nothing to reduce.
    """

    def __init__(self, layout: Layout) -> None:
        self.axis_name = AXIS if len(layout.devices) > 1 else None
        self._mesh = Mesh(np.array(layout.devices), (AXIS,))

    def replicate(self, tree: Any) -> Any:
        """Copy a tree of arrays, the same in every process, to every device."""
        return jax.device_put(jax.device_get(tree), NamedSharding(self._mesh, P()))

    def shard(self, tree: Any, axis: int = 0) -> Any:
        """Send index i of ``axis`` of numpy arrays to local device i."""
        sharding = NamedSharding(self._mesh, P(*[None] * axis, AXIS))
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)

    def compile(self, steps: Callable) -> Callable:
        """Compile ``steps(state, data, inputs, samples)``, which sees one device's arrays, for all devices.

        Returns:
            The same function of a replicated state, which is overwritten; data [devices, …] from ``shard``; and numpy inputs
            [steps, local devices, …]. What it returns must be equal on all devices, and is replicated.
        """

        @partial(jax.jit, static_argnames="samples", donate_argnums=0)
        def run(state, data, inputs, samples):
            def on_one_device(state, data, inputs):
                data = jax.tree.map(lambda leaf: leaf[0], data)
                inputs = jax.tree.map(lambda leaf: leaf[:, 0], inputs)
                return steps(state, data, inputs, samples)

            # check_vma=False: reductions and their gradients are those of pmap
            specs = {"in_specs": (P(), P(AXIS), P(None, AXIS)), "out_specs": P(), "check_vma": False}
            return jax.shard_map(on_one_device, mesh=self._mesh, **specs)(state, data, inputs)

        return lambda state, data, inputs, samples: run(state, data, self.shard(inputs, 1), samples=samples)


class Pmap:
    """Runs a step on all devices by ``pmap``; the interface is that of ``Jit``. The state has no device axis."""

    axis_name = AXIS

    def __init__(self, layout: Layout) -> None:
        self._devices = [layout.devices[at] for at in layout.local]

    def replicate(self, tree: Any) -> Any:
        """See ``Jit.replicate``; pmap copies the tree to the devices at every call."""
        return jax.device_put(jax.device_get(tree), self._devices[0])

    def shard(self, tree: Any) -> Any:
        """See ``Jit.shard``."""
        return jax.pmap(lambda tree: tree)(tree) if jax.tree.leaves(tree) else tree

    def compile(self, steps: Callable) -> Callable:
        """See ``Jit.compile``."""
        return jax.pmap(steps, AXIS, in_axes=(None, 0, 1), out_axes=None, static_broadcasted_argnums=3)


PARALLEL = {"jit": Jit, "pmap": Pmap}


def gather_rows(values: np.ndarray, most: int) -> np.ndarray:
    """Concatenate the rows of all processes in their order: float32 [n, D] each, n ≤ ``most`` → [all rows, D]."""
    if jax.process_count() == 1:
        return values
    padded = np.full((most, values.shape[1]), np.nan, np.float32)
    padded[: len(values)] = values
    rows = multihost_utils.process_allgather(padded).reshape(-1, values.shape[1])
    counts = multihost_utils.process_allgather(np.int32(len(values)))
    return np.asarray(rows)[(np.arange(most) < np.asarray(counts)[:, None]).ravel()]


def max_over_processes(value: int) -> int:
    """The largest of the processes' int32 values; every process must call it at the same step."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(value)).max())


def is_main_process() -> bool:
    """Whether this process is number 0, the one that writes files and prints messages."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Wait until every process has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Connect this process to the others of a job. On TPU slices and under Slurm JAX finds the arguments by itself.

    Args:
        coordinator: HOST:PORT of process 0.
        processes, process: the number of processes, and the index of this one.

    Raises:
        UsageError: the connection fails.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def translate_xla_errors(task: str) -> Iterator[None]:
    """Translate the errors that XLA raises when memory does not suffice, and when another process has died.

    Raises:
        W2SError: names the task, or this process, and says how to go on.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise W2SError(
                f"{task}: a step needs more memory than there is ({str(error).splitlines()[0][:200]}); set a smaller "
                "batch_size, or accumulate=N, which computes the same batch in N parts"
            ) from error
        network = "gloo|nccl|connection|unavailable|heartbeat|deadline|coordination|peer"
        if jax.process_count() == 1 or not re.search(network, str(error), re.IGNORECASE):
            raise
        first_line = str(error).splitlines()[0][:200]
        raise W2SError(
            f"{task}: process {jax.process_index()} of {jax.process_count()} lost the others ({first_line}); one of them has "
            "ended or cannot be reached: look at its output, and start all of them again, they go on from the last checkpoint"
        ) from error
