import numpy as np
import pytest

from w2s_jax.metrics import MetricError, bootstrap_ccc, ccc


def test_by_hand():
    # p = 1 2 3, t = 2 3 4: cov = var = var = 2/3, difference of means 1: (4/3) / (2/3 + 2/3 + 1) = 4/7
    np.testing.assert_allclose(ccc([1, 2, 3], [2, 3, 4]), [4 / 7], rtol=1e-15)
    # p = 0 1 0 1, t = 0 0 1 1: no covariance
    np.testing.assert_allclose(ccc([0, 1, 0, 1], [0, 0, 1, 1]), [0], atol=1e-15)
    # p = -t: cov = -var, means equal
    np.testing.assert_allclose(ccc([1, 0, -1], [-1, 0, 1]), [-1], rtol=1e-15)
    np.testing.assert_array_equal(ccc([0.1, 0.4, 0.9], [0.1, 0.4, 0.9]), [1])
    assert ccc([1], [1]).dtype == np.float64


def independent(p, t):
    """Pearson's r times the bias correction, as Lin writes it; np.corrcoef and np.std share no code with ccc."""
    scale = np.std(p) / np.std(t)
    shift = (np.mean(p) - np.mean(t)) / np.sqrt(np.std(p) * np.std(t))
    return np.corrcoef(p, t)[0, 1] * 2 / (scale + 1 / scale + shift**2)


@pytest.mark.parametrize("offset, scale", [(0, 1), (0.5, 0.01), (1e6, 1), (-3, 1e-8), (0, 1e12)])
def test_against_another_formula(offset, scale):
    random = np.random.default_rng(0)
    t = random.standard_normal((500, 3))
    p = 0.7 * t + 0.3 * random.standard_normal((500, 3)) + [0, 0.5, -2]
    p, t = offset + scale * p, offset + scale * t
    np.testing.assert_allclose(ccc(p, t), [independent(p[:, d], t[:, d]) for d in range(3)], rtol=1e-7)
    np.testing.assert_array_equal(ccc(p, t)[1:2], ccc(p[:, 1], t[:, 1]))


@pytest.mark.filterwarnings("error")
def test_constants():
    ramp = np.linspace(0, 1, 10)
    np.testing.assert_array_equal(ccc([0.1] * 10, [0.1] * 10), [1])
    np.testing.assert_array_equal(ccc([0.1] * 10, [0.3] * 10), [0])
    np.testing.assert_array_equal(ccc([0.1] * 10, ramp), [0])
    np.testing.assert_array_equal(ccc(ramp, [0.1] * 10), [0])
    np.testing.assert_array_equal(ccc([0.7], [0.7]), [1])
    np.testing.assert_array_equal(ccc([0.7], [0.2]), [0])


def test_it_belongs_to_the_set_and_not_to_its_batches():
    t = np.arange(100.0)
    p = t + np.random.default_rng(0).standard_normal(100)
    batches = np.mean([ccc(p[i : i + 5], t[i : i + 5]) for i in range(0, 100, 5)])
    assert ccc(p, t)[0] > 0.99 > batches + 0.1


@pytest.mark.parametrize(
    "p, t, message",
    [
        (np.zeros((5, 3)), np.zeros((5, 2)), r"got \[5, 3\] and \[5, 2\]"),
        (np.zeros(5), np.zeros((5, 1)), "one shape"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "at least 1"),
        (0.0, 0.0, "one shape"),
        ([0, np.nan, 1, np.nan], [0, 1, 2, 3], "prediction has 2 values that are not finite, the first in row 1"),
        ([0, 1], [0, np.inf], "target has 1 value"),
    ],
)
def test_what_cannot_be_compared(p, t, message):
    for function in (ccc, bootstrap_ccc):
        with pytest.raises(MetricError, match=message):
            function(p, t)


def test_bootstrap_arguments():
    for options in ({"draws": 0}, {"level": 1}, {"level": 95}, {"groups": [1, 2]}, {"groups": np.zeros((3, 1))}):
        with pytest.raises(MetricError):
            bootstrap_ccc([1, 2, 3], [1, 2, 4], **options)


def test_bootstrap_repeats_and_widens_with_the_level():
    random = np.random.default_rng(1)
    t = random.standard_normal((200, 2))
    p = t + random.standard_normal((200, 2))
    low, high = bootstrap_ccc(p, t, seed=3)
    np.testing.assert_array_equal((low, high), bootstrap_ccc(p, t, seed=3))
    assert not np.array_equal(low, bootstrap_ccc(p, t, seed=4)[0])
    wide_low, wide_high = bootstrap_ccc(p, t, level=0.99, seed=3)
    assert np.all(wide_low < low) and np.all(low < ccc(p, t)) and np.all(ccc(p, t) < high) and np.all(high < wide_high)


def test_bootstrap_against_plain_resampling():
    random = np.random.default_rng(2)
    t = random.standard_normal(300)
    p = 0.8 * t + 0.5 * random.standard_normal(300)
    plain = []
    for _ in range(2000):
        rows = random.integers(300, size=300)
        plain.append(independent(p[rows], t[rows]))
    low, high = bootstrap_ccc(p, t, draws=2000)
    np.testing.assert_allclose([low[0], high[0]], np.quantile(plain, [0.025, 0.975]), atol=0.008)


def test_bootstrap_covers():
    # Bivariate normal, equal moments: the true CCC is the correlation, 0.6. 200 samples of 80: the percentile bootstrap
    # should hold it in about 95 % (standard error of the share 1.5 %, and it covers a little less in small samples).
    random = np.random.default_rng(3)
    hits = 0
    for sample in range(200):
        t = random.standard_normal(80)
        p = 0.6 * t + 0.8 * random.standard_normal(80)
        low, high = bootstrap_ccc(p, t, draws=300, seed=sample)
        hits += low[0] <= 0.6 <= high[0]
    assert 0.88 <= hits / 200 <= 0.99


def test_groups_of_repeated_rows_count_once():
    random = np.random.default_rng(4)
    t = random.standard_normal(100)
    p = t + random.standard_normal(100)
    names = np.array([f"clip {i}" for i in range(100)])
    order = random.permutation(1000)
    p10, t10, groups = np.repeat(p, 10)[order], np.repeat(t, 10)[order], np.repeat(names, 10)[order]
    low, high = bootstrap_ccc(p, t, draws=2000)
    low_rows, high_rows = bootstrap_ccc(p10, t10, draws=2000)
    low_groups, high_groups = bootstrap_ccc(p10, t10, groups, draws=2000)
    np.testing.assert_allclose(high_groups - low_groups, high - low, rtol=0.1)
    assert high_rows - low_rows < 0.5 * (high - low)  # as if there were ten times the data


@pytest.mark.filterwarnings("error")
def test_bootstrap_of_constants_is_finite():
    t = np.repeat([0.1, 0.7], 3)
    low, high = bootstrap_ccc(t, t)  # some draws hold one value only; the last digit is the BLAS library's
    np.testing.assert_allclose([low, high], [[1.0], [1.0]], rtol=1e-12)
    low, high = bootstrap_ccc(np.full(6, 0.3), t)
    np.testing.assert_array_equal([low, high], [[0.0], [0.0]])
