"""Train step and inference are lowered for accelerators on a machine that has none."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cmsad_jax import kernels
from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.modules import CMSAD, EncoderConfig
from cmsad_jax.modules.network import apply, probabilities
from cmsad_jax.training import LossConfig, OptimizerConfig, TrainState, train_step, train_steps
from tests.networks import tiny_batch, tiny_config

CONFIG = dataclasses.replace(
    tiny_config(modalities=("t2w", "adc"), dtype="bfloat16", rematerialize=True),
    encoder=EncoderConfig(
        channels=(4, 6),
        kernels=((1, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (2, 2, 2)),
        blocks=(1, 1),
    ),
)


@pytest.fixture(scope="module")
def abstract():
    """Shapes of a state and a batch: nothing is computed."""
    network, batch = CMSAD(CONFIG), jax.tree.map(jnp.asarray, tiny_batch(batch=4, modalities=2))
    optimizer = OptimizerConfig().optimizer(10)

    def fresh(key):
        params = network.init(key, batch["image"])["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    return network, optimizer, jax.eval_shape(fresh, jax.random.key(0)), batch


def test_train_step(abstract):
    network, optimizer, state, batch = abstract
    step = partial(
        train_step,
        network=network,
        optimizer=optimizer,
        loss=LossConfig(correlation_weight=0.1),
        augmentation=AugmentationConfig(),
        modality_dropout=0.1,
        average_decay=0.9,
        accumulation=2,
        rolled=True,
    )
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 2), batch)
    traced = jax.jit(partial(train_steps, step=step), donate_argnums=0).trace(state, stacked)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in text
        assert "bf16" in text
        assert "tf.aliasing_output" in text or "jax.buffer_donor" in text, "the state is donated"


def test_inference(abstract):
    network, _, state, batch = abstract

    def predict(params, image, present):
        return probabilities(apply(network, params, image, present).logits)

    traced = jax.jit(predict).trace(state.params, batch["image"], batch["present"])
    for platform in ("tpu", "cuda"):
        assert "stablehlo.convolution" in traced.lower(lowering_platforms=(platform,)).as_text()


FEATURE = jax.ShapeDtypeStruct((2, 4, 6, 12, 8), jnp.bfloat16)
TABLE = jax.ShapeDtypeStruct((2, 3, 3, 8), jnp.float32)


def convolution(size, strides, implementation=None):
    """A convolution of that kernel and those strides, with its arguments."""
    kernel = jax.ShapeDtypeStruct((*size, 8, 16), jnp.bfloat16)
    options = {"strides": strides, "implementation": implementation}
    return partial(kernels.convolution, **options), (FEATURE, kernel)


def correlation(implementation):
    """The correlation of three modalities, with its arguments."""

    def function(g1, g2, g3, *coefficients):
        return kernels.correlation((g1, g2, g3), *coefficients, implementation=implementation)

    return function, (*[FEATURE] * 3, *[TABLE] * 3)


KERNELS = {
    "attention": (kernels.attention_map, (FEATURE,)),
    "correlation": correlation("xla"),
    "plain correlation": correlation("reference"),
    "convolution": convolution((3, 3, 3), (2, 2, 2)),
    "native convolution": convolution((3, 3, 3), (1, 1, 1), "native"),
    "folded convolution": convolution((3, 3, 3), (2, 2, 2), "folded"),
    "slicewise convolution": convolution((1, 3, 3), (1, 1, 1)),
    "pointwise convolution": convolution((1, 1, 1), (1, 2, 2)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_and_its_gradient(name):
    function, arguments = KERNELS[name]
    cotangent = jax.eval_shape(function, *arguments)

    def with_gradient(*arguments_and_cotangent):
        *given, cotangent = arguments_and_cotangent
        value, pull_back = jax.vjp(function, *given)
        return value, pull_back(cotangent)

    traced = jax.jit(with_gradient).trace(*arguments, cotangent)
    for platform in ("tpu", "cuda"):
        assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_which_convolution_each_platform_gets():
    def lowered(size, strides, platform):
        function, arguments = convolution(size, strides)
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        return [
            line.rsplit("->")[-1].strip()
            for line in text.splitlines()
            if "stablehlo.convolution(" in line or "stablehlo.dot_general" in line
        ], "stablehlo.dot_general" in text

    # One slice thick: two-dimensional everywhere.
    for platform in ("cpu", "tpu", "cuda"):
        assert lowered((1, 3, 3), (1, 1, 1), platform) == (["tensor<8x6x12x16xbf16>"], False)
    # One voxel: a product, but the library's convolution where XLA finds no tiles for a product.
    for platform in ("cpu", "tpu"):
        assert lowered((1, 1, 1), (1, 2, 2), platform) == (["tensor<2x4x3x6x16xbf16>"], True)
    assert lowered((1, 1, 1), (1, 2, 2), "cuda") == (["tensor<8x3x6x16xbf16>"], False)
    # Volumes: folded on a CPU alone.
    assert lowered((3, 3, 3), (1, 1, 1), "cpu") == (["tensor<8x6x12x16xbf16>"], False)
    for platform in ("tpu", "cuda"):
        assert lowered((3, 3, 3), (1, 1, 1), platform) == (["tensor<2x4x6x12x16xbf16>"], False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"HIGHEST"}),
        ({"matmul_precision": "high"}, {"HIGH"}),
        ({"matmul_precision": "default"}, {"DEFAULT"}),
        ({"dtype": "bfloat16"}, {"DEFAULT"}),
    ],
)
def test_matmul_precision_is_that_of_every_product_of_a_float32_network(options, expected):
    network = CMSAD(tiny_config(**options))
    batch = jax.tree.map(jnp.asarray, tiny_batch())
    params = jax.eval_shape(network.init, jax.random.key(0), batch["image"])["params"]

    def total(params):
        return apply(network, params, batch["image"]).logits.sum()

    traced = jax.jit(jax.grad(total)).trace(params)

    def precisions(platform, operation):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if f"stablehlo.{operation}" in line]
        assert lines
        return {
            word
            for line in lines
            for word in re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line) or ["DEFAULT"]
        }

    assert precisions("cuda", "convolution(") == expected
    # Resizing multiplies by matrices of weights, in float32 always.
    assert precisions("tpu", "dot_general") == expected | {"HIGHEST"}
