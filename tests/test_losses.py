"""The loss against numpy's own moments, and where a CCC is 0/0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_jax.losses import ccc, distillation_loss


def test_ccc_is_lins():
    # Lin 1989 by numpy's own moments
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3)).astype(np.float32)
    y = (0.5 * x + rng.standard_normal((200, 3)) + [0, 1, 5]).astype(np.float32)
    for d in range(3):
        c = np.cov(x[:, d], y[:, d], bias=True)
        expected = 2 * c[0, 1] / (c[0, 0] + c[1, 1] + (x[:, d].mean() - y[:, d].mean()) ** 2)
        np.testing.assert_allclose(ccc(x, y)[d], expected, rtol=1e-5)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_the_loss_is_one_minus_the_mean_ccc_plus_the_squared_error(l2):
    # by numpy; whoever changes the loss increases train.run.NUMERICS
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 50, 3))
    covariance = ((x - x.mean(0)) * (y - y.mean(0))).mean(0)
    lins = 2 * covariance / (x.var(0) + y.var(0) + (x.mean(0) - y.mean(0)) ** 2)
    loss, scores = distillation_loss(x.astype(np.float32), y.astype(np.float32), l2=l2)
    np.testing.assert_allclose(scores, lins, rtol=1e-4)
    np.testing.assert_allclose(loss, 1 - lins.mean() + l2 * ((x - y) ** 2).mean(), rtol=1e-5)


@given(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32), st.booleans())
@settings(max_examples=50, deadline=None)
def test_loss_and_gradient_are_finite_without_spread(p, t, same):
    prediction, target = jnp.full((4, 2), p), jnp.full((4, 2), p if same else t)
    (loss, _), gradient = jax.value_and_grad(distillation_loss, has_aux=True)(prediction, target, l2=0.1)
    assert jnp.isfinite(loss)
    assert jnp.isfinite(gradient).all()


def test_loss_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        ccc(jnp.zeros((4, 1)), jnp.zeros((4, 3)))
