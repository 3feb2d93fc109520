"""Batches for training: which views make the batch of a step, and how they reach the devices.

Clips are divided into ``data_shards`` shards, and every batch takes the same number of views from each. A device has whole
shards, so it needs only its own part of the bank, and a batch is the same whatever the number of devices.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from w2s_jax import SAMPLING_RATE
from w2s_jax.bank import Bank
from w2s_jax.devices import total_memory
from w2s_jax.errors import UsageError, missing_extra
from w2s_jax.parallel import Layout
from w2s_jax.render import ROW, Recipe, Sources, make_recipe, mix, pack_clips, read_sources, render
from w2s_jax.views import Views

#: Consecutive steps that take views of one length, so that a scan has one shape.
LENGTH_RUN = 16
#: Share of a device's memory that a bank may take by itself; activations need the rest.
BANK_SHARE = 0.5


def divide(clips: np.ndarray, data_shards: int) -> np.ndarray:
    """Assign views to data shards by their clips: int [V] → int32 [V], 0 … data_shards - 1.

    All views of a clip are in one shard. A shard has neighbouring clips, so that a process reads few files, and about as many
    views as another.
    """
    _, place, views = np.unique(clips, return_inverse=True, return_counts=True)
    middle = np.cumsum(views) - views / 2  # of a clip's views among all
    return np.minimum(middle * data_shards / len(clips), data_shards - 1).astype(np.int32)[place]


class Batches:
    """The views of the batch at every step: a pure function of (seed, step), whichever steps were asked for before.

    Each shard goes through its views of one length epoch by epoch in shuffled order. Lengths alternate in runs of
    ``LENGTH_RUN`` steps, in proportion to their numbers of views.

    Args:
        samples: the views' lengths, int [V].
        batch_size: views in a batch, the same number from each shard.
        steps: how many steps there will be.
        seed: of the order.
        shard_of_view: int [V], from ``divide``; default: one shard.
        data_shards: the number of shards; with fewer clips than that, some are empty.

    Raises:
        UsageError: a shard has no views of some length.
    """

    def __init__(
        self,
        samples: np.ndarray,
        batch_size: int,
        steps: int,
        seed: int,
        shard_of_view: np.ndarray | None = None,
        data_shards: int = 1,
    ) -> None:
        self.lengths, counts = np.unique(samples, return_counts=True)
        shard = np.zeros(len(samples), np.int32) if shard_of_view is None else shard_of_view
        self.data_shards = data_shards
        if batch_size % data_shards:
            raise UsageError(f"a batch of {batch_size} views cannot take equally many from each of {data_shards} data shards")
        self._members = [[np.flatnonzero((samples == n) & (shard == s)) for s in range(data_shards)] for n in self.lengths]
        for length, members in zip(self.lengths, self._members, strict=True):
            empty = sum(not len(views) for views in members)
            if empty:
                raise UsageError(
                    f"{empty} of {data_shards} data shards have no view of {length / SAMPLING_RATE:g} s; "
                    "train on fewer devices or set fewer data_shards, or draw more views per clip"
                )
        runs = -(-steps // LENGTH_RUN)
        self._length_of_run = np.random.default_rng([seed, 0]).choice(len(counts), size=runs, p=counts / counts.sum())
        self._earlier_runs = [np.concatenate([[0], np.cumsum(self._length_of_run == k)]) for k in range(len(counts))]
        self._each, self._seed, self._orders = batch_size // data_shards, seed, {}

    def __call__(self, step: int, shards: range | None = None) -> tuple[int, np.ndarray]:
        """The length of the views at a step, and their rows int64 [shards, batch_size / data_shards]."""
        run, within = divmod(step, LENGTH_RUN)
        length = int(self._length_of_run[run])
        earlier = int(self._earlier_runs[length][run]) * LENGTH_RUN + within  # steps with views of this length
        places = np.arange(earlier * self._each, (earlier + 1) * self._each)
        shards = range(self.data_shards) if shards is None else shards
        return int(self.lengths[length]), np.stack([self._take(length, shard, places) for shard in shards])

    def _take(self, length: int, shard: int, places: np.ndarray) -> np.ndarray:
        """The views at ``places`` of the endless sequence of a shard's epochs."""
        members = self._members[length][shard]
        epochs, places = np.divmod(places, len(members))
        out = np.empty_like(places)
        for epoch in np.unique(epochs):  # one or two
            now = epochs == epoch
            out[now] = members[self._order(length, shard, int(epoch))[places[now]]]
        return out

    def _order(self, length: int, shard: int, epoch: int) -> np.ndarray:
        key = (length, shard, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[:2] == key[:2]][:-1]:  # a batch takes views of at most two epochs
                del self._orders[old]
            # without the number 0, so that the order of a bank in one shard is that of earlier versions
            seed = [self._seed, 1, length, epoch, *([shard] if shard else [])]
            self._orders[key] = np.random.default_rng(seed).permutation(len(self._members[length][shard]))
        return self._orders[key]

    def next_run(self, step: int) -> int:
        """The first step after ``step`` at which the length may change."""
        return (step // LENGTH_RUN + 1) * LENGTH_RUN if len(self.lengths) > 1 else 1 << 62


class Plan(NamedTuple):
    """Where the bank is stored, and the arithmetic behind it."""

    placement: str  # "device" or "host"
    reason: str


def plan(bank: Bank, views: Views, training: np.ndarray, shard_of_view: np.ndarray, layout: Layout, config: Any) -> Plan:
    """Decide where the bank is stored: ``config.bank_placement``, or what memory allows where that is "auto".

    Raises:
        UsageError: an unknown placement.
    """
    needed = max(samples for samples, _ in _count_per_device(bank, views, training, shard_of_view, layout)) * 2
    own = int(bank.clips["samples"][np.unique(views.columns["clip"][training])].sum(dtype=np.int64)) * 2
    total = total_memory(layout.devices[layout.local[0]])
    limit = config.bank_gib * 2**30 or total * BANK_SHARE
    devices = f"{len(layout.devices)} device{'s' * (len(layout.devices) > 1)}"
    arithmetic = (
        f"{own / SAMPLING_RATE / 7200:.3g} hours of training clips are {_bytes(own)} (int16), {_bytes(needed)} on each of "
        f"{devices}, mixing partners included; {_bytes(limit)} may be used" + f" of {_bytes(total)}" * (not config.bank_gib)
    )
    automatic = "device" if needed <= limit else "host"
    placement = {"auto": automatic, "device": "device", "host": "host"}.get(config.bank_placement)
    if placement is None:
        raise UsageError(f"bank_placement is {config.bank_placement!r}; expected auto, device or host")
    return Plan(placement, f"bank on the {placement}: {arithmetic}")


def _bytes(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**27 else f"{count / 2**20:.3g} MiB"


def _count_per_device(
    bank: Bank, views: Views, training: np.ndarray, shard_of_view: np.ndarray, layout: Layout
) -> Iterator[tuple[int, int]]:
    """For each device of all processes: samples of the clips that its views are made of, and how many views it has."""
    lengths = bank.clips["samples"].astype(np.int64)
    for device in range(len(layout.devices)):
        rows = training[shard_of_view // layout.shards_per_device == device]
        yield int(lengths[_clips(views, rows)].sum()), len(rows)


def _clips(views: Views, rows: np.ndarray) -> np.ndarray:
    """The clips that some views are made of, mixing partners included: int [n], ascending."""
    partners = views.columns["partner"][rows]
    return np.union1d(views.columns["clip"][rows], partners[partners >= 0])


class StepInput(NamedTuple):
    """One step's batch on the local devices."""

    samples: int  # length of its views
    rows: np.ndarray  # its views among the training views, [local devices, b]
    inputs: Any  # what ``render_batch`` needs of it, numpy arrays [local devices, b, …]


class DeviceFeed:
    """Each device stores its clips, recipes and labels; a step needs nothing from the host but the numbers of its views.

    Attributes:
        data: (bank int16 [rows, ROW], recipes [V], targets float32 [V, D]) of every local device, as numpy arrays with the
            devices as leading axis.
    """

    def __init__(self, bank, views, training, shard_of_view, targets, layout: Layout, batches: Batches) -> None:
        self._batches, self._layout = batches, layout
        samples, counts = zip(*_count_per_device(bank, views, training, shard_of_view, layout), strict=True)
        height, most = -(-max(samples) // ROW), max(counts)
        self._row_in_table = np.full(len(training), -1, np.int32)  # of each training view, in the table of its device
        parts = []
        for device in layout.local:
            own = np.flatnonzero(shard_of_view // layout.shards_per_device == device)
            self._row_in_table[own] = np.arange(len(own))
            packed, starts = pack_clips(bank, _clips(views, training[own]), height)
            filled = np.resize(own, most)  # fills up the tables to one height; no step asks for the repeated views
            parts.append((packed, make_recipe(bank, views, training[filled], starts), targets[filled]))
        self.data = jax.tree.map(lambda *leaves: np.stack(leaves) if len(leaves) > 1 else leaves[0][None], *parts)

    def batches(self, start: int, stop: int) -> Iterator[StepInput]:
        """The input of each step from ``start`` to ``stop - 1``."""
        for step in range(start, stop):
            samples, rows = self._batches(step, self._layout.local_shards)
            rows = rows.reshape(len(self._layout.local), -1)
            yield StepInput(samples, rows, self._row_in_table[rows])

    @staticmethod
    def render_batch(data: tuple[Array, Recipe, Array], rows: Array, samples: int) -> tuple[Array, Array]:
        """Render one device's part of a batch: int32 [b] → waveforms float32 [b, samples] and targets [b, D]."""
        bank, recipes, targets = data
        recipe = jax.tree.map(lambda column: column[rows], recipes)
        return render(bank, recipe, samples), targets[rows]


class HostFeed:
    """For a bank that devices cannot hold: the host reads what views are mixed of ahead of time, and devices mix it.

    The waveforms are bit for bit those of ``DeviceFeed``. Reading is grain's: in ``workers`` processes, or in threads of this
    one where that is 0.
    """

    data = ()

    def __init__(self, bank, views, training, targets, layout: Layout, batches: Batches, workers: int) -> None:
        try:
            import grain
        except ImportError as error:
            raise missing_extra("grain", "train") from error
        self._grain, self._workers = grain, workers
        self._read = partial(_read, bank, views, training, targets, layout.local_shards, len(layout.local), batches)

    def batches(self, start: int, stop: int) -> Iterator[StepInput]:
        """As ``DeviceFeed.batches``."""
        grain = self._grain
        threads = min(16, os.cpu_count() or 1)
        steps = grain.MapDataset.range(start, stop).map(self._read)
        # the number of batches that are read ahead; each is as large as what the devices render in a step
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        if self._workers:
            ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        dataset = steps.to_iter_dataset(ahead)
        if self._workers:
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options)
        batches = iter(dataset)
        with _without_script() if self._workers else contextlib.nullcontext():
            yield from itertools.islice(batches, 1)  # starts the processes
        yield from batches

    @staticmethod
    def render_batch(data: tuple, inputs: tuple[Sources, Array], samples: int) -> tuple[Array, Array]:
        """Render one device's part of a batch: sources and targets of b views → waveforms [b, samples], targets [b, D]."""
        sources, targets = inputs
        return mix(**sources._asdict()), targets


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Keep processes that are started inside from running the user's script again: they need nothing of it, and without a
    guard (``if __name__ == "__main__"``) it would start a training in each of them.
    """
    main = sys.modules["__main__"].__dict__
    hidden = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(__spec__=None)
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(hidden)


def _read(bank, views, training, targets, shards, devices, batches, step) -> StepInput:
    samples, rows = batches(int(step), shards)
    inputs = read_sources(bank, views, training[rows.ravel()]), targets[rows.ravel()]
    inputs = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), inputs)
    return StepInput(samples, rows.reshape(devices, -1), inputs)
