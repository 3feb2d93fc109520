"""Recipes to waveforms: one pure function for teacher and student, on the host or inside a jitted training step."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from w2s_jax import audio
from w2s_jax.bank import Bank
from w2s_jax.devices import computing
from w2s_jax.views import Views

#: Samples in a row of the device's copy of a bank. A sample is addressed by (row, column), both int32, because JAX has no
#: int64 by default and a bank may pass 2³¹ samples.
ROW = 1 << 16  # see locate


class Recipe(NamedTuple):
    """How B views are rendered, as arrays [B]; integers are int32, the rest float32.

    ``row`` and ``column`` say where the clip begins in a bank of rows, ``length`` how many samples it has, ``offset`` where
    in it the view begins; ``partner_…`` the same of what is mixed in. ``gain`` and ``partner_level`` are amplitudes:
    ``gain`` is what the bank's samples are multiplied by, ``partner_level`` the partner's level relative to the view's own
    (10^(-SNR/20)), 0 where there is none.
    """

    row: Array
    column: Array
    length: Array
    offset: Array
    partner_row: Array
    partner_column: Array
    partner_length: Array
    partner_offset: Array
    gain: Array
    partner_level: Array


def make_recipe(bank: Bank, views: Views, rows: np.ndarray, starts: np.ndarray | None = None) -> Recipe:
    """The recipe of some rows of a table of views, as numpy arrays [len(rows)].

    ``starts`` (int64 [clips]) says where clips begin in a part of the bank, as ``pack_clips`` gives it; default: in the whole
    bank.
    """
    starts = bank.starts if starts is None else starts
    columns = {name: column[rows] for name, column in views.columns.items()}
    clip, partner = columns["clip"], np.where(columns["partner"] < 0, columns["clip"], columns["partner"])
    row, column = (array.astype(np.int32) for array in np.divmod(starts[clip], ROW))
    partner_row, partner_column = (array.astype(np.int32) for array in np.divmod(starts[partner], ROW))
    gain, partner_level = compute_amplitudes(bank, views, rows)
    return Recipe(
        row=row,
        column=column,
        length=bank.clips["samples"][clip],
        offset=columns["offset"],
        partner_row=partner_row,
        partner_column=partner_column,
        partner_length=bank.clips["samples"][partner],
        partner_offset=columns["partner_offset"],
        gain=gain,
        partner_level=partner_level,
    )


def compute_amplitudes(bank: Bank, views: Views, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert decibels to amplitudes: ``gain`` and ``partner_level`` of some views, float32 [len(rows)] each.

    The gain also undoes the scale at which the clip is stored. The partner's stored scale does not matter: its level in the
    mixture is relative to the view's.
    """
    gain = 10.0 ** (views.columns["gain_db"][rows] / 20.0) / bank.scales[views.columns["clip"][rows]]
    level = 10.0 ** (-views.columns["snr_db"][rows] / 20.0)
    return gain.astype(np.float32), np.where(views.columns["partner"][rows] < 0, 0.0, level).astype(np.float32)


def pack_clips(bank: Bank, clips: np.ndarray | None = None, height: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pack clips back to back into an array of rows for a device, the end filled with zeros.

    Args:
        bank: the clips.
        clips: which of them, int [n]; default: all.
        height: rows of the result, if the clips need fewer.

    Returns:
        int16 [⌈samples / ROW⌉ or height, ROW], and where each clip of the bank begins in it, int64 [clips]; -1: not packed.
    """
    clips = np.arange(len(bank)) if clips is None else clips
    lengths = bank.clips["samples"][clips].astype(np.int64)
    ends = np.cumsum(lengths)
    starts = np.full(len(bank), -1, np.int64)
    starts[clips] = ends - lengths
    out = np.zeros((max(height, -(-int(ends[-1]) // ROW)), ROW), np.int16)
    flat = out.reshape(-1)
    for clip, end, length in zip(clips, ends, lengths, strict=True):
        flat[end - length : end] = bank.clip(clip)
    return out, starts


def locate(row: Array, column: Array, step: Array) -> tuple[Array, Array]:
    """The (row, column) of the sample that lies ``step`` samples after (row, column); all int32."""
    column = column + step
    return row + (column >> 16), column & (ROW - 1)  # a division of a whole batch's indices would cost more than reading it


def gather(bank: Array, row: Array, column: Array, length: Array, offset: Array, samples: int) -> Array:
    """Read excerpts of clips on the device: int16 [rows, ROW] and four int32 [B] → int16 [B, samples].

    An excerpt that runs past its clip's end continues at its beginning, as in ``Bank.gather``.
    """
    row, column, length, offset = (x[:, None] for x in (row, column, length, offset))
    step = offset + jnp.arange(samples, dtype=jnp.int32)

    def read(step: Array) -> Array:
        return bank[locate(row, column, step)]

    if jax.default_backend() != "cpu":
        return read(step % length)
    # on a CPU the divisions take as long as reading, and only very short clips wrap more than once. The conditional also makes
    # XLA store what a branch has read, instead of reading it a second time for the mixture
    once = jnp.all(offset + samples <= 2 * length)
    return lax.cond(once, lambda: read(jnp.where(step < length, step, step - length)), lambda: read(step % length))


def mix(own: Array, partner: Array, gain: Array, partner_level: Array) -> Array:
    """Mix two int16 [B, T] to float32 [B, T], ±1 at gain 1: the partner gets ``partner_level`` times the RMS of ``own``.

    A silent partner adds nothing.
    """
    own, partner = own.astype(jnp.float32) / audio.FULL_SCALE, partner.astype(jnp.float32) / audio.FULL_SCALE
    own_power, partner_power = jnp.mean(own * own, axis=1), jnp.mean(partner * partner, axis=1)
    factor = jnp.where(partner_power > 0, partner_level * jnp.sqrt(own_power / jnp.maximum(partner_power, 1e-12)), 0.0)
    return gain[:, None] * (own + factor[:, None] * partner)


def render(bank: Array, recipe: Recipe, samples: int) -> Array:
    """Render views: a bank of rows (int16 [rows, ROW]) and a recipe of B views → waveforms float32 [B, samples]."""
    own = gather(bank, recipe.row, recipe.column, recipe.length, recipe.offset, samples)
    partner = gather(bank, recipe.partner_row, recipe.partner_column, recipe.partner_length, recipe.partner_offset, samples)
    return mix(own, partner, recipe.gain, recipe.partner_level)


class Sources(NamedTuple):
    """What ``mix`` makes B views of one length of: two int16 [B, T], and two float32 [B] as in ``Recipe``."""

    own: Array
    partner: Array
    gain: Array
    partner_level: Array


def read_sources(bank: Bank, views: Views, rows: np.ndarray) -> Sources:
    """Read what views of one length are mixed of from the memory-mapped bank, whatever its size."""
    columns = {name: column[rows] for name, column in views.columns.items()}
    samples = int(columns["samples"][0])
    own = bank.gather(columns["clip"], columns["offset"], samples)
    partner = np.zeros_like(own)
    mixed = columns["partner"] >= 0
    if mixed.any():
        partner[mixed] = bank.gather(columns["partner"][mixed], columns["partner_offset"][mixed], samples)
    gain, partner_level = compute_amplitudes(bank, views, rows)
    return Sources(own, partner, gain, partner_level)


@jax.jit
def _mix_sources(sources: Sources) -> Array:
    return mix(**sources._asdict())


@computing()
def render_on_host(bank: Bank, views: Views, rows: np.ndarray) -> np.ndarray:
    """Render views of one length, float32 [len(rows), T], without a copy of the bank on the device.

    Runs on the host's CPU, so that it never waits for a busy accelerator.
    """
    with jax.default_device(_host()):
        return np.asarray(_mix_sources(read_sources(bank, views, rows)))


@functools.cache
def _host() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators only
        return None
