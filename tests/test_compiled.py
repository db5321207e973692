"""What the compilers of accelerators make of the train step, on a machine that has none.

In an environment of its own, ``pip install "jax[tpu]"`` and ``pip install --no-deps
jax-cuda13-plugin jax-cuda13-pjrt``, each in the version of JAX; then ``JAX_PLATFORMS=cpu python -m
pytest -m compile``. Where a compiler is
not installed, its tests are skipped.
"""

import dataclasses
import re

import jax
import pytest

from cmsad_jax.modules import EncoderConfig
from experiments.process import chips
from experiments.process.chips import absent_devices, has_compiler
from experiments.settings.presets import PRESETS
from experiments.training.compiled import shapes_of_batch, shapes_of_state
from experiments.training.programs import compile_programs

pytestmark = pytest.mark.compile

CHIPS = {"v5e": 16, "h100": 4}

# Of a step of two examples a chip, beside arguments and results.
MOST_TEMPORARY_BYTES = {"v5e": 40e6, "h100": 40e6}


def devices(chip):
    """Absent ones, as many as ``CHIPS`` says."""
    if not has_compiler(chips.CHIPS[chip].platform):
        pytest.skip(f"the compiler for {chip} is not installed")
    return absent_devices(chip, CHIPS[chip])


def two_stages(count):
    """The small preset with two stages and modalities, in bfloat16, two examples a device."""
    config, names = PRESETS["small"], ("t2w", "adc")
    encoder = EncoderConfig(
        channels=(8, 16),
        kernels=((1, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (2, 2, 2)),
        blocks=(1, 1),
    )
    return dataclasses.replace(
        config,
        network=dataclasses.replace(
            config.network, modalities=names, dtype="bfloat16", encoder=encoder
        ),
        data=dataclasses.replace(config.data, modalities=names),
        train=dataclasses.replace(config.train, crop=(8, 32, 32), batch_size=2 * count),
    )


@pytest.fixture(scope="module", params=list(CHIPS))
def compiled(request):
    """The chip, the shapes of the state, and the compiled step."""
    chip = request.param
    config = two_stages(CHIPS[chip])
    state = shapes_of_state(config)
    batch = shapes_of_batch(config, config.train.batch_size)
    traced = compile_programs(config, devices(chip)).step.step.trace(state, batch)
    platform = chips.CHIPS[chip].platform
    return chip, state, traced.lower(lowering_platforms=(platform,)).compile()


def test_gradients_are_summed_over_devices_once_and_in_float32(compiled):
    _, state, step = compiled
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", step.as_text())
    assert len(sums) == 1
    arrays = re.findall(r"\b(\w+)\[(\d*)\]", sums[0])
    assert {name for name, _ in arrays} == {"f32"}
    num_weights = sum(x.size for x in jax.tree.leaves(state.params))
    # Some compilers put the few metrics into the same array.
    assert num_weights <= max(int(size or 1) for _, size in arrays) < num_weights + 20


def test_the_state_is_donated(compiled):
    _, state, step = compiled
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes >= size


def test_temporaries_stay_below_their_ceiling(compiled):
    chip, _, step = compiled
    assert step.memory_analysis().temp_size_in_bytes < MOST_TEMPORARY_BYTES[chip]


def test_convolutions_are_bfloat16(compiled):
    _, _, step = compiled
    lines = [
        line
        for line in step.as_text().splitlines()
        if re.search(r"= .* (convolution|custom-call)\(", line)
        and "conv_general_dilated" in line
        and "/gate/" not in line  # of float32 correlations
        and "/head" not in line  # of float32 logits
    ]
    half = [line for line in lines if "bf16[" in line.split("metadata")[0]]
    assert len(lines) > 20
    assert len(half) > 0.8 * len(lines)
