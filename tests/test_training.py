import dataclasses
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmsad_jax import parallel
from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.losses.distillation import AttentionConfig
from cmsad_jax.modules import CMSAD
from cmsad_jax.modules.network import apply
from cmsad_jax.training import (
    LossConfig,
    OptimizerConfig,
    drop_modalities,
    init_state,
    loss_fn,
    train_step,
)
from cmsad_jax.types import ConfigError
from tests import oracles
from tests.networks import init, tiny_batch, tiny_config

ALL_TERMS = LossConfig(
    cross_modal_weight=0.5, self_weight=0.5, correlation_weight=0.5, warmup_steps=0
)


def make_step(config=None, loss=ALL_TERMS, **options):
    """A state and a step; by default with SCFF at the deeper stage alone, half the program."""
    config = config or tiny_config(scff_stages=(1,))
    network = CMSAD(config)
    optimizer = OptimizerConfig(learning_rate=1e-2).optimizer(50)
    shape = (1, *(4, 16, 16)[-config.encoder.rank :], len(config.modalities))
    state = init_state(network, optimizer, shape, key=jax.random.key(0))
    return state, partial(train_step, network=network, optimizer=optimizer, loss=loss, **options)


def test_training_learns_the_cuboid():
    batch = tiny_batch()
    state, step = make_step(average_decay=0.9)
    step = jax.jit(step)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert step._cache_size() == 1
    different = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, state.average)
    assert max(jax.tree.leaves(different)) > 0


def test_every_term_is_named_and_the_total_is_their_weighted_sum():
    batch = tiny_batch()
    network, params = init(tiny_config(deep_supervision=1), batch)
    config = dataclasses.replace(ALL_TERMS, warmup_steps=10)
    total, metrics = jax.jit(partial(loss_fn, network=network, config=config))(
        params, batch, jnp.asarray(5)
    )
    assert set(metrics) == {
        "loss",
        "dice_loss",
        "cross_entropy_loss",
        "cross_modal_distillation_loss",
        "self_distillation_loss",
        "label_distillation_loss",
        "correlation_loss",
        "map_distance",
    }
    ramp = 0.5
    expected = (
        metrics["dice_loss"]
        + metrics["cross_entropy_loss"]
        + ramp * 0.5 * metrics["cross_modal_distillation_loss"]
        + ramp * 0.5 * metrics["self_distillation_loss"]
        + ramp * 0.3 * metrics["label_distillation_loss"]
        + ramp * 0.5 * metrics["correlation_loss"]
    )
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def teaching(*teachers, **changes):
    return dataclasses.replace(
        ALL_TERMS, **{"correlation_weight": 0.0, "teachers": teachers, **changes}
    )


def test_each_teacher_has_its_terms():
    batch = tiny_batch()
    batch["available"] = batch["present"]
    batch["present"] = np.array([[True, False, True], [True, True, True]])
    network, params = init(tiny_config(), batch)

    def terms(config):
        function = partial(loss_fn, network=network, config=config, average=params)
        found = jax.eval_shape(function, params, batch, jnp.asarray(5))[1]
        return {name.removesuffix("_distillation_loss") for name in found if "distil" in name}

    assert terms(teaching()) == {"self"}
    assert terms(teaching("informed")) == {"self", "cross_modal"}
    assert terms(teaching("label", self_weight=0.0)) == {"label"}
    assert terms(teaching("fused", self_weight=0.0)) == {"fused"}
    assert terms(teaching("average", self_weight=0.0)) == {"average", "output"}
    assert terms(teaching("average", self_weight=0.0, average_weight=0.0)) == {"output"}
    off = {"label_weight": 0.0, "fused_weight": 0.0, "average_weight": 0.0}
    off |= {"average_output_weight": 0.0, "self_weight": 0.0, "cross_modal_weight": 0.0}
    none = teaching("all", "label", "fused", "average", **off)
    assert terms(none) == set()
    assert not none.distils_maps
    assert not none.taught_by_average


@pytest.mark.slow
def test_averaged_network_sees_what_is_withheld_and_learns_nothing():
    batch = tiny_batch()
    batch["available"] = batch["present"]
    batch["present"] = np.array([[True, False, True], [True, True, True]])
    network, params = init(tiny_config(), batch)
    average = init(tiny_config(), batch)[1]
    average = jax.tree.map(lambda leaf: 0.9 * leaf, average)
    config = teaching("average", self_weight=0.0)

    @jax.jit
    def found(average, batch):
        def total(params, average):
            return loss_fn(
                params, batch, jnp.asarray(1), network=network, config=config, average=average
            )

        gradients, metrics = jax.grad(total, (0, 1), has_aux=True)(params, average)
        seen = apply(network, average, batch["image"], batch["available"])
        own = apply(network, params, batch["image"], batch["present"])
        return gradients, metrics, seen.logits, own.logits

    (of_own, of_average), metrics, seen, own = found(average, batch)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_average))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(of_own))
    expected = oracles.output_distillation_loss(own, seen, [True, False])
    assert metrics["output_distillation_loss"] == pytest.approx(expected.mean(), rel=1e-3)
    everything = {**batch, "present": batch["available"]}
    _, metrics, _, _ = found(average, everything)
    assert metrics["output_distillation_loss"] == metrics["average_distillation_loss"] == 0


def test_examples_without_a_label_take_part_in_distillation_alone():
    batch = tiny_batch()
    config = dataclasses.replace(teaching("informed", "label", "fused"), region_over="batch")
    network, params = init(tiny_config(), batch)
    function = jax.jit(partial(loss_fn, network=network, config=config))
    found = {}
    for name, unknown in {"zeros": 0, "ones": 1}.items():
        batch["label"][1] = unknown
        batch["labelled"] = np.array([True, False])
        found[name] = function(params, batch, jnp.asarray(1))[1]
    assert found["zeros"] == found["ones"]
    one = {name: value[:1] for name, value in batch.items()}
    alone = jax.jit(partial(loss_fn, network=network, config=config))(params, one, jnp.asarray(1))[
        1
    ]
    for name in ("dice_loss", "cross_entropy_loss", "label_distillation_loss"):
        np.testing.assert_allclose(found["ones"][name], alone[name] / 2, rtol=1e-5)
    assert found["ones"]["fused_distillation_loss"] > alone["fused_distillation_loss"] / 2


def test_teachers_that_contradict_or_are_unknown_are_refused():
    with pytest.raises(ConfigError, match=r"all or informed, not both: .* Leave out one"):
        LossConfig(teachers=("all", "informed"))
    for teachers in (("nobody",), ("all", "all"), "all"):
        config = LossConfig()
        object.__setattr__(config, "teachers", teachers)
        with pytest.raises(
            ConfigError, match=r"tuple of different values of all, informed, label, fused, average"
        ):
            config.__post_init__()


def test_switched_off_distillation_leaves_nothing_in_the_program():
    batch = tiny_batch()
    # The exponent is one that appears nowhere else: x^2.5 is a power in the program.
    attention = AttentionConfig(exponent=2.5)
    base = dataclasses.replace(ALL_TERMS, correlation_weight=0.0, attention=attention)
    texts = {}
    for name, config in {
        "on": base,
        "off": dataclasses.replace(base, cross_modal_weight=0.0, self_weight=0.0, label_weight=0.0),
    }.items():
        state, step = make_step(tiny_config(fusion="concat"), config)
        texts[name] = jax.jit(step).lower(state, batch).as_text()
    # AdamW's bias correction takes powers of scalars; only attention takes them of arrays.
    powers = {
        name: sum(".power " in line and "tensor<f32>" not in line for line in text.splitlines())
        for name, text in texts.items()
    }
    assert powers["on"] > 0
    assert powers["off"] == 0


def test_keys_are_read_alike_whatever_generator_jax_is_set_to():
    state, step = make_step()
    with jax.default_prng_impl("rbg"):
        jax.eval_shape(step, state, tiny_batch())


@pytest.mark.slow
def test_keys_may_be_typed_and_give_the_same_step():
    state, step = make_step(augmentation=AugmentationConfig(), modality_dropout=0.5)
    batch = tiny_batch()
    words = jnp.asarray(batch["key"])
    typed = jax.vmap(partial(jax.random.wrap_key_data, impl="threefry2x32"))(words)
    results = [jax.jit(step)(state, {**batch, "key": key})[1] for key in (words, typed)]
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name], err_msg=name)


def test_a_batch_that_lacks_something_or_has_other_keys_is_refused():
    state, step = make_step()
    batch = tiny_batch()
    lacking = {name: value for name, value in batch.items() if name not in ("present", "key")}
    with pytest.raises(ConfigError, match="must hold image, label, present, key; got image, label"):
        step(state, lacking)
    for key in (batch["key"][:, 0], batch["key"].astype(np.int32)):
        with pytest.raises(ConfigError, match="for each example, or two uint32 words; got"):
            step(state, {**batch, "key": key})


@pytest.mark.slow
def test_kl_on_softmax_maps_tversky_and_focal_train_too():
    config = LossConfig(
        region="tversky",
        voxel="focal",
        distance="kl",
        attention=AttentionConfig(normalization="softmax", temperature=4.0),
        pairs=("adc->t2w",),
        stages=(0, 1),
    )
    state, step = make_step(loss=config)
    _, metrics = jax.jit(step)(state, tiny_batch())
    assert {"tversky_loss", "focal_loss"} <= set(metrics)
    assert np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_no_foreground_absent_modality_and_zero_image_give_finite_updates():
    batch = tiny_batch()
    batch["label"][0] = 0
    batch["present"][0, 1] = False
    batch["image"][1] = 0
    state, step = make_step()
    state, metrics = jax.jit(step)(state, batch)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state.params, metrics)))


def test_step_that_is_not_finite_changes_nothing_and_says_so():
    batch = tiny_batch()
    state, step = make_step(average_decay=0.9)
    step = jax.jit(step)
    made, metrics = step(state, batch)
    assert metrics["skipped"] == 0
    batch["image"][1, 0, 0, 0, 0] = np.nan
    kept, metrics = step(made, batch)
    assert metrics["skipped"] == 1
    assert not np.isfinite(metrics["loss"])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), kept, made)
    assert all(jax.tree.leaves(same))


def test_optimizer_on_one_array_of_all_weights_is_that_on_each():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
    keys = jax.random.split(jax.random.key(3), 6)
    zeros = {"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros(5), "d": jnp.zeros(())}}
    draw = iter(keys)
    params, gradient = (
        jax.tree.map(lambda leaf: jax.random.normal(next(draw), leaf.shape), zeros)
        for _ in range(2)
    )
    separate = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(config.schedule(10), weight_decay=config.weight_decay),
    )
    found, expected = params, params
    states = [optimizer.init(params) for optimizer in (config.optimizer(10), separate)]
    assert [leaf.shape for leaf in jax.tree.leaves(states[0]) if leaf.ndim] == [(18,), (18,)]
    for _ in range(4):
        updates, states[0] = config.optimizer(10).update(gradient, states[0], found)
        found = optax.apply_updates(found, updates)
        updates, states[1] = separate.update(gradient, states[1], expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    assert np.abs(found["a"] - params["a"]).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "nesterov"), [("adamw", False), ("adam", False), ("sgd", False), ("sgd", True)]
)
def test_optimizers_equal_the_oracle(kind, nesterov):
    config = OptimizerConfig(
        kind=kind,
        nesterov=nesterov,
        learning_rate=0.1,
        weight_decay=0.2,
        beta1=0.8,
        beta2=0.95,
        epsilon=0.01,
        momentum=0.7,
        clip_norm=1e6,
    )
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=5), rng.normal(size=(6, 5))
    optimizer, params = config.optimizer(6), {"a": jnp.asarray(start, jnp.float32)}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"a": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    rates = [float(config.schedule(6)(i)) for i in range(6)]
    expected = oracles.optimise(kind, start, gradients, rates, config)
    np.testing.assert_allclose(params["a"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", lambda i: 0.5 * (1 + np.cos(np.pi * (i - 10) / 90))),
        ("polynomial", lambda i: (1 - (i - 10) / 90) ** 2),
        ("steps", lambda i: 1.0 if i < 50 else 0.2 if i < 80 else 0.04),
        ("constant", lambda i: 1.0),
    ],
)
def test_learning_rate_rises_and_falls_as_its_formula_says(decay, expected):
    config = OptimizerConfig(
        learning_rate=3.0,
        warmup_fraction=0.1,
        decay=decay,
        decay_power=2.0,
        decay_milestones=(0.5, 0.8),
        decay_factor=0.2,
    )
    found = [float(config.schedule(100)(i)) for i in range(100)]
    np.testing.assert_allclose(found[:10], 3 * np.arange(10) / 10, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[10:], [3 * expected(i) for i in range(10, 100)], rtol=1e-4)


def test_milestones_that_are_no_shares_are_refused():
    with pytest.raises(ConfigError, match=r"between 0 and 1; got \(0.5, 80.0\). Use for example"):
        OptimizerConfig(decay_milestones=(0.5, 80.0))


def test_modality_dropout_keeps_one_and_adds_none():
    keys = jax.random.split(jax.random.key(0), 2000)
    present = jnp.tile(jnp.array([True, False, True]), (2000, 1))
    kept = drop_modalities(present, keys=keys, rate=0.5)
    assert not kept[:, 1].any()
    assert kept.any(-1).all()
    # Each is kept with probability 1/2 + 1/4 * 1/2 (the last survivor of an empty draw).
    np.testing.assert_allclose(kept[:, [0, 2]].mean(0), 0.625, atol=0.04)
    assert drop_modalities(present, keys=keys, rate=1.0).sum(-1).tolist() == [1] * 2000


@pytest.mark.slow
def test_batch_of_twins_gives_the_gradient_of_one():
    batch = tiny_batch(batch=1)
    twins = {name: np.concatenate([value, value]) for name, value in batch.items()}
    state, step = make_step()
    (_, one), (_, two) = jax.jit(step)(state, batch), jax.jit(step)(state, twins)
    np.testing.assert_allclose(one["gradient_norm"], two["gradient_norm"], rtol=1e-4)


def test_stage_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="distilled stages must be among"):
        LossConfig(stages=(0, 7)).distilled_stages(3)


def test_batch_not_divisible_by_devices_is_refused():
    with pytest.raises(
        ConfigError, match=r"got 6 and 4. Use --train.batch-size=8 or fewer devices"
    ):
        parallel.check_batch_size(6, 4)


FOUR_DEVICES = """
import dataclasses, jax, numpy as np, sys
from functools import partial
sys.path.insert(0, ".")
from cmsad_jax import parallel
from tests.networks import tiny_batch
from tests.test_training import ALL_TERMS, make_step
from cmsad_jax.augmentation import AugmentationConfig

assert len(jax.devices()) == 4
batch = tiny_batch(batch=4)
results = {}
for name, mode, devices in [
    ("one", "jit", jax.devices()[:1]), ("jit", "jit", None), ("pmap", "pmap", None)
]:
    loss = dataclasses.replace(
        ALL_TERMS, teachers=("all", "average"), region_over="batch", cross_modal_weight=0.1
    )
    state, step = make_step(
        loss=loss, average_decay=0.9, modality_dropout=0.3, augmentation=AugmentationConfig()
    )
    program = parallel.parallelize(step, mode=mode, devices=devices)
    state = program.place_state(state)
    losses = []
    for _ in range(3):
        state, metrics = program.step(state, program.place_batch(batch))
        losses.append(float(metrics["loss"]))
    results[name] = losses, jax.device_get(program.fetch_state(state).params)
for name in ("jit", "pmap"):
    # float32 sums in another order, three AdamW steps of 1e-2: 1e-4 relative
    np.testing.assert_allclose(results[name][0], results["one"][0], rtol=1e-4)
print("EQUAL", results["one"][0])
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives():
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "EQUAL" in done.stdout
