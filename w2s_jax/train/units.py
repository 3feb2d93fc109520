"""Units of labels: standardisation for training, and scale and offset folded into the output layer of a saved student.

CCC does not change when prediction and label are shifted and scaled alike, so a student learns standardised labels, whatever
their unit is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Units(NamedTuple):
    """Offset and scale of each dimension, float64 [D]: ``label = standardised · deviation + mean``."""

    mean: np.ndarray
    deviation: np.ndarray


def measure(labels: np.ndarray) -> Units:
    """Mean and standard deviation of labels [N, D]."""
    labels = labels.astype(np.float64)
    return Units(labels.mean(axis=0), np.maximum(labels.std(axis=0), 1e-6))


def standardise(labels: np.ndarray, units: Units) -> np.ndarray:
    """Labels [N, D] as float32 of mean 0 and deviation 1."""
    return ((labels.astype(np.float64) - units.mean) / units.deviation).astype(np.float32)


def calibrate(raw: np.ndarray, labels: np.ndarray, deviation: np.ndarray) -> Units:
    """Units in which predictions have the mean and the deviation of their labels: ``raw · deviation + mean``.

    A student's predictions for clips that it was not trained on spread less than the labels, which CCC counts as an error.
    With the labels' moments CCC equals the correlation, the most that shifting and scaling can reach.

    Args:
        raw, labels: standardised predictions and labels, [N, D] each, of views that were not trained on.
        deviation: [D], that training used; the result lies between half of it and twice as much.
    """
    scale = labels.std(axis=0) / np.maximum(raw.std(axis=0), 1e-6)
    scale = np.clip(scale, deviation / 2, deviation * 2)
    return Units(labels.mean(axis=0) - scale * raw.mean(axis=0), scale)


def fold_units(params: dict, units: Units) -> dict:
    """Make a student that predicts standardised values predict labels, by its output layer ``adv``."""
    kernel, bias = params["adv"]["kernel"], params["adv"]["bias"]
    scaled = {
        "kernel": (kernel * units.deviation).astype(kernel.dtype),
        "bias": (bias * units.deviation + units.mean).astype(bias.dtype),
    }
    return {**params, "adv": scaled}


def unfold_units(params: dict, units: Units) -> dict:
    """The inverse of ``fold_units``: make a student that predicts labels predict standardised values."""
    return fold_units(params, Units(-units.mean / units.deviation, 1 / units.deviation))
