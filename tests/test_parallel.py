"""One step, many ways to run it: each gives the losses of one device.

Float32 sums come in another order and AdamW divides by small moments: 1e-3 relative after three
steps of 1e-2, where a lost or doubled gradient changes the losses by tens of percent.
"""

import dataclasses
import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax import parallel
from cmsad_jax.modules import CMSAD, Encoder
from cmsad_jax.modules.network import apply
from cmsad_jax.training import LossConfig, train_steps
from cmsad_jax.types import ConfigError
from tests.networks import TINY_3D, random_params, tiny_batch, tiny_config
from tests.processes import start_two
from tests.test_training import make_step

TWO_STAGES = dataclasses.replace(
    TINY_3D,
    channels=TINY_3D.channels[:2],
    kernels=TINY_3D.kernels[:2],
    strides=TINY_3D.strides[:2],
    blocks=(1, 1),
)
SMALL = dataclasses.replace(
    tiny_config(fusion="concat", modalities=("t2w", "adc"), deep_supervision=0), encoder=TWO_STAGES
)
CROSS_MODAL = LossConfig(self_weight=0.0, warmup_steps=0)
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


def small_step(dtype="float32", **options):
    config = dataclasses.replace(SMALL, dtype=dtype)
    return make_step(config, CROSS_MODAL, average_decay=0.9, modality_dropout=0.3, **options)


def batches(count=3, batch=4):
    return [tiny_batch(batch=batch, modalities=2, seed=seed) for seed in range(count)]


def losses_of(step, state, given):
    losses = []
    for batch in given:
        state, metrics = step(state, batch)
        losses.append(np.asarray(metrics["loss"]))
    return np.array(losses), state


@pytest.fixture(scope="module")
def alone():
    """Losses of three steps of the whole batch on one device."""
    state, step = small_step()
    step = jax.jit(step)
    losses, _ = losses_of(step, state, batches())
    assert step._cache_size() == 1, "one compilation for the run"
    return losses


@pytest.mark.parametrize(
    ("parts", "rolled"), [pytest.param(4, False, marks=pytest.mark.slow), (2, True)]
)
def test_accumulated_gradients_are_those_of_the_whole_batch(alone, parts, rolled):
    state, step = small_step(accumulation=parts, rolled=rolled)
    losses, _ = losses_of(jax.jit(step), state, batches())
    np.testing.assert_allclose(losses, alone, **TOLERANCE)


def test_a_batch_that_cannot_be_cut_is_refused():
    state, step = small_step(accumulation=3)
    with pytest.raises(ConfigError, match=r"divisible by train.accumulation; got 4 and 3. Use"):
        step(state, tiny_batch(batch=4, modalities=2))


def test_an_unknown_mode_is_refused_also_where_types_are_not_checked():
    with pytest.raises(ConfigError, match=r"mode must be jit or pmap; got 'pjit'\. Use mode='jit'"):
        inspect.unwrap(parallel.parallelize)(lambda state, batch: (state, batch), mode="pjit")


def test_several_steps_in_one_program(alone):
    state, step = small_step()
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches())
    state, metrics = jax.jit(lambda s, b: train_steps(s, b, step=step))(state, stacked)
    np.testing.assert_allclose(metrics["loss"], alone, **TOLERANCE)
    assert int(state.step) == 3


def test_rematerialisation_keeps_less_for_the_gradient_and_changes_nothing():
    image = jnp.asarray(tiny_batch()["image"][..., :1])
    params = random_params(Encoder(TWO_STAGES), image)
    gradients, kept = {}, {}
    for remat in (False, True):
        module = Encoder(TWO_STAGES, rematerialize=remat)

        def total(params, module=module):
            return sum(jnp.square(x).mean() for x in module.apply({"params": params}, image))

        gradients[remat] = jax.jit(jax.grad(total))(params)
        residuals = jax.eval_shape(lambda params, total=total: jax.vjp(total, params)[1], params)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    for plain, again in zip(*map(jax.tree.leaves, gradients.values()), strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-3, atol=1e-5)
    assert kept[True] < 0.5 * kept[False]


def test_bfloat16_computes_only_where_it_should():
    config = dataclasses.replace(tiny_config(modalities=("t2w", "adc")), dtype="bfloat16")
    batch = tiny_batch(modalities=2)
    state, step = make_step(config)
    new, metrics = jax.eval_shape(step, state, batch)
    floats = [x for x in jax.tree.leaves((new, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}

    def outputs(state):
        output = apply(CMSAD(config), state.params, batch["image"])
        return output.features, (output.logits, output.gates)

    features, precise = jax.eval_shape(outputs, state)
    assert {f.dtype for f in jax.tree.leaves(features)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(precise)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_one_device_takes_several_folds_stacked(alone):
    state, step = small_step()
    folds = parallel.parallelize_folds(step, num_folds=2, devices=jax.devices()[:1])
    other = jax.tree.map(lambda x: x * (1.1 if x.dtype == jnp.float32 else 1), state)
    placed = folds.place_state([state, other])
    losses, placed = losses_of(folds.step, placed, [folds.place_batch([b, b]) for b in batches()])
    np.testing.assert_allclose(losses[:, 0], alone, **TOLERANCE)
    in_turn, _ = losses_of(jax.jit(step), other, batches())
    np.testing.assert_allclose(losses[:, 1], in_turn, **TOLERANCE)
    assert [int(fold.step) for fold in folds.fetch_state(placed)] == [3, 3]


EIGHT_DEVICES = """
import re
import jax, numpy as np
from cmsad_jax import parallel
from tests.test_parallel import TOLERANCE, batches, losses_of, small_step

assert len(jax.devices()) == 8
given = batches(2, 8)
state, step = small_step()
one, _ = losses_of(jax.jit(step), state, given)
for mode in ("jit", "pmap"):
    program = parallel.parallelize(step, mode=mode)
    placed = map(program.place_batch, given)
    losses, _ = losses_of(program.step, program.place_state(small_step()[0]), placed)
    np.testing.assert_allclose(losses, one, **TOLERANCE)

# The gradients are summed once, and in float32 whatever the network computes in.
state, step = small_step(dtype="bfloat16")
program = parallel.parallelize(step)
text = program.step.lower(program.place_state(state), program.place_batch(given[0])).as_text()
sums = re.findall(r"stablehlo.all_reduce.*?}\\) : \\(tensor<(.*?)>\\)", text, re.DOTALL)
num_weights = sum(x.size for x in jax.tree.leaves(state.params))
assert "bf16" in text
assert sorted(set(sums)) == [f"{num_weights}xf32", "f32"], sums
assert sums.count(f"{num_weights}xf32") == 1, sums

state, step = small_step()
folds = parallel.parallelize_folds(step, num_folds=2)
both = [[b, jax.tree.map(lambda x: x[::-1], b)] for b in given]
placed = map(folds.place_batch, both)
losses, state = losses_of(folds.step, folds.place_state([small_step()[0]] * 2), placed)
np.testing.assert_allclose(losses, np.stack([one, one], 1), **TOLERANCE)
for fold in folds.fetch_state(state):
    assert int(fold.step) == 2
    assert {d for x in jax.tree.leaves(fold) for d in x.devices()} == {jax.devices()[0]}
print("EQUAL")
"""

TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
process = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=process)
import numpy as np
from cmsad_jax import parallel
from tests.test_parallel import batches, losses_of, small_step

assert (len(jax.devices()), len(jax.local_devices())) == (4, 2)
state, step = small_step()
program = parallel.parallelize(step)
shares = [jax.tree.map(lambda x: x[2 * process : 2 * process + 2], b) for b in batches()]
losses, _ = losses_of(program.step, program.place_state(state), map(program.place_batch, shares))
print("LOSSES", *losses)
"""


def environment(num_devices):
    flags = f" --xla_force_host_platform_device_count={num_devices}"
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_eight_devices_and_folds_on_halves_of_them():
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        env=environment(8),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "EQUAL" in done.stdout


@pytest.mark.slow
def test_two_processes_with_two_devices_each(alone):
    running = start_two(TWO_PROCESSES, environment=environment(2))
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        found = [float(word) for word in out.split("LOSSES")[1].split()]
        np.testing.assert_allclose(found, alone, **TOLERANCE)
