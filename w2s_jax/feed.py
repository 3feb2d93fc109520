"""What a training step hears: which views make its batch, and how they come to the devices that hear them.

Clips are divided into ``data_shards`` groups, and every batch takes the same number of views from each. A device has whole
groups, so it needs only its own part of the bank, and a batch is the same whatever the number of devices.
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
from w2s_jax.errors import UsageError, missing_extra
from w2s_jax.parallel import Layout
from w2s_jax.render import ROW, Recipe, mix, pieces, recipes, render, rows
from w2s_jax.views import Views

#: Consecutive steps that take views of one length, so that a scan has one shape.
LENGTH_RUN = 16
#: Share of a device's memory that a bank may take by itself; activations need the rest.
BANK_SHARE = 0.5


def divide(clips: np.ndarray, count: int) -> np.ndarray:
    """Views to groups by their clips: int [V] → int32 [V], 0 … count - 1.

    All views of a clip are in one group. A group has neighbouring clips, so that a process reads few files, and about as many
    views as another.
    """
    _, place, views = np.unique(clips, return_inverse=True, return_counts=True)
    middle = np.cumsum(views) - views / 2  # of a clip's views among all
    return np.minimum(middle * count / len(clips), count - 1).astype(np.int32)[place]


class Batches:
    """Which views make the batch at a step: a pure function of (seed, step), whatever was run before.

    Each length's views are gone through epoch by epoch in shuffled order, in every group for itself; lengths take turns in
    runs of ``LENGTH_RUN`` steps, each as often as it has views.

    Args:
        samples: the views' lengths, int [V].
        batch_size: views in a batch, the same number from each group.
        steps: how many steps there will be.
        seed: of the order.
        groups: int [V], as ``divide`` makes them; default: one.
        shards: how many groups there are; with fewer clips than that, some have no views.

    Raises:
        UsageError: a group has no views of some length.
    """

    def __init__(
        self,
        samples: np.ndarray,
        batch_size: int,
        steps: int,
        seed: int,
        groups: np.ndarray | None = None,
        shards: int = 1,
    ) -> None:
        self.lengths, counts = np.unique(samples, return_counts=True)
        groups = np.zeros(len(samples), np.int32) if groups is None else groups
        self.shards = shards
        if batch_size % self.shards:
            raise UsageError(f"a batch of {batch_size} views cannot take equally many from each of {self.shards} data shards")
        self._members = [[np.flatnonzero((samples == n) & (groups == g)) for g in range(self.shards)] for n in self.lengths]
        for length, members in zip(self.lengths, self._members, strict=True):
            empty = [group for group, views in enumerate(members) if not len(views)]
            if empty:
                raise UsageError(
                    f"{len(empty)} of {self.shards} data shards have no view of {length / SAMPLING_RATE:g} s; "
                    "train on fewer devices or set fewer data_shards, or draw more views per clip"
                )
        runs = -(-steps // LENGTH_RUN)
        self._turn = np.random.default_rng([seed, 0]).choice(len(counts), size=runs, p=counts / counts.sum())
        self._before = [np.concatenate([[0], np.cumsum(self._turn == k)]) for k in range(len(counts))]
        self._each, self._seed, self._orders = batch_size // self.shards, seed, {}

    def __call__(self, step: int, groups: range | None = None) -> tuple[int, np.ndarray]:
        """The length of the views at a step, and their rows int64 [groups, B / data_shards]."""
        run, within = divmod(step, LENGTH_RUN)
        kind = int(self._turn[run])
        earlier = int(self._before[kind][run]) * LENGTH_RUN + within
        wanted = np.arange(earlier * self._each, (earlier + 1) * self._each)
        groups = range(self.shards) if groups is None else groups
        return int(self.lengths[kind]), np.stack([self._take(kind, group, wanted) for group in groups])

    def _take(self, kind: int, group: int, wanted: np.ndarray) -> np.ndarray:
        members = self._members[kind][group]
        epochs, places = np.divmod(wanted, len(members))
        out = np.empty_like(wanted)
        for epoch in np.unique(epochs):  # one or two
            now = epochs == epoch
            out[now] = members[self._order(kind, group, int(epoch))[places[now]]]
        return out

    def _order(self, kind: int, group: int, epoch: int) -> np.ndarray:
        key = (kind, group, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[:2] == key[:2]][:-1]:  # a batch looks at one epoch, or at two
                del self._orders[old]
            # the first group's order is that of an undivided bank
            seed = [self._seed, 1, kind, epoch, *([group] if group else [])]
            self._orders[key] = np.random.default_rng(seed).permutation(len(self._members[kind][group]))
        return self._orders[key]

    def until(self, step: int) -> int:
        """The step at which another length may begin."""
        return (step // LENGTH_RUN + 1) * LENGTH_RUN if len(self.lengths) > 1 else 1 << 62


class Plan(NamedTuple):
    """Where the bank goes, and the arithmetic behind it."""

    placement: str  # "device" or "host"
    reason: str


def plan(bank: Bank, views: Views, training: np.ndarray, groups: np.ndarray, layout: Layout, config: Any) -> Plan:
    """Decide where the bank goes: ``config.bank_placement``, or what memory allows where that is "auto".

    Raises:
        UsageError: an unknown placement.
    """
    needed = max(samples for samples, _ in _needs(bank, views, training, groups, layout)) * 2
    own = int(bank.clips["samples"][np.unique(views.columns["clip"][training])].sum(dtype=np.int64)) * 2
    free = _memory(layout.devices[layout.local[0]])
    limit = config.bank_gib * 2**30 or free * BANK_SHARE
    fits = needed <= limit
    devices = f"{len(layout.devices)} device{'s' * (len(layout.devices) > 1)}"
    arithmetic = (
        f"{own / SAMPLING_RATE / 7200:.3g} hours of training clips are {_bytes(own)} (int16), {_bytes(needed)} on each of "
        f"{devices}, mixing partners included; {_bytes(limit)} may be used" + f" of {_bytes(free)}" * (not config.bank_gib)
    )
    chosen = {"auto": "device" if fits else "host", "device": "device", "host": "host"}.get(config.bank_placement)
    if chosen is None:
        raise UsageError(f"bank_placement is {config.bank_placement!r}; expected auto, device or host")
    return Plan(chosen, f"bank on the {chosen}: {arithmetic}")


def _bytes(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**27 else f"{count / 2**20:.3g} MiB"


def _memory(device: jax.Device) -> float:
    """Bytes that a device's copy of the bank could have at most; devices of a CPU share theirs."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()


def _needs(bank: Bank, views: Views, training: np.ndarray, groups: np.ndarray, layout: Layout) -> Iterator[tuple[int, int]]:
    """For each device, of all processes: samples of the clips that its views need, and how many views it has."""
    lengths = bank.clips["samples"].astype(np.int64)
    for device in range(len(layout.devices)):
        mine = training[groups // layout.per_device == device]
        yield int(lengths[_clips(views, mine)].sum()), len(mine)


def _clips(views: Views, chosen: np.ndarray) -> np.ndarray:
    """The clips that some views are made of, partners included: int [n], ascending."""
    partners = views.columns["partner"][chosen]
    return np.union1d(views.columns["clip"][chosen], partners[partners >= 0])


class DeviceFeed:
    """Each device has its clips, recipes and labels; a step needs nothing from the host but the numbers of its views.

    Attributes:
        data: (bank int16 [rows, ROW], recipes [V], targets float32 [V, D]) of every local device, as numpy arrays with the
            devices as leading axis.
    """

    def __init__(self, bank, views, training, groups, targets, layout: Layout, batches: Batches) -> None:
        self._batches, self._layout = batches, layout
        samples, counts = zip(*_needs(bank, views, training, groups, layout), strict=True)
        height, most = -(-max(samples) // ROW), max(counts)
        self._place = np.full(len(training), -1, np.int32)  # of a view in its device's table
        parts = []
        for device in layout.local:
            mine = np.flatnonzero(groups // layout.per_device == device)
            self._place[mine] = np.arange(len(mine))
            local_bank, starts = rows(bank, _clips(views, training[mine]), height)
            filled = np.resize(mine, most)  # views that fill up a shorter table are never asked for
            parts.append((local_bank, recipes(bank, views, training[filled], starts), targets[filled]))
        self.data = jax.tree.map(lambda *leaves: np.stack(leaves) if len(leaves) > 1 else leaves[0][None], *parts)

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, Array]]:
        """Of each step: the views' length, their rows [local devices, b] and what ``hear`` needs, with the same axes."""
        for step in range(start, stop):
            samples, chosen = self._batches(step, self._layout.local_groups)
            chosen = chosen.reshape(len(self._layout.local), -1)
            yield samples, chosen, self._place[chosen]

    @staticmethod
    def hear(data: tuple[Array, Recipe, Array], chosen: Array, samples: int) -> tuple[Array, Array]:
        """One device's part of a batch: int32 [b] → waveforms float32 [b, samples] and targets [b, D]."""
        bank, table, targets = data
        recipe = jax.tree.map(lambda column: column[chosen], table)
        return render(bank, recipe, samples), targets[chosen]


class HostFeed:
    """For a bank that devices cannot hold: the host reads the pieces of every view ahead of time, devices mix them.

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
        self._read = partial(_read, bank, views, training, targets, layout.local_groups, len(layout.local), batches)

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, tuple]]:
        """As ``DeviceFeed.batches``."""
        grain = self._grain
        threads = min(16, os.cpu_count() or 1)
        steps = grain.MapDataset.range(start, stop).map(self._read)
        # so many batches lie ready; each is as large as what the devices hear in a step
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
    def hear(data: tuple, heard: tuple, samples: int) -> tuple[Array, Array]:
        """One device's part of a batch: the arguments of ``mix`` and targets [b, D] → waveforms [b, samples], targets."""
        *arguments, targets = heard
        return mix(*arguments), targets


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Processes that are started in it do not run the user's script again: they need nothing of it, and without a guard
    (``if __name__ == "__main__"``) it would start a training in each of them."""
    main = sys.modules["__main__"].__dict__
    hidden = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(__spec__=None)
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(hidden)


def _read(bank, views, training, targets, groups, devices, batches, step) -> tuple[int, np.ndarray, tuple]:
    samples, chosen = batches(int(step), groups)
    heard = (*pieces(bank, views, training[chosen.ravel()]), targets[chosen.ravel()])
    return samples, chosen.reshape(devices, -1), tuple(x.reshape(devices, -1, *x.shape[1:]) for x in heard)


def stack(batches: list) -> Any:
    """Trees of numpy arrays [...] → one tree of [steps, ...]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
