"""The correlation in one pass against plain jnp: values, gradients, transformations."""

import functools
import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from benchmarks.timing import with_vjp
from cmsad_jax import kernels
from tests.kernels.test_correlation import arguments

module = importlib.import_module("cmsad_jax.kernels.correlation")

SPACES = {"volume": (4, 8, 8), "odd volume": (3, 5, 7), "slice": (16, 16), "odd slice": (9, 13)}
CASES = [
    ("volume", "float32"),
    ("odd volume", "bfloat16"),
    ("slice", "bfloat16"),
    ("odd slice", "float32"),
]


@functools.cache
def run(implementation):
    return jax.jit(with_vjp(partial(kernels.correlation, implementation=implementation)))


def cotangent_for(g):
    shape = (*g[0].shape[:-1], len(g), len(g))
    return jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


def assert_agree(found, expected, tolerance):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(got, want, atol=tolerance * max(np.abs(want).max(), 1e-30))


def set_block(monkeypatch, voxels):
    """Blocks of so many voxels; what was traced with others is forgotten."""
    monkeypatch.setattr(module, "CPU_BLOCK", voxels)
    module._over_blocks.clear_cache()
    run.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that the sizes here do not divide, so that the last one overlaps."""
    set_block(monkeypatch, 100)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_value_and_gradients_are_those_of_the_reference(name, dtype):
    g, *coefficients = arguments(SPACES[name], 2, dtype=dtype)
    given = g, *coefficients, cotangent_for(g)
    # Sums of 5 channels and of some 100 voxels; the gradients are rounded to the features' type.
    tolerance = 2e-5 if dtype == "float32" else 2**-8
    assert_agree(run("xla")(*given), run("reference")(*given), tolerance)


@pytest.mark.parametrize("num_modalities", [1, 3])
def test_any_number_of_modalities(num_modalities):
    g, *coefficients = arguments((2, 3, 4), num_modalities)
    given = g, *coefficients, cotangent_for(g)
    assert_agree(run("xla")(*given), run("reference")(*given), 2e-5)


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_more_blocks_than_voxels_in_a_block(monkeypatch, limit):
    set_block(monkeypatch, 2 * limit)
    blocks = []
    loop = module._loop
    monkeypatch.setattr(module, "_loop", lambda b, n, *x: (blocks.append(n), loop(b, n, *x))[1])
    g, *coefficients = arguments((2, 5, 6), 2, 3)
    given = g, *coefficients, cotangent_for(g)
    assert_agree(run("xla")(*given), run("reference")(*given), 1e-4)
    assert set(blocks) == {limit, None}, "each example has half of a block; accelerators have one"


def test_types_do_not_follow_the_default_of_jax():
    with jax.enable_x64(True):
        for implementation in ("reference", "xla"):
            g, *coefficients = arguments((8, 16), 2, 3)
            r, gradients = jax.jit(
                with_vjp(partial(kernels.correlation, implementation=implementation))
            )(g, *coefficients, cotangent_for(g))
            assert {x.dtype for x in jax.tree.leaves((r, gradients))} == {jnp.dtype("float32")}


def test_gradients_against_differences():
    g, *coefficients = arguments((8, 16), 2, 3)
    function = partial(kernels.correlation, implementation="xla")
    check_grads(jax.jit(function), (g, *coefficients), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_vmap_is_a_stack_of_calls():
    g, *coefficients = arguments((8, 16), 2, 3)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x + 0.1]), (g, *coefficients))
    function = partial(kernels.correlation, implementation="xla")
    together = jax.jit(jax.vmap(function))(*stacked)
    for i in range(2):
        one = jax.jit(function)(*jax.tree.map(lambda x, i=i: x[i], stacked))
        np.testing.assert_allclose(together[i], one, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_counts_as_zero(implementation):
    g, *coefficients = arguments((8, 16), 2, 3)
    g = (g[0], jnp.zeros_like(g[1]).at[1].set(1e-20))
    coefficients = [x.at[:, :, 1].set(0) for x in coefficients]
    r, (of_g, *of_coefficients) = run(implementation)(g, *coefficients, cotangent_for(g))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((r, of_g, of_coefficients)))
    np.testing.assert_array_equal(r[..., 1, :], 0)
    np.testing.assert_array_equal(r[..., :, 1], 0)
    np.testing.assert_array_equal(of_g[1], 0)


def test_temporaries_are_at_most_four_maps_for_each_feature():
    g, *coefficients = arguments((8, 64, 64), 3, 16)
    compiled = run("xla").lower(g, *coefficients, cotangent_for(g)).compile()
    one_map = 4 * np.prod(g[0].shape[:-1])
    # The result alone is 9 maps; a feature here is 16.
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * 3 * one_map
