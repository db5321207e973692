import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax.kernels import depthwise_convolution
from cmsad_jax.modules.blocks import SeparableBlock
from cmsad_jax.types import ConfigError
from tests import oracles
from tests.networks import random_params


@pytest.mark.parametrize(
    ("space", "sizes", "strides"),
    [((5, 7), (3, 3), (1, 1)), ((5, 8), (3, 5), (2, 2)), ((4, 5, 6), (1, 3, 3), (1, 2, 2))],
)
def test_depthwise_is_a_convolution_whose_kernel_is_diagonal(space, sizes, strides):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *space, 3)).astype(np.float32)
    kernel = rng.normal(size=(*sizes, 3)).astype(np.float32)

    def depthwise(x, kernel):
        return depthwise_convolution(x, kernel, strides=strides)

    expected = oracles.convolution(x, kernel[..., None] * np.eye(3), strides)
    np.testing.assert_allclose(jax.jit(depthwise)(x, kernel), expected, rtol=1e-4, atol=1e-5)
    # linear in either: the gradient of a sum of squares is twice the product with the result
    value, gradients = jax.jit(
        jax.value_and_grad(lambda x, k: (depthwise(x, k) ** 2).sum(), (0, 1))
    )(x, kernel)
    for gradient, argument in zip(gradients, (x, kernel), strict=True):
        np.testing.assert_allclose((gradient * argument).sum(), 2 * value, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "strides", "message"),
    [((3, 3, 2), (1, 1), "one for each channel; got x"), ((2, 3, 3), (1, 1), "must be odd; got")],
)
def test_kernels_that_do_not_fit_are_refused(kernel, strides, message, without_type_checks):
    with pytest.raises(ConfigError, match=message):
        depthwise_convolution(jnp.zeros((1, 4, 4, 3)), jnp.zeros(kernel), strides=strides)


def test_separable_block_equals_its_formula():
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 4)).astype(np.float32)
    block = SeparableBlock(5, (3, 3), (2, 2))
    params = random_params(block, x)

    def normalized(x, index):
        of = params[f"Normalization_{index}"]
        mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * np.asarray(of["scale"]) + of["bias"]

    def separable(x, index, strides):
        kernel = np.asarray(params[f"Depthwise_{index}"]["kernel"])[..., 0, :]
        diagonal = kernel[..., None] * np.eye(x.shape[-1])
        y = oracles.convolution(x, diagonal, strides)
        return y @ np.asarray(params[f"Conv_{index}"]["kernel"])[0, 0]

    def act(x):
        return np.where(x > 0, x, 0.01 * x)

    y = act(normalized(separable(x, 0, (2, 2)), 0))
    y = normalized(separable(y, 1, (1, 1)), 1)
    shortcut = normalized(x[:, ::2, ::2] @ np.asarray(params["Conv_2"]["kernel"])[0, 0], 2)
    found = jax.jit(block.apply)({"params": params}, x)
    np.testing.assert_allclose(found, act(y + shortcut), rtol=1e-3, atol=1e-4)


def test_an_image_has_a_full_convolution_first():
    params = random_params(SeparableBlock(5, (3, 3)), np.zeros((1, 4, 4, 1), np.float32))
    assert params["Conv_0"]["kernel"].shape == (3, 3, 1, 5)
    assert {name for name in params if "Depthwise" in name} == {"Depthwise_1"}
