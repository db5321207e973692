import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cmsad_jax import kernels
from cmsad_jax.types import ConfigError
from tests import oracles

NORMALIZATIONS = (("l2", 1.0), ("softmax", 3.0))
SETTINGS = [
    {"kind": kind, "exponent": exponent, "normalization": normalization, "temperature": temperature}
    for kind, exponent, (normalization, temperature) in itertools.product(
        ("mean", "sum", "max"), (1.0, 2.0, 2.5), NORMALIZATIONS
    )
]


@jax.jit
def every_map(x):
    """The maps of all settings, in order."""
    return [kernels.attention_map(x, **settings) for settings in SETTINGS]


def features(space=(3, 4, 5), dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, *space, 6)), dtype)


def oracle(x, *, kind, exponent, normalization, temperature):
    energy = oracles.attention_energy(x, kind, exponent)
    return oracles.normalize_map(energy, normalization, temperature)


def test_two_voxels_by_hand():
    x = jnp.array([[[[1.0, -1.0], [-2.0, 0.0]]]])  # b=1, h=1, w=2, c=2
    for kind, energy in (("mean", [1, 2]), ("sum", [2, 4]), ("max", [1, 4])):
        np.testing.assert_allclose(kernels.attention_energy(x, kind=kind)[0, 0], energy)
    np.testing.assert_allclose(
        kernels.attention_map(x)[0, 0], np.array([1, 2]) / np.sqrt(5), rtol=1e-6
    )
    np.testing.assert_allclose(
        kernels.attention_map(x, normalization="softmax", temperature=0.5)[0, 0],
        np.exp([2, 4]) / np.exp([2, 4]).sum(),
        rtol=1e-6,
    )


@pytest.mark.parametrize("space", [(3, 4, 5), (4, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_oracle(space, dtype):
    x = features(space, dtype)
    for settings, found in zip(SETTINGS, every_map(x), strict=True):
        # Features may be rounded, but nothing after them is: the maps of bfloat16 are as exact.
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(
            found, oracle(x, **settings), rtol=1e-5, atol=1e-7, err_msg=str(settings)
        )


def test_equals_the_published_attention_transfer(shared_data):
    published = np.load(shared_data / "oracles/attention_transfer.npz")
    for name in "AB":
        x = jnp.asarray(published[name].transpose(0, 2, 3, 1))
        found = kernels.attention_map(x).reshape(2, -1)
        np.testing.assert_allclose(found, published[f"at_{name}"], rtol=1e-5)


def test_one_example_knows_nothing_of_the_others():
    x = features()
    maps = every_map(x)
    for found, flipped, alone in zip(maps, every_map(x[::-1]), every_map(x[1:2]), strict=True):
        np.testing.assert_allclose(flipped, found[::-1], rtol=1e-6)
        np.testing.assert_allclose(alone[0], found[1], rtol=1e-6)


def test_dead_features():
    def weighted(x, settings):
        maps = kernels.attention_map(x, **settings)
        return (maps * jnp.cos(jnp.arange(maps.size)).reshape(maps.shape)).sum(), maps

    @jax.jit
    def values_and_gradients(x):
        return [
            jax.value_and_grad(functools.partial(weighted, settings=settings), has_aux=True)(x)
            for settings in SETTINGS
        ]

    for size in (0.0, 1e-20):
        results = values_and_gradients(features().at[1].set(size))
        for settings, ((_, maps), gradient) in zip(SETTINGS, results, strict=True):
            assert np.all(np.isfinite(maps)), settings
            assert np.all(np.isfinite(gradient)), settings
            assert np.any(np.asarray(gradient[0]) != 0), settings
            if settings["normalization"] == "l2":
                np.testing.assert_array_equal(maps[1], 0)
                np.testing.assert_array_equal(gradient[1], 0)
            else:
                np.testing.assert_allclose(maps[1], 1 / maps[1].size, rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-20])
def test_normalization_of_a_vanishing_energy(size):
    # Energies below the root of the threshold, whatever features they came from.
    energy = jnp.full((1, 2, 3), size)
    maps, pull_back = jax.vjp(kernels.normalize_map, energy)
    np.testing.assert_array_equal(maps, 0)
    np.testing.assert_array_equal(pull_back(jnp.ones_like(maps))[0], 0)


def test_the_threshold_is_a_squared_norm_of_1e_12():
    energy = jnp.array([[0.9e-6, 0.0], [1.1e-6, 0.0]])
    np.testing.assert_allclose(kernels.normalize_map(energy), [[0, 0], [1, 0]], rtol=1e-6)


def test_gradient_equals_finite_differences():
    x = 0.5 + jnp.abs(features((2, 2)))
    check_grads(every_map, (x,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-3)


def test_resize_by_hand():
    q = jnp.array([[0.0, 4.0]])
    # Half-pixel centres: new centres lie at -1/4, 1/4, 3/4, 5/4 of the old grid.
    np.testing.assert_allclose(kernels.resize_map(q, (4,)), [[0, 1, 3, 4]])
    assert kernels.resize_map(q, (2,)) is q
    # Antialiased: shrinking fourfold takes in all neighbours, not only the two nearest.
    spike = jnp.zeros((1, 8)).at[0, 3].set(1.0)
    assert kernels.resize_map(spike, (2,))[0, 0] > 0
    np.testing.assert_allclose(kernels.resize_map(jnp.ones((2, 4, 6)), (3, 5)), 1, rtol=1e-6)


def test_bad_arguments():
    x = features((2, 2))
    with pytest.raises(ConfigError, match=r"must be one of mean, sum, max; got 'min'. Use 'mean'"):
        kernels.attention_energy(x, kind="min")
    with pytest.raises(ConfigError, match=r"exponent must be at least 1; got 0.5. Use 2"):
        kernels.attention_map(x, exponent=0.5)
    with pytest.raises(ConfigError, match=r"must be one of l2, softmax; got 'l1'. Use 'l2'"):
        kernels.attention_map(x, normalization="l1")
    with pytest.raises(ConfigError, match=r"temperature must be above 0; got 0.0. Use 1"):
        kernels.normalize_map(x[..., 0], normalization="softmax", temperature=0.0)
