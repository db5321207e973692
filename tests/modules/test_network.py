import dataclasses
import re
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from cmsad_jax.modules import (
    CMSAD,
    Encoder,
    EncoderConfig,
    Fusion,
    FusionConfig,
    NetworkConfig,
    probabilities,
)
from cmsad_jax.training import LossConfig, OptimizerConfig
from cmsad_jax.types import ConfigError
from tests import oracles
from tests.networks import TINY_2D, TINY_3D, init, random_params, tiny_batch, tiny_config

KINDS = typing.get_args(typing.get_type_hints(FusionConfig)["kind"])


@pytest.mark.parametrize(
    ("rank", "names"),
    [(2, ("t2w",)), (3, ("t2w",)), (3, ("t2w", "adc")), (2, ("t2w", "adc", "hbv", "dce"))],
)
def test_any_number_of_modalities_on_slices_and_volumes(rank, names):
    batch = tiny_batch(rank=rank, modalities=len(names))
    config = tiny_config(rank=rank, modalities=names, deep_supervision=1)
    network, params = init(config, batch)
    output = jax.jit(network.apply)({"params": params}, batch["image"])
    space = batch["image"].shape[1:-1]
    assert output.logits.shape == (2, *space, 1)
    assert output.logits.dtype == jnp.float32
    assert [len(output.features[name]) for name in names] == [2] * len(names)
    shapes = config.encoder.stage_shapes(space)
    for stage, feature in enumerate(output.features[names[-1]]):
        assert feature.shape == (2, *shapes[stage], config.encoder.channels[stage])
    assert [deep.shape for deep in output.deep_logits] == [(2, *shapes[1], 1)]
    assert np.all(np.isfinite(output.correlation_loss))


@pytest.mark.parametrize("fusion", KINDS)
def test_batch_permutation_permutes_outputs(fusion):
    batch = tiny_batch(batch=3)
    network, params = init(tiny_config(fusion=fusion), batch)
    apply = jax.jit(lambda image: network.apply({"params": params}, image))
    order = np.array([2, 0, 1])
    straight, permuted = apply(batch["image"]), apply(batch["image"][order])
    np.testing.assert_allclose(permuted.logits, straight.logits[order], atol=1e-5)
    np.testing.assert_allclose(
        permuted.correlation_loss, straight.correlation_loss[order], atol=1e-6
    )


@pytest.mark.parametrize("fusion", KINDS)
def test_absent_modality_changes_nothing_and_gets_no_gradient(fusion):
    batch = tiny_batch()
    network, params = init(tiny_config(fusion=fusion), batch)
    present = np.array([[True, False, True], [True, True, True]])

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_logits(image):
        logits = network.apply({"params": params}, image, present).logits
        return (logits**2).sum(), logits

    gradient, logits = gradient_and_logits(batch["image"])
    other = batch["image"].copy()
    other[0, ..., 1] = 7.0
    np.testing.assert_array_equal(logits, gradient_and_logits(other)[1])
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[0, ..., 1] == 0)
    assert np.any(gradient[1, ..., 1] != 0)


def test_present_none_is_the_same_program_as_ones():
    batch = tiny_batch()
    network, params = init(tiny_config(), batch)
    with_mask = jax.jit(network.apply)({"params": params}, batch["image"], batch["present"])
    without = jax.jit(network.apply)({"params": params}, batch["image"])
    np.testing.assert_array_equal(with_mask.logits, without.logits)


@pytest.mark.parametrize("fusion", KINDS)
def test_all_zero_image_has_finite_gradients(fusion):
    batch = tiny_batch(batch=1)
    network, params = init(tiny_config(fusion=fusion), batch)
    image = np.zeros_like(batch["image"])

    def loss(params):
        output = network.apply({"params": params}, image)
        return (output.logits**2).sum() + output.correlation_loss.sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_mean_fusion_of_one_modality_is_its_projection():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    fusion = Fusion(5, ("t2w",), FusionConfig(kind="mean"))
    params = random_params(fusion, {"t2w": x})
    fused = fusion.apply({"params": params}, {"t2w": x}).fused
    kernel = params["project0"]["kernel"][0, 0]
    np.testing.assert_allclose(fused, x @ kernel + params["project0"]["bias"], atol=1e-5)


def test_mean_fusion_averages_over_what_is_present():
    x = jax.random.normal(jax.random.key(0), (3, 1, 4, 4, 5))
    fusion = Fusion(5, ("t2w", "adc", "hbv"), FusionConfig(kind="mean"))
    features = dict(zip(fusion.modalities, x, strict=True))
    params = {"params": random_params(fusion, features)}
    two = fusion.apply(params, features, jnp.array([[True, False, True]])).fused
    alone = [fusion.apply(params, features, jnp.eye(3, dtype=bool)[m][None]).fused for m in (0, 2)]
    np.testing.assert_allclose(two, sum(alone) / 2, atol=1e-5)


def test_attention_gates_share_one_among_the_modalities_that_are_present():
    fusion = Fusion(4, ("t2w", "adc", "hbv"), FusionConfig(kind="attention"))
    x = jax.random.normal(jax.random.key(0), (3, 1, 2, 8, 8, 4))
    features = dict(zip(fusion.modalities, x, strict=True))
    params = {"params": random_params(fusion, features)}
    gates = fusion.apply(params, features, jnp.array([[True, False, True]])).gates
    assert gates.shape == (1, 2, 8, 8, 3)
    np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-6)
    assert np.all(gates[..., 1] == 0)
    assert np.ptp(gates[..., 0]) > 0.01


def test_one_weight_a_modality_and_example_is_a_softmax_of_pooled_features():
    names = ("t2w", "adc", "hbv")
    fusion = Fusion(4, names, FusionConfig(kind="weighted", hidden=3, residual=False))
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, 2, 8, 8, 4)))
    features = dict(zip(names, x, strict=True))
    params = random_params(fusion, features)
    present = np.array([[True, False, True], [True, True, True]])
    output = jax.jit(fusion.apply)({"params": params}, features, present)
    params = jax.tree.map(np.asarray, params)
    for b in range(2):
        g = [
            (x[m, b] @ params[f"project{m}"]["kernel"][0, 0] + params[f"project{m}"]["bias"])
            * present[b, m]
            for m in range(3)
        ]
        pooled = np.concatenate([each.mean((0, 1)) for each in g])
        hidden = np.maximum(oracles.dense(pooled, params["weights_hidden"]), 0)
        scores = np.exp(oracles.dense(hidden, params["weights"])) * present[b]
        weights = scores / scores.sum()
        np.testing.assert_allclose(output.weights[b], weights, rtol=1e-4, atol=1e-6)
        weighed = sum(w * each for w, each in zip(weights, g, strict=True))
        expected = weighed @ params["join"]["kernel"][0, 0] + params["join"]["bias"]
        np.testing.assert_allclose(output.fused[b], expected, rtol=1e-3, atol=1e-4)


def test_weights_of_modalities_are_told_for_each_stage_and_are_of_an_example_in_2_5d():
    batch = tiny_batch(batch=1, modalities=2)
    encoder = dataclasses.replace(TINY_2D, slices="cat", block="plain")
    config = dataclasses.replace(
        tiny_config(fusion="weighted", modalities=("a", "b"), deep_supervision=0), encoder=encoder
    )
    network, params = init(config, batch)
    output = jax.jit(network.apply)({"params": params}, batch["image"])
    assert [weights.shape for weights in output.modality_weights] == [(1, 2)] * 2
    np.testing.assert_allclose([w.sum() for w in output.modality_weights], 1, rtol=1e-5)


def test_scff_gates_lie_between_0_and_1_and_linear_expression_drops_the_square():
    x = jax.random.normal(jax.random.key(0), (2, 1, 2, 8, 8, 4))
    features = {"t2w": x[0], "adc": x[1]}
    outputs = {}
    for expression in ("linear", "nonlinear"):
        fusion = Fusion(4, ("t2w", "adc"), FusionConfig(expression=expression))
        params = {"params": random_params(fusion, features)}
        outputs[expression] = fusion.apply(params, features)
        gates = outputs[expression].gates
        assert gates.shape == (1, 2, 8, 8, 2)
        assert np.all((gates > 0) & (gates < 1))
    assert np.any(outputs["linear"].fused != outputs["nonlinear"].fused)


def test_correlation_loss_is_zero_where_expression_equals_target():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    fusion = Fusion(4, ("t2w", "adc"), FusionConfig(expression="linear"))
    both = {"t2w": x, "adc": x}
    params = random_params(fusion, both)
    params = params | {"project1": params["project0"]}
    # Slope 1, offset 0: ghat_ij = g_j = g_i.
    params["coefficients"] = jax.tree.map(jnp.zeros_like, params["coefficients"])
    loss = fusion.apply({"params": params}, both).correlation_loss
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 12), params["coefficients"]["bias"].shape)
    params["coefficients"]["bias"] = ramp
    assert fusion.apply({"params": params}, both).correlation_loss[0] > 1e-3


@pytest.mark.parametrize(
    ("gate_identity", "residual"), [(True, True), (False, True), (True, False), (False, False)]
)
def test_scff_joins_what_its_gates_let_through(gate_identity, residual):
    x = jax.random.normal(jax.random.key(0), (2, 1, 8, 8, 4))
    features = {"a": x[0], "b": x[1]}
    fusion = Fusion(4, ("a", "b"), FusionConfig(gate_identity=gate_identity, residual=residual))
    params = random_params(fusion, features)
    output = fusion.apply({"params": params}, features)

    def pointwise(name, x):
        return x @ np.asarray(params[name]["kernel"][0, 0]) + np.asarray(params[name]["bias"])

    g = [pointwise(f"project{m}", np.asarray(x[m])) for m in range(2)]
    gates = np.asarray(output.gates)
    gated = [x * (gate_identity + gates[..., m : m + 1]) for m, x in enumerate(g)]
    expected = pointwise("join", np.concatenate(gated, -1)) + residual * (g[0] + g[1]) / 2
    np.testing.assert_allclose(output.fused, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_correlation_loss_in_either_direction_equals_the_oracle(direction, stop_gradient):
    features = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 3))
    fusion = Fusion(
        3,
        ("a", "b"),
        FusionConfig(
            correlation_direction=direction, correlation_stop_gradient=stop_gradient, hidden=2
        ),
    )
    params = random_params(fusion, {"a": features[0], "b": features[1]})
    coefficients = params["coefficients"]
    coefficients["kernel"] = jnp.zeros_like(coefficients["kernel"])  # so that the bias is all
    output = fusion.apply({"params": params}, {"a": features[0], "b": features[1]})
    g = [
        np.asarray(x @ params[f"project{m}"]["kernel"][0, 0] + params[f"project{m}"]["bias"])
        for m, x in enumerate(features)
    ]
    terms = []
    for pair, (i, j) in enumerate([(0, 1), (1, 0)]):
        a, b, c = np.split(np.asarray(coefficients["bias"])[pair], 3)
        p, q = (np.exp(x) for x in (g[i], a * g[j] ** 2 + (1 + b) * g[j] + c))
        p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
        p, q = (p, q) if direction == "forward" else (q, p)
        terms.append((p * np.log(p / q)).sum(-1).mean())
    np.testing.assert_allclose(output.correlation_loss, [np.mean(terms)], rtol=1e-4)

    def broadcast_from_first(first):
        """The loss alone where the expression of the other is cut off."""
        loss = fusion.apply({"params": params}, {"a": first, "b": features[1]}).correlation_loss
        return loss.sum()

    # With coefficients that do not depend on the features, modality 0 moves as what is expressed
    # (pair 0) and as what expresses (pair 1); the latter alone under a stop-gradient.
    gradient = np.asarray(jax.grad(broadcast_from_first)(features[0]))

    def expressing(x):
        x = x @ params["project0"]["kernel"][0, 0] + params["project0"]["bias"]
        a, b, c = np.split(np.asarray(coefficients["bias"])[1], 3)
        own, found = jax.nn.log_softmax(g[1]), jax.nn.log_softmax(a * x**2 + (1 + b) * x + c)
        first, second = (own, found) if direction == "forward" else (found, own)
        return (jnp.exp(first) * (first - second)).sum(-1).mean() / 2

    alone = np.asarray(jax.grad(expressing)(features[0]))
    assert np.allclose(gradient, alone, rtol=1e-3, atol=1e-6) == stop_gradient


def test_scff_at_some_stages_leaves_the_others_to_concat():
    batch = tiny_batch()
    config = tiny_config()
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, stages=(1,)))
    network, params = init(config, batch)
    output = jax.jit(network.apply)({"params": params}, batch["image"])
    assert [gates is not None for gates in output.gates] == [False, True]
    assert ["gate" in params[f"fusion{stage}"] for stage in range(2)] == [False, True]
    whole = init(tiny_config(), batch)[1]
    assert all("gate" in whole[f"fusion{stage}"] for stage in range(2))
    fusion = Fusion(6, config.modalities, config.fusion)
    of_stage = fusion.apply(
        {"params": params["fusion1"]},
        {name: output.features[name][1] for name in config.modalities},
    )
    np.testing.assert_allclose(output.correlation_loss, of_stage.correlation_loss, rtol=1e-4)
    assert np.all(np.asarray(output.correlation_loss) > 0)


def test_shared_encoder_has_one_set_of_weights():
    batch = tiny_batch()
    _, own = init(tiny_config(), batch)
    _, shared = init(tiny_config(share_encoders=True), batch)
    assert {name for name in own if "encoder" in name} == {
        "encoder_t2w",
        "encoder_adc",
        "encoder_hbv",
    }
    assert {name for name in shared if "encoder" in name} == {"encoder"}


def test_bfloat16_network_keeps_float32_weights_and_logits():
    batch = tiny_batch()
    config = tiny_config(dtype="bfloat16")
    network, params = init(config, batch)
    output = jax.jit(network.apply)({"params": params}, batch["image"])
    assert output.features["t2w"][0].dtype == jnp.bfloat16
    assert output.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    full = CMSAD(dataclasses.replace(config, dtype="float32"))
    exact = jax.jit(full.apply)({"params": params}, batch["image"]).logits
    assert np.abs(output.logits - exact).mean() < 0.05 * np.abs(exact).std() + 0.05


def test_probabilities_of_one_and_of_several_classes():
    logits = jnp.array([[0.0, np.log(3.0)]])
    np.testing.assert_allclose(probabilities(logits), [[0.25, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(probabilities(jnp.zeros((1, 1))), [[0.5]])


def test_encoder_inside_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.encoder = bridge.ToNNX(Encoder(TINY_2D), rngs=rngs)
            self.encoder.lazy_init(jnp.zeros((1, 16, 16, 1)))

        def __call__(self, x):
            return self.encoder(x)[-1].mean()

    model = Model(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 1))
    gradient = nnx.grad(lambda model: model(x) ** 2)(model)
    assert len(jax.tree.leaves(gradient)) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderConfig(channels=(4, 8)), "one entry for each encoder stage"),
        (
            lambda: dataclasses.replace(TINY_3D, kernels=((2, 3, 3),) * 2),
            "kernel sizes must be odd",
        ),
        (
            lambda: dataclasses.replace(TINY_3D, blocks=(1, 0)),
            r"blocks must be at least 1; got .* blocks \(1, 0\)",
        ),
        (
            lambda: dataclasses.replace(TINY_3D, strides=((1, 1),) * 2),
            "one entry for each axis of space",
        ),
        (lambda: TINY_3D.stage_shapes((1, 2, 2)), "must keep more than one voxel"),
        (lambda: TINY_3D.stage_shapes((16, 16)), "3 axes of space"),
        (lambda: FusionConfig(gate_kernel=2), "gate's kernel must be odd"),
        (lambda: NetworkConfig(modalities=("t2w", "t2w")), "distinct names"),
        (lambda: NetworkConfig(num_classes=0), "num_classes must be a whole number of at least 1"),
        (
            lambda: NetworkConfig(fusion=FusionConfig(stages=(1, 4))),
            r"one or more of the encoder's 0 to 3; got \(1, 4\). Name existing stages",
        ),
        (lambda: NetworkConfig(fusion=FusionConfig(stages=())), r"got \(\). Name existing stages"),
        (lambda: NetworkConfig(deep_supervision=4), "less than the number of stages"),
        (
            lambda: CMSAD(tiny_config()).init(jax.random.key(0), jnp.zeros((1, 4, 16, 16, 2))),
            "one channel for each modality",
        ),
        (
            lambda: Fusion(4, ("t2w",)).init(
                jax.random.key(0), {"t2w": jnp.zeros((1, 4, 4, 2))}, jnp.ones((1, 2), bool)
            ),
            "one column for each modality of t2w; got bool of shape",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "field", "choices"),
    [
        (EncoderConfig(), "norm", "instance, group"),
        (EncoderConfig(), "block", "residual, plain, separable"),
        (FusionConfig(), "kind", ", ".join(KINDS)),
        (FusionConfig(), "expression", "nonlinear, linear"),
        (FusionConfig(), "correlation_direction", "forward, reverse"),
        (OptimizerConfig(), "kind", "adamw, adam, sgd"),
        (OptimizerConfig(), "decay", "cosine, polynomial, steps, constant"),
        (NetworkConfig(), "decoder_block", "residual, plain, separable"),
        (NetworkConfig(), "dtype", "float32, bfloat16"),
        (LossConfig(), "region", "dice, tversky"),
        (LossConfig(), "voxel", "cross_entropy, focal"),
        (LossConfig(), "region_over", "example, batch, target"),
        (LossConfig(), "reduction", "sum, mean"),
        (LossConfig(), "distance", "l2, kl"),
    ],
)
def test_unknown_choices_are_refused_also_where_types_are_not_checked(config, field, choices):
    object.__setattr__(config, field, "none")
    first = choices.split(",")[0]
    message = f"{field} of {type(config).__name__} must be one of {choices}; got 'none'. Use "
    with pytest.raises(ConfigError, match=re.escape(f"{message}{field}='{first}'.")):
        config.__post_init__()
