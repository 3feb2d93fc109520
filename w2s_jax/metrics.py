"""How well predictions agree with targets: Lin's concordance correlation coefficient, with confidence intervals.

A CCC belongs to a whole set. The mean of the CCCs of its batches is another, lower number, and is computed nowhere here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from w2s_jax.errors import W2SError


class MetricError(W2SError):
    """Prediction and target cannot be compared."""


def ccc(prediction: ArrayLike, target: ArrayLike) -> np.ndarray:
    """Concordance correlation coefficient of each dimension: ``2 cov / (var + var + (mean - mean)**2)``.

    The moments are those of the population (divided by N). Where the formula is 0/0, which is when both sides are
    constant and equal, prediction and target agree and the CCC is 1; a constant side against anything else gives 0.

    Args:
        prediction: [N, D] or [N].
        target: the same shape.

    Returns:
        float64 [D] (D is 1 for [N]), in -1..1.

    Raises:
        MetricError: other shapes, nothing to compare, or values that are not finite.

    Reference:
        Lin (1989), A concordance correlation coefficient to evaluate reproducibility, Biometrics 45(1).

    >>> ccc([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    array([0.57142857])
    """
    prediction, target = _checked(prediction, target)
    return _from_sums(_sums(prediction, target).sum(axis=0))


def bootstrap_ccc(
    prediction: ArrayLike,
    target: ArrayLike,
    groups: ArrayLike | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the CCC of each dimension.

    Rows that are not independent (views of one clip, clips of one speaker) need ``groups``, or the interval comes out
    too narrow: whole groups are drawn with replacement.

    Args:
        prediction: [N, D] or [N].
        target: the same shape.
        groups: [N], a label per row (any type that sorts); None takes each row for itself.
        draws: number of bootstrap sets.
        level: confidence level.
        seed: the same seed gives the same interval.

    Returns:
        low, high: float64 [D] each.

    Raises:
        MetricError: as :func:`ccc`, or ``groups``, ``draws`` or ``level`` do not fit.

    Reference:
        Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 13.
    """
    prediction, target = _checked(prediction, target)
    if draws < 1 or not 0 < level < 1:
        raise MetricError(f"expected draws >= 1 and 0 < level < 1, got draws {draws}, level {level}")
    sums = _sums(prediction, target)  # a draw only adds these up, so its rows are never touched again
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != (len(prediction),):
            raise MetricError(f"expected one group per row, [{len(prediction)}], got {list(groups.shape)}")
        _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
        sums = np.add.reduceat(sums[np.argsort(index, kind="stable")], np.cumsum(counts) - counts)
    units = len(sums)
    flat = sums.reshape(units, -1)
    random = np.random.default_rng(seed)
    values = np.empty((draws, prediction.shape[1]))
    for draw in range(draws):
        counts = np.bincount(random.integers(units, size=units), minlength=units)
        values[draw] = _from_sums((counts @ flat).reshape(sums.shape[1:]))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _checked(prediction: ArrayLike, target: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [N, D]."""
    prediction, target = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    if prediction.shape != target.shape or prediction.ndim not in (1, 2) or not prediction.size:
        raise MetricError(
            "expected prediction and target of one shape, [N, D] or [N] with N and D at least 1, "
            f"got {list(prediction.shape)} and {list(target.shape)}"
        )
    for name, values in (("prediction", prediction), ("target", target)):
        if not np.isfinite(values).all():
            bad = np.argwhere(~np.isfinite(values))
            raise MetricError(f"the {name} has {len(bad)} values that are not finite, the first in row {bad[0, 0]}")
    return prediction.reshape(len(prediction), -1), target.reshape(len(target), -1)


def _sums(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Per row what a CCC is made of: [N, 6, D] = 1, p, t, p², t², pt."""
    # Measured from the middle of the targets, or a difference of large squares would lose the digits that matter; from
    # the median, because that of constants is exact. One centre for both, so that equal values stay equal.
    centre = np.median(target, axis=0)
    p, t = prediction - centre, target - centre
    return np.stack([np.ones_like(p), p, t, p * p, t * t, p * t], axis=1)


def _from_sums(sums: np.ndarray) -> np.ndarray:
    """CCC [D] from the sums [6, D]."""
    p, t, pp, tt, pt = sums[1:] / sums[0]
    var_p, var_t, cov, difference = pp - p * p, tt - t * t, pt - p * t, np.square(p - t)
    # What rounding leaves of a zero would make noise of 0/0.
    var_p, var_t = np.where(var_p <= 1e-12 * pp, 0.0, var_p), np.where(var_t <= 1e-12 * tt, 0.0, var_t)
    cov = np.where((var_p == 0) | (var_t == 0), 0.0, cov)
    difference = np.where(difference <= 1e-24 * (pp + tt), 0.0, difference)
    denominator = var_p + var_t + difference
    return np.where(denominator > 0, 2 * cov / np.where(denominator > 0, denominator, 1.0), 1.0)
