import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax import kernels
from cmsad_jax.types import ConfigError
from tests import oracles

correlation = jax.jit(kernels.correlation, static_argnames="implementation")


def arguments(space=(2, 3, 4), num_modalities=3, channels=5, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shape = (2, num_modalities, num_modalities, channels)
    g = tuple(
        jnp.asarray(rng.normal(size=(2, *space, channels)), dtype) for _ in range(num_modalities)
    )
    return g, *(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))


def oracle_total(g, alpha, beta, gamma, weights):
    return (oracles.correlation(g, alpha, beta, gamma) * weights).sum()


def test_one_voxel_by_hand():
    g = (jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[[3.0, 4.0]]]]))
    ones, zeros = jnp.ones((1, 2, 2, 2)), jnp.zeros((1, 2, 2, 2))
    r = correlation(g, zeros, ones, zeros)[0, 0, 0]  # the other one as it is
    np.testing.assert_allclose(r, [[0, 0.6], [0.6, 0]], rtol=1e-6)
    r = correlation(g, ones, zeros, zeros)[0, 0, 0]  # squared: (9, 16) and (1, 0)
    np.testing.assert_allclose(r, [[0, 9 / np.hypot(9, 16)], [0.6, 0]], rtol=1e-6)
    r = correlation(g, zeros, zeros, -ones)[0, 0, 0]  # a constant (-1, -1)
    np.testing.assert_allclose(r, [[0, -1 / np.sqrt(2)], [-7 / np.sqrt(50), 0]], rtol=1e-6)


@pytest.mark.parametrize("space", [(2, 3, 4), (3, 4)])
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_equals_the_oracle(space, num_modalities):
    g, alpha, beta, gamma = arguments(space, num_modalities)
    r = correlation(g, alpha, beta, gamma)
    np.testing.assert_allclose(r, oracles.correlation(g, alpha, beta, gamma), atol=1e-6)
    assert np.abs(r).max() <= 1 + 1e-6


def test_gradient_equals_that_of_the_oracle():
    g, *coefficients = arguments((1, 2), 2, 3)
    values = [np.asarray(x, np.float64) for x in (jnp.stack(g), *coefficients)]
    weights = np.cos(np.arange(2 * 1 * 2 * 4)).reshape(2, 1, 2, 2, 2)

    gradients = jax.jit(
        jax.grad(
            lambda g, *coefficients: (correlation(tuple(g), *coefficients) * weights).sum(),
            argnums=(0, 1, 2, 3),
        )
    )(jnp.stack(g), *coefficients)
    step = 1e-5
    for which, gradient in enumerate(gradients):
        expected = np.zeros(gradient.shape)
        for index in np.ndindex(*gradient.shape):
            sides = []
            for sign in (1, -1):
                moved = [x.copy() for x in values]
                moved[which][index] += sign * step
                sides.append(oracle_total(*moved, weights))
            expected[index] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(gradient, expected, atol=1e-4)


def test_bfloat16_features_give_float32():
    g, *coefficients = arguments(dtype=jnp.bfloat16)
    r = correlation(g, *coefficients)
    assert r.dtype == jnp.float32
    expected = oracles.correlation([x.astype(jnp.float32) for x in g], *coefficients)
    np.testing.assert_allclose(r, expected, atol=1e-6)


def test_permuted_modalities_permute_the_result():
    g, *coefficients = arguments()
    order = np.array([2, 0, 1])
    permuted = correlation(
        tuple(g[m] for m in order), *(x[:, order][:, :, order] for x in coefficients)
    )
    expected = correlation(g, *coefficients)[..., order, :][..., order]
    np.testing.assert_allclose(permuted, expected, atol=1e-6)


def test_permuted_batch_permutes_the_result():
    g, *coefficients = arguments()
    flipped = correlation(tuple(x[::-1] for x in g), *(x[::-1] for x in coefficients))
    np.testing.assert_allclose(flipped, correlation(g, *coefficients)[::-1], atol=1e-6)


@jax.jit
def value_and_gradients(*arguments):
    def total(*arguments):
        r = correlation(*arguments)
        return (r * jnp.cos(jnp.arange(r.size)).reshape(r.shape)).sum(), r

    (_, r), gradients = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)
    return r, gradients


@pytest.mark.parametrize("size", [0.0, 1e-20])
@pytest.mark.parametrize("with_constant", [False, True])
def test_a_dead_modality(size, with_constant):
    g, alpha, beta, gamma = arguments()
    g = (g[0], jnp.full(g[1].shape, size), g[2])
    r, gradients = value_and_gradients(g, alpha, beta, gamma * with_constant)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((r, gradients)))
    np.testing.assert_array_equal(r[..., 1, :], 0)
    if not with_constant:  # nothing is left of its expression either
        np.testing.assert_array_equal(r[..., :, 1], 0)
        np.testing.assert_array_equal(gradients[0][1], 0)
    assert np.all(np.asarray(r)[..., 0, 2] != 0)


def test_bad_arguments():
    g, alpha, beta, gamma = arguments()
    with pytest.raises(ConfigError, match=r"one shape; got .*Project all modalities"):
        correlation((g[0], g[1][:, :1], g[2]), alpha, beta, gamma)
    wrong = (x[:, :2, :2] for x in (alpha, beta, gamma))
    with pytest.raises(ConfigError, match=r"alpha must hold .* \(2, 2, 2, 5\). Use shape \(2, 3"):
        correlation(g, *wrong)
    with pytest.raises(NotImplementedError, match=r"reference, xla here; got 'cuda'"):
        correlation(g, alpha, beta, gamma, implementation="cuda")
