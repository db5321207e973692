import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax import kernels
from cmsad_jax.types import ConfigError
from tests import oracles


def arguments(space, kernel, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (2, *space, 3), (*kernel, 3, 4)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def test_one_voxel_by_hand():
    x = jnp.zeros((1, 3, 3, 3, 1)).at[0, 1, 1, 1, 0].set(2.0)
    kernel = jnp.arange(27.0).reshape(3, 3, 3, 1, 1)
    for implementation in ("native", "folded", None):
        y = kernels.convolution(x, kernel, strides=(1, 1, 1), implementation=implementation)
        # The response to a single voxel is the kernel, mirrored.
        np.testing.assert_array_equal(y.reshape(-1), 2 * np.arange(27.0)[::-1])


@pytest.mark.parametrize("implementation", ["native", "folded"])
@pytest.mark.parametrize(
    ("kernel", "strides"), [((3, 3, 3), (2, 1, 2)), ((1, 3, 3), (1, 2, 2)), ((3, 1, 5), (1, 2, 3))]
)
def test_volumes_equal_the_oracle(implementation, kernel, strides):
    x, weights = arguments((4, 5, 6), kernel)
    y = kernels.convolution(x, weights, strides=strides, implementation=implementation)
    np.testing.assert_allclose(y, oracles.convolution(x, weights, strides), rtol=1e-5, atol=1e-5)


def test_slices_equal_the_oracle():
    x, weights = arguments((5, 6), (3, 3))
    y = kernels.convolution(x, weights, strides=(2, 1))
    np.testing.assert_allclose(y, oracles.convolution(x, weights, (2, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize(
    ("kernel", "space"),
    [
        ((1, 1, 1), (4, 5, 6)),
        ((1, 3, 3), (4, 5, 6)),
        ((3, 3, 3), (5, 6, 7)),
        ((3, 3, 3), (1, 4, 1)),
    ],
)
def test_folded_equals_native_in_value_and_gradient(kernel, strides, space):
    x, weights = arguments(space, kernel)

    @jax.jit
    def value_and_gradients(implementation_values):
        x, weights = implementation_values

        def one(implementation):
            y, pull_back = jax.vjp(
                lambda x, k: kernels.convolution(
                    x, k, strides=strides, implementation=implementation
                ),
                x,
                weights,
            )
            return y, pull_back(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

        return [one(name) for name in ("native", "folded", None)]

    native, folded, default = value_and_gradients((x, weights))
    for other in (folded, default):
        for expected, found in zip(jax.tree.leaves(native), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["native", "folded", None])
def test_computes_in_the_type_of_its_arguments(implementation):
    x, weights = arguments((4, 5, 6), (3, 3, 3), jnp.bfloat16)
    y = kernels.convolution(x, weights, strides=(1, 1, 1), implementation=implementation)
    assert y.dtype == jnp.bfloat16
    expected = oracles.convolution(x, weights, (1, 1, 1))
    # One rounding to 8 bits at the end: the sum itself is float32.
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2**-7, atol=0.1)


def test_works_under_vmap():
    x, weights = arguments((4, 5, 6), (3, 3, 3))
    mapped = jax.vmap(lambda x: kernels.convolution(x[None], weights, strides=(1, 2, 2))[0])(x)
    np.testing.assert_allclose(
        mapped, kernels.convolution(x, weights, strides=(1, 2, 2)), rtol=1e-5, atol=1e-5
    )


def test_each_platform_gets_its_own_formulation():
    x, weights = arguments((4, 5, 6), (3, 3, 3))
    traced = jax.jit(lambda x, k: kernels.convolution(x, k, strides=(1, 1, 1))).trace(x, weights)

    def convolved(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        (line,) = [line for line in text.splitlines() if "stablehlo.convolution(" in line]
        return line

    assert "tensor<8x5x6x9xf32>" in convolved("cpu")  # 2 x 4 slices, 3 taps x 3 channels
    assert "tensor<2x4x5x6x3xf32>" in convolved("cuda")


def test_bad_arguments():
    x, weights = arguments((4, 5, 6), (3, 3, 3))
    with pytest.raises(ConfigError, match=r"one entry for each of 2 or 3 axes.*strides \(1, 1\)"):
        kernels.convolution(x, weights, strides=(1, 1))
    with pytest.raises(ConfigError, match=r"must be odd; got \(3, 2, 3\). Use 1, 3 or 5"):
        kernels.convolution(x, weights[:, :2], strides=(1, 1, 1))
    with pytest.raises(ConfigError, match=r"same channels and type; got x .* kernel .* bfloat16"):
        kernels.convolution(x, weights.astype(jnp.bfloat16), strides=(1, 1, 1))
    with pytest.raises(NotImplementedError, match=r"one of native, folded here; got 'fast'"):
        kernels.convolution(x, weights, strides=(1, 1, 1), implementation="fast")
    with pytest.raises(NotImplementedError, match=r"one of native here; got 'folded'"):
        kernels.convolution(x[0], weights[0], strides=(1, 1), implementation="folded")
