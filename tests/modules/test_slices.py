"""Attention across slices: the formulas, what masked slices can do, and the network around it."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmsad_jax import export
from cmsad_jax.inference import sliding_window
from cmsad_jax.modules import CMSAD, Encoder, EncoderConfig, FusionConfig, NetworkConfig, network
from cmsad_jax.modules.slices import (
    CAT,
    CSAM,
    SliceAttentionConfig,
    largest,
    seen_slices,
    slice_attention,
    slice_encoding,
    slices_at,
)
from cmsad_jax.named_weights import flatten_weights, unflatten_weights
from cmsad_jax.training import LossConfig, TrainState, train_step
from cmsad_jax.types import ConfigError
from tests import oracles
from tests.networks import init, random_params, tiny_batch

KINDS = ("csam", "cat")
SMALL = SliceAttentionConfig(reduction=2, heads=2, pooling=3, rank=2)
MODULES = {"csam": CSAM(SMALL), "cat": CAT(SMALL, apart=True)}
WINDOW = (4, 8, 8)


def features(batch=2, depth=5):
    return jax.random.normal(jax.random.key(0), (batch, depth, 7, 6, 4))


def two_stages(rank) -> EncoderConfig:
    """The smallest encoder that has a stage behind another one."""
    return EncoderConfig(
        channels=(4, 6),
        kernels=((1, 3, 3), (3, 3, 3)) if rank == 3 else ((3, 3),) * 2,
        strides=((1, 1, 1), (2, 2, 2)) if rank == 3 else ((1, 1), (2, 2)),
        blocks=(1, 1),
        block="plain",
    )


def with_slices(kind, rank=2, names=("t2w", "adc"), fusion="mean", **changes) -> NetworkConfig:
    """A tiny network of slices, or volumes, with attention across slices."""
    return NetworkConfig(
        modalities=names,
        encoder=dataclasses.replace(two_stages(rank), slices=kind),
        fusion=FusionConfig(kind=fusion, hidden=2),
        decoder_block="plain",
        **{"deep_supervision": 0, **changes},
    )


def images(depth=4, seed=0):
    return np.random.default_rng(seed).normal(size=(2, depth, 8, 8, 2)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_equals_the_oracle(kind):
    x = features()
    params = random_params(MODULES[kind], x, np.ones((2, 5), bool))
    found = jax.jit(MODULES[kind].apply)({"params": params}, x, np.ones((2, 5), bool))
    for example in range(2):
        oracle = {"csam": oracles.csam, "cat": partial(oracles.cat, heads=2, pooling=3)}[kind]
        np.testing.assert_allclose(found[example], oracle(x[example], params), rtol=2e-4, atol=2e-5)


def test_drawn_attention_equals_the_oracle_and_without_keys_is_its_mean():
    module = CSAM(dataclasses.replace(SMALL, sampling=True))
    x, mask = features(batch=1), np.ones((1, 5), bool)
    params = random_params(module, x, mask)
    key = jax.random.key(3)
    noise = np.asarray(jax.random.normal(key, (2 + 5,)), np.float64)
    found = jax.jit(module.apply)({"params": params}, x, mask, key[None])
    np.testing.assert_allclose(found[0], oracles.csam(x[0], params, noise), rtol=1e-4, atol=1e-5)
    mean = jax.jit(module.apply)({"params": params}, x, mask)
    still = oracles.csam(x[0], params, np.zeros(7))
    np.testing.assert_allclose(mean[0], still, rtol=1e-4, atol=1e-5)
    assert np.abs(found - mean).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_masked_slices_change_nothing_and_the_others_are_as_if_alone(kind):
    x = features(batch=1)
    mask = np.array([[True, True, True, False, False]])
    module = MODULES[kind]
    params = random_params(module, x, mask)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_result(x):
        result = module.apply({"params": params}, x, mask)
        return (result[:, :3] ** 2).sum(), result

    gradient, found = gradient_and_result(x)
    other = x.at[:, 3:].set(1e3)
    np.testing.assert_array_equal(found, gradient_and_result(other)[1])
    assert np.all(gradient[:, 3:] == 0)
    assert np.all(found[:, 3:] == 0)
    changed = gradient_and_result(x.at[:, 0].add(1.0))[1]
    assert np.abs(changed - found)[:, 2].max() > 1e-4  # slices do see one another
    if kind == "cat":  # which takes any number of slices
        alone = jax.jit(module.apply)({"params": params}, x[:, :3], mask[:, :3])
        np.testing.assert_allclose(found[:, :3], alone, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_largest_is_shared_and_never_lost_to_rounding():
    x = jnp.array([[1.0, 3.0, 3.0 - 1e-7, -2.0], [-5.0, -5.0, -6.0, -9.0]])
    found = jax.grad(lambda x: largest(x, (1,)).sum())(x)
    np.testing.assert_array_equal(found, [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_no_slice_at_all_is_finite(kind):
    x, mask = features(batch=1), np.zeros((1, 5), bool)
    params = random_params(MODULES[kind], x, mask)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda params: MODULES[kind].apply({"params": params}, x, mask).sum())
    )(params)
    assert value == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_csam_lets_features_pass_as_it_begins():
    x, mask = jnp.zeros((1, 5, 7, 6, 4)).at[0, 2, 3, 3, 1].set(1e-3), np.ones((1, 5), bool)
    for opening, passes in ((3.0, 0.9526**3), (0.0, 0.5**3)):
        module = CSAM(dataclasses.replace(SMALL, opening=opening))
        params = module.init(jax.random.key(0), x, mask)
        found = jax.jit(module.apply)(params, x, mask)
        assert found[0, 2, 3, 3, 1] == pytest.approx(1e-3 * passes, rel=5e-3)


def test_csam_of_another_depth_is_refused():
    module, x = MODULES["csam"], features()
    params = random_params(module, x, np.ones((2, 5), bool))
    with pytest.raises(ConfigError, match="of 5 slices and features of 4"):
        module.apply({"params": params}, x[:, :4], np.ones((2, 4), bool))


def test_encoding_of_slices_by_hand():
    found = slice_encoding(3, 5)
    assert found.shape == (3, 5)
    np.testing.assert_allclose(found[0], [0, 1, 0, 1, 0])
    np.testing.assert_allclose(found[2, :2], [np.sin(2), np.cos(2)], rtol=1e-6)
    np.testing.assert_allclose(found[1, 4], np.sin(1 / 10_000**0.8), rtol=1e-5)


def test_mask_of_slices_from_the_image_and_behind_a_stride():
    image = np.zeros((2, 5, 3, 3, 2), np.float32)
    image[0, 1, 2, 2, 1] = -1
    image[1, :2] = 1
    np.testing.assert_array_equal(seen_slices(image).sum(1), [1, 2])
    mask = np.array([[False, False, True, False, True]])
    np.testing.assert_array_equal(slices_at(mask, 2), [[False, True, True]])
    np.testing.assert_array_equal(slices_at(mask, 1), mask)


@pytest.mark.parametrize(
    ("kind", "rank", "fusion"), [("csam", 2, "scff"), ("cat", 3, "concat"), ("cat", 2, "early")]
)
def test_network_sees_nothing_of_slices_and_modalities_that_are_not_there(kind, rank, fusion):
    config = with_slices(kind, rank, fusion=fusion, deep_supervision=1)
    image = images()
    slices = np.array([[True, True, True, False], [True] * 4])
    present = np.array([[True, False], [True, True]])
    model, params = init(config, {"image": image})

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_output(image):
        output = network.apply(model, params, image, present, slices)
        return (output.logits[0] ** 2).sum(), output

    gradient, output = gradient_and_output(image)
    assert output.logits.shape == (2, *WINDOW, 1)
    assert output.correlation_loss.shape == (2,)
    shapes = config.encoder.stage_shapes(WINDOW)
    assert [fused.shape[1:4] for fused in output.fused] == [*shapes]
    other = image.copy()
    other[0, 3] = np.nan
    other[0, ..., 1] = np.inf
    for one, two in zip(
        jax.tree.leaves(output), jax.tree.leaves(gradient_and_output(other)[1]), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    assert np.all(np.asarray(gradient)[0, 3] == 0)
    assert np.all(np.asarray(gradient)[0, ..., 1] == 0)
    assert np.any(np.asarray(gradient)[0, 2] != 0)


@pytest.mark.parametrize(("kind", "rank"), [("csam", 3), ("cat", 2)])
def test_slices_of_zeros_are_those_that_are_not_there(kind, rank):
    image = images()
    image[0, 2:] = 0
    model, params = init(with_slices(kind, rank), {"image": image})
    slices = np.array([[True, True, False, False], [True] * 4])
    run = partial(network.apply, model)  # as one program, each would be rounded in its own way
    found = run(params, image).logits
    np.testing.assert_allclose(found, run(params, image, None, slices).logits, atol=1e-6)
    everything = run(params, image, None, np.ones((2, 4), bool)).logits
    assert np.abs(found - everything)[0, :2].max() > 1e-5


def test_slices_of_a_crop_meet_in_the_attention_alone():
    """Without it, a crop of slices would be a batch of slices: stage 0 comes before it."""
    config = with_slices("cat")
    encoder = dataclasses.replace(config.encoder, slice_attention=SliceAttentionConfig(stages=(1,)))
    image = images()
    model, params = init(dataclasses.replace(config, encoder=encoder), {"image": image})
    alone = CMSAD(dataclasses.replace(config, encoder=two_stages(2)))
    without = {
        name: {key: value for key, value in of.items() if "slices" not in key}
        for name, of in params.items()
    }
    together = jax.jit(model.apply)({"params": params}, image)
    apart = jax.jit(alone.apply)({"params": without}, image.reshape(8, 8, 8, 2))
    expected = apart.features["t2w"][0]
    found = together.features["t2w"][0].reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(together.logits.reshape(apart.logits.shape) - apart.logits).max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_next_stage_is_given_what_was_before_the_attention_unless_told(kind):
    image = images()[..., :1]
    found = {}
    for onward in (False, True):
        attention = SliceAttentionConfig(stages=(0,), onward=onward)
        config = dataclasses.replace(two_stages(2), slices=kind, slice_attention=attention)
        params = random_params(Encoder(config), image)
        found[onward] = jax.jit(Encoder(config).apply)({"params": params}, image)
    np.testing.assert_allclose(found[False][0], found[True][0], atol=1e-5)
    assert np.abs(found[False][1] - found[True][1]).max() > 1e-4
    blocks = {name: of for name, of in params.items() if "slices" not in name}
    alone = jax.jit(Encoder(two_stages(2)).apply)({"params": blocks}, image.reshape(8, 8, 8, 1))
    np.testing.assert_allclose(found[False][1].reshape(alone[1].shape), alone[1], atol=1e-5)
    assert np.abs(found[False][0].reshape(alone[0].shape) - alone[0]).max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_nothing(kind):
    x, mask = features(batch=1), np.ones((1, 5), bool)
    made = [
        slice_attention(
            kind,
            SMALL,
            norm="instance",
            apart=True,
            dtype=jnp.float32,
            rematerialize=rematerialize,
            name="attention",
        )
        for rematerialize in (False, True)
    ]
    params = random_params(made[0], x, mask)
    gradients = [
        jax.grad(lambda params, module=module: module.apply({"params": params}, x, mask).sum())
        for module in made
    ]
    assert ["remat" in str(jax.make_jaxpr(gradient)(params)) for gradient in gradients] == [
        False,
        True,
    ]
    one, two = (jax.jit(gradient)(params) for gradient in gradients)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(kind):
    config = with_slices(kind, dtype="bfloat16")
    image = images()
    model, params = init(config, {"image": image})
    half = jax.jit(model.apply)({"params": params}, image)
    assert half.features["t2w"][0].dtype == jnp.bfloat16
    full = CMSAD(dataclasses.replace(config, dtype="float32"))
    exact = jax.jit(full.apply)({"params": params}, image).logits
    assert np.abs(half.logits - exact).mean() < 0.05 * np.abs(exact).std() + 0.05


def test_train_step_draws_by_the_key_of_each_example_and_learns_the_distribution():
    config = with_slices("csam", names=("t2w",))
    attention = SliceAttentionConfig(sampling=True, rank=2, stages=(0,))
    encoder = dataclasses.replace(
        config.encoder,
        slice_attention=attention,
        **{
            name: getattr(config.encoder, name)[:1]
            for name in ("channels", "kernels", "strides", "blocks")
        },
    )
    batch = tiny_batch(batch=1, modalities=1)
    batch["image"][0, 3] = 0
    model, params = init(dataclasses.replace(config, encoder=encoder), batch)
    loss = LossConfig(cross_modal_weight=0.0, self_weight=0.0)
    optimizer = optax.sgd(1e-1)
    state = TrainState(np.int32(0), params, params, optimizer.init(params))
    step = jax.jit(partial(train_step, network=model, optimizer=optimizer, loss=loss))
    after, metrics = step(state, batch)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, params)["encoder_t2w"][
        "stage0_slices"
    ]
    assert moved["slice_factor"]["kernel"]
    assert moved["slice_log_diagonal"]["bias"]
    assert step(state, batch | {"key": batch["key"] + 1})[1]["loss"] != metrics["loss"]
    assert step(state, batch)[1]["loss"] == metrics["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_exported_window_slides_over_any_depth(kind):
    model, params = init(with_slices(kind), {"image": images()})

    def predict(flat, windows, present):
        output = network.apply(model, unflatten_weights(flat), windows, present)
        return network.probabilities(output.logits)

    weights = flatten_weights(params)
    program = jax.export.deserialize(
        export.export_program(predict, weights, window=WINDOW, num_modalities=2, platforms=["cpu"])
    )
    run = jax.jit(program.call)
    for depth in (3, 6):
        image = images(depth)[0]
        found = sliding_window(
            partial(run, weights), image, np.ones(2, bool), window=WINDOW, num_classes=1
        )
        assert found.shape == (depth, 8, 8, 1)
        assert np.all(np.isfinite(found))
        if depth == 3:  # what is added to fill a window is masked
            padded = np.concatenate([image, np.zeros((1, 8, 8, 2), np.float32)])
            direct = network.apply(model, params, padded[None])
            expected = network.probabilities(direct.logits)
            np.testing.assert_allclose(found, expected[0, :3], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SliceAttentionConfig(kernel=4), "attention in plane must be odd; got 4. Use 7."),
        (lambda: SliceAttentionConfig(heads=0), "heads must be a whole number of at least 1"),
        (
            lambda: SliceAttentionConfig(opening=-1.0),
            "opening must be a finite number of at least 0",
        ),
        (
            lambda: dataclasses.replace(
                two_stages(2), slices="cat", slice_attention=SliceAttentionConfig(stages=(3,))
            ),
            r"encoder's 0 to 1; got \(3,\). Name existing stages, or use slices=none",
        ),
        (
            lambda: network.apply(
                CMSAD(with_slices("none", 3)), {}, images(), None, np.ones((2, 4), bool)
            ),
            "got one and encoder.slices none. Leave it out",
        ),
        (
            lambda: network.apply(
                CMSAD(with_slices("cat")), {}, images(), None, np.ones((2, 3), bool)
            ),
            r"got bool of shape \(2, 3\). Use shape \(2, 4\)",
        ),
        (
            lambda: network.apply(CMSAD(with_slices("cat")), {}, images()[:, 0]),
            "takes images with 3 axes of space",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_constants_of_another_type_are_refused(without_type_checks):
    with pytest.raises(ConfigError, match="must be a SliceAttentionConfig; got 'csam'"):
        dataclasses.replace(two_stages(2), slice_attention="csam")


def test_constants_of_the_other_kind_are_said_to_have_no_effect():
    encoder = dataclasses.replace(two_stages(2), slices="csam", slice_attention=SMALL)
    config = NetworkConfig(modalities=("t2w",), encoder=encoder)
    said = "\n".join(LossConfig(cross_modal_weight=0.0).without_effect(config))
    assert {*re.findall(r"slice_attention\.(\w+) has no effect", said)} == {
        "heads",
        "pooling",
        "rank",
    }
