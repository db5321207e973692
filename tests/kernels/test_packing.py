"""Packed convolutions, normalisations and blocks are those of the features as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax import kernels
from cmsad_jax.kernels.packing import pack, packed_convolution, packing_of, unpack
from cmsad_jax.modules import blocks
from tests import oracles

CASES = [
    # space, kernel, strides, channels in and out, packing of the input and of the output
    ((3, 4, 8), (1, 3, 3), (1, 1, 1), 5, 30, (4, 4)),
    ((3, 4, 8), (3, 3, 3), (2, 2, 2), 32, 64, (4, 2)),
    ((2, 4, 8), (3, 3, 5), (1, 2, 2), 3, 60, (4, 2)),
    ((3, 4, 8), (1, 1, 1), (1, 2, 2), 32, 64, (4, 2)),
    ((2, 4, 8), (3, 3, 3), (1, 2, 2), 64, 128, (2, 1)),
    ((5, 12), (3, 3), (2, 3), 2, 50, (6, 2)),
]


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_columns_that_are_packed_by_hand():
    x = jnp.arange(8.0).reshape(1, 1, 4, 2)  # one row of four columns of two channels
    np.testing.assert_array_equal(pack(x, 2)[0, 0], [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(unpack(pack(x, 2), 2), x)


@pytest.mark.parametrize(
    ("width", "channels", "outputs", "step", "expected"),
    [
        (160, 32, 32, 1, (4, 4)),  # up to 128 channels
        (160, 1, 32, 1, (4, 4)),
        (160, 32, 64, 2, (4, 2)),  # both of one width when packed
        (20, 128, 128, 1, None),  # full as they are
        (40, 128, 256, 2, None),
        (6, 8, 8, 1, (2, 2)),  # as far as the width divides
        (7, 8, 8, 1, None),
        (7, 32, 64, 2, None),  # columns of the last stride are missing
    ],
)
def test_how_many_columns(width, channels, outputs, step, expected):
    assert packing_of(width, channels, outputs, step) == expected


@pytest.mark.parametrize(("space", "size", "strides", "c", "o", "packing"), CASES)
def test_convolution_equals_the_oracle_in_value_and_native_in_gradient(
    space, size, strides, c, o, packing
):
    x, kernel = random(2, *space, c), random(*size, c, o, seed=1)
    assert packing_of(space[-1], c, o, strides[-1]) == packing

    def packed(x, kernel):
        y = packed_convolution(pack(x, packing[0]), kernel, strides=strides, packing=packing)
        return unpack(y, packing[1])

    def native(x, kernel):
        return kernels.convolution(x, kernel, strides=strides, implementation="native")

    @jax.jit
    def both(x, kernel):
        found, pull_back = jax.vjp(packed, x, kernel)
        _, reference = jax.vjp(native, x, kernel)
        cotangent = jnp.cos(jnp.arange(found.size)).reshape(found.shape)
        return found, pull_back(cotangent), reference(cotangent)

    found, gradients, expected = both(x, kernel)
    np.testing.assert_allclose(found, oracles.convolution(x, kernel, strides), atol=1e-4)
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["instance", "group"])
def test_normalisation_knows_the_columns_of_a_pack(kind):
    x, scale, bias = random(2, 3, 8, 16), random(16, seed=1), random(16, seed=2)
    options = {"kind": kind, "dtype": "float32"}
    expected = blocks.normalize(x, scale, bias, **options)
    found = unpack(blocks.normalize(pack(x, 4), scale, bias, **options, packing=4), 4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def of_block(strides, dtype="float32"):
    """A residual block of volumes, its input and its weights."""
    block = blocks.ResidualBlock(32, (1, 3, 3), strides, dtype=jnp.dtype(dtype))
    x = random(1, 2, 4, 16, 16)
    return block, x, block.init(jax.random.key(0), x)


@pytest.mark.parametrize("strides", [None, (1, 2, 2)])
def test_a_packed_block_is_the_plain_one_in_value_and_gradient(monkeypatch, strides):
    block, x, params = of_block(strides)

    def run(platform):
        def choose(*arguments, default, **of_platform):
            return of_platform.get(platform, default)(*arguments)

        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
        jax.clear_caches()
        return jax.value_and_grad(lambda p: jnp.square(block.apply(p, x)[..., ::3]).sum())(params)

    plain, packed = run("cpu"), run("tpu")
    for got, want in zip(*map(jax.tree.leaves, (packed, plain)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_only_a_tpu_packs():
    block, x, params = of_block(None, "bfloat16")
    traced = jax.jit(block.apply).trace(params, x)

    def convolutions(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return [line for line in text.splitlines() if "stablehlo.convolution(" in line]

    assert ["2x4x4x128xbf16>" in line for line in convolutions("tpu")] == [True, True]
    for platform in ("cpu", "cuda"):
        assert not any("128xbf16" in line for line in convolutions(platform))
