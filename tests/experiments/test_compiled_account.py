"""Reading compiled programs, and the chips that are not there."""

import jax
import pytest

from cmsad_jax.types import ConfigError
from experiments.process import chips
from experiments.process.chips import CHIPS, absent_devices, target_config
from experiments.settings.presets import PRESETS
from experiments.training.compiled import (
    Account,
    CompiledText,
    num_bytes,
    shapes_of_batch,
    shapes_of_state,
)
from experiments.training.memory import Estimate
from experiments.training.programs import compile_programs

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%moved (param_0: f32[4,8]) -> f32[8,4] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  ROOT %transpose.1 = f32[8,4]{0,1} transpose(%param_0), dimensions={1,0}
}

%multiplied (param_0.1: bf16[4,8], param_1: bf16[8,4]) -> f32[4,4] {
  %param_0.1 = bf16[4,8]{1,0} parameter(0)
  %param_1 = bf16[8,4]{1,0} parameter(1)
  %inner = bf16[8,4]{1,0} fusion(%param_1), kind=kLoop, calls=%cast
  ROOT %convolution.1 = f32[4,4]{1,0} convolution(%param_0.1, %inner), dim_labels=bf_io->bf
}

%cast (param_0.2: bf16[8,4]) -> bf16[8,4] {
  %param_0.2 = bf16[8,4]{1,0} parameter(0)
  ROOT %exponential.1 = bf16[8,4]{1,0} exponential(%param_0.2)
}

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %gte = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %fusion.1 = f32[8,4]{0,1} fusion(%gte), kind=kLoop, calls=%moved, backend_config={"estimated_cycles":"100"}
  ROOT %tuple.1 = (s32[], f32[4,8]{1,0}) tuple(%gte, %fusion.1)
}

%condition (carry.1: (s32[], f32[4,8])) -> pred[] {
  %carry.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: bf16[4,8], b: bf16[8,4], table: f32[1000], where: s32[6,1]) -> f32[4,4] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %table = f32[1000]{0} parameter(2)
  %where = s32[6,1]{1,0} parameter(3)
  %fusion.2 = f32[4,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%multiplied, backend_config={"estimated_cycles":"7000"}
  %gather.1 = f32[6]{0} gather(%table, %where), offset_dims={}, slice_sizes={1}
  %all-reduce-start.1 = f32[4,4]{1,0} all-reduce-start(%fusion.2), channel_id=1, to_apply=%sum, backend_config={"estimated_cycles":"2000"}
  %all-reduce-done.1 = f32[4,4]{1,0} all-reduce-done(%all-reduce-start.1)
  %while.1 = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %tanh.1 = f32[4,4]{1,0} tanh(%all-reduce-done.1), backend_config={"estimated_cycles":"500"}
}
"""  # noqa: E501


def test_bytes_of_a_type_are_those_of_its_arrays():
    assert num_bytes("f32[2,3]{1,0:T(8,128)}") == 24
    assert num_bytes("(bf16[4]{0}, (pred[3]{0}, f32[]), u32[]{:S(2)})") == 8 + 3 + 4 + 4


def test_what_is_executed_is_counted_loops_as_often_as_they_run():
    text = CompiledText(TEXT)
    assert text.cycles() == {"convolution": 7000, "collective": 2000, "copy": 500, "other": 500}
    assert text.collectives() == {"all-reduce": 64}
    assert text.gathers() == 6
    fusion, loop, gather, tanh = 2 * 64 + 64, 5 * (128 + 128), 4000 + 24 + 24, 128
    assert text.accessed_bytes() == fusion + loop + gather + 128 + tanh


def test_the_roofline_is_the_longer_of_both_and_what_passes_between_chips():
    found = Account(Estimate(0, 0), 2 * 197e12, 819e9, {"all-reduce": 200e9}, 0, {"copy": 1})
    chip = CHIPS["v5e"]
    assert found.roofline_s(chip, 1) == pytest.approx(2.0)
    assert found.roofline_s(chip, 4) == pytest.approx(2.0 + 2 * 0.75)
    assert found.copies == 1.0
    slow = Account(Estimate(0, 0), 197e12, 3 * 819e9, {}, 0, {})
    assert slow.roofline_s(chip, 1) == pytest.approx(3.0)
    assert slow.copies is None


def test_gpus_beyond_a_host_are_reached_over_the_network():
    chip = CHIPS["h100"]
    assert chip.link(8) == chip.link_bytes_per_s
    assert chip.link(16) == chips.NETWORK_BYTES_PER_S


@pytest.mark.parametrize("name", list(CHIPS))
def test_each_chip_is_described_whole(name):
    chip = CHIPS[name]
    assert chip.memory_bytes > 2**33
    assert chip.peak_per_s > 1e14
    if chip.platform == "cuda":
        text = target_config(chip)
        assert text.count("{") == text.count("}")
        assert f"device_memory_size: {round(chip.memory_bytes)}" in text
    else:
        assert {count for count in chip.slices if count > 1} == {4, 8, 16, 32, 64, 128, 256}
        sides = {count: name.split("x") for count, name in chip.slices.items() if count > 1}
        for count, side in sides.items():
            product = 1
            for length in side:
                product *= int(length)
            assert product == count


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("v9", 1, "chip must be one of v5e, v5p, v6e, a100-40, a100-80, h100, h200; got 'v9'"),
        ("v5e", 0, "number of chips must be 1 to 256"),
        ("v5e", 512, "got 512. Use --chips=16"),
        ("h100", 12, "of GPUs beyond a host a multiple of 8; got 12"),
    ],
)
def test_a_chip_that_cannot_be_meant_is_refused(name, count, said):
    with pytest.raises(ConfigError, match=said):
        absent_devices(name, count)


@pytest.mark.parametrize(
    ("name", "said"), [("v5p", "jax.tpu.=="), ("a100-80", "jax-cuda13-plugin==")]
)
def test_a_missing_compiler_is_named_with_what_brings_it(name, said, monkeypatch):
    monkeypatch.setattr(chips, "has_compiler", lambda platform: False)
    with pytest.raises(ConfigError, match=f"{name} need its compiler.*{said}"):
        absent_devices(name, 1)


def test_shapes_of_a_run_are_those_that_it_makes():
    config = PRESETS["small"]
    programs = compile_programs(config, jax.devices()[:1])
    made = programs.init(jax.random.key(0))
    shapes = shapes_of_state(config)
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    assert all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(made), strict=True)
    )
    batch = shapes_of_batch(config, 4, 3)
    assert batch["image"].shape == (3, 4, *config.train.crop, 3)
    assert batch["label"].shape == (3, 4, *config.train.crop)
