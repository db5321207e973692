import dataclasses
import json
from pathlib import Path

import pytest

from cmsad_jax.types import ConfigError
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.prostate158.options import Prostate158Options
from experiments.process import accelerator, console
from experiments.settings.command_line import complete, parse, without_effect
from experiments.settings.config import Config, TrainConfig
from experiments.settings.presets import PRESETS
from experiments.settings.stored import differences, from_json, to_json


def test_presets_are_consistent_and_become_json():
    for preset in PRESETS.values():
        json.dumps(to_json(complete(preset)))


def test_options_override_the_preset():
    config = parse(
        ["--preset=slice2d", "--train.steps=7", "--data.modalities", "t2w", "adc", "--folds", "0"]
    )
    assert config.preset == "slice2d"
    assert config.network.encoder.rank == 2
    assert config.train.steps == 7
    assert config.folds == (0,)
    assert config.network.modalities == ("t2w", "adc")
    assert config.output == Path("runs/slice2d-phantom-lesion-t2w+adc")


def test_options_of_a_data_set_are_read_under_their_older_names():
    with pytest.warns(FutureWarning, match="--data.seed is --data.phantom.seed now"):
        config = parse(["--data.seed=3", "--seed=5"])
    assert config.data.phantom.seed == 3
    assert config.seed == 5
    values = to_json(config)
    values["data"] |= {"num_cases": 7, "seed": 3, "reader": 2}
    del values["data"]["phantom"], values["data"]["prostate158"]
    data = from_json(Config, values).data
    assert (data.phantom, data.prostate158) == (PhantomOptions(7, 3), Prostate158Options(2))


def test_zones_need_three_outputs():
    assert parse(["--data.target=zones"]).network.num_classes == 3
    assert parse(["--data.target=gland"]).network.num_classes == 1


def test_differences_name_fields_and_pass_over_where_it_runs():
    old = complete(PRESETS["small"])
    new = dataclasses.replace(
        old, accelerator="cpu", folds=(1,), train=dataclasses.replace(old.train, steps=9)
    )
    assert differences(to_json(old), to_json(new)) == [f"train.steps: {old.train.steps} -> 9"]


def test_run_stored_with_one_teacher_is_one_with_several_today():
    stored = to_json(parse(["--loss.teachers=informed"]))
    assert stored["loss"]["teachers"] == ["informed"]
    stored["loss"]["teachers"] = "informed"
    for name in ("label_weight", "reduction", "region_over"):
        del stored["loss"][name]
    loaded = from_json(Config, stored)
    assert loaded.loss.teachers == ("informed",)
    assert differences(to_json(loaded), to_json(parse(["--loss.teachers", "informed"]))) == []
    assert parse(["--loss.teachers", "label", "all"]).loss.teachers == ("label", "all")


def test_run_stored_before_others_could_teach_has_modalities_alone():
    stored = to_json(parse([]))
    assert stored["loss"].pop("teachers") == ["label", "all"]
    assert from_json(Config, stored).loss.teachers == ("all",)


def test_attention_across_slices_was_otherwise_before_its_settings_were_there():
    """And a run without it is continued, though it was stored without them."""
    for kind, onward in (("none", False), ("csam", True)):
        config = complete(parse([f"--network.encoder.slices={kind}"]))
        stored = to_json(config)
        attention = stored["network"]["encoder"]["slice_attention"]
        assert (attention.pop("onward"), attention.pop("opening")) == (False, 3.0)
        read = from_json(Config, stored)
        assert read.network.encoder.slice_attention.onward is onward
        assert (differences(to_json(read), to_json(config)) == []) is not onward


def test_unknown_option_ends_with_status_2_and_says_which(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--train.stepz=5"])
    assert stopped.value.code == 2
    assert "stepz" in capsys.readouterr().err


SMALL = PRESETS["small"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: parse(["--preset", "huge"]),
            "preset must be one of auto, small, light, volume3d, slice2d",
        ),
        (
            lambda: complete(
                dataclasses.replace(
                    SMALL, train=dataclasses.replace(SMALL.train, crop=(24, 48, 48))
                )
            ),
            r"got crop \(24, 48, 48\) and volume \(20, 48, 48\)",
        ),
        (
            lambda: complete(
                dataclasses.replace(
                    PRESETS["slice2d"],
                    train=dataclasses.replace(PRESETS["slice2d"].train, crop=(4, 64, 64)),
                )
            ),
            "crops of depth 1",
        ),
        (
            lambda: parse(["--preset=slice2d", "--network.encoder.slices=cat"]),
            r"got \(1, 192, 192\) and network.encoder.slices cat. Use --train.crop 20 192 192, or",
        ),
        (
            lambda: complete(
                dataclasses.replace(
                    SMALL,
                    data=DataConfig(preprocess=PreprocessConfig(size=(4, 8, 8))),
                    train=TrainConfig(crop=(1, 4, 4)),
                )
            ),
            "must keep more than one voxel",
        ),
        (
            lambda: parse(["--predict.mask-from=distance"]),
            "got --predict.mask-from=distance and no distance. Use --network.distance-clip-mm=15",
        ),
        (lambda: complete(dataclasses.replace(SMALL, folds=(5,))), "folds must be among 0 to 4"),
        (
            lambda: complete(dataclasses.replace(SMALL, deterministic=True, parallel="pmap")),
            "got --deterministic=True and --parallel=pmap. Use --parallel=jit",
        ),
        (
            lambda: parse(["--loss.teachers", "label", "average"]),
            r"what is withheld from the student; got .*Use --train.modality-dropout=0.3, or other",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("option", "bad", "good", "message"),
    [
        (
            "train.steps",
            "0",
            "1",
            r"train\.steps must be at least 1; got 0\. Use --train\.steps=",
        ),
        ("num-folds", "0", "2", "num-folds must be at least 1; got 0"),
        ("num-folds", "999", "998", "takes fewer than 999 folds; got 999. Use --num-folds=5"),
        ("num-folds", "1", "2", "needs at least 2 folds; got 1 and no file of one split. Use"),
        ("seed", "-1", "0", r"seed must be at least 0; got -1\. Use --seed=0, the default"),
        ("train.optimizer.learning-rate", "0", "1e-9", "learning-rate must be above 0; got 0.0"),
        ("train.optimizer.learning-rate", "nan", "1", "learning-rate must be above 0; got nan"),
        ("train.foreground-share", "1.1", "1", "foreground-share must be from 0 to 1; got 1.1"),
        ("train.unlabelled", "1", "0.9", "unlabelled must be at least 0 and below 1; got 1.0"),
        ("predict.overlap", "1", "0.99", "overlap must be at least 0 and below 1; got 1.0"),
        ("predict.threshold", "1", "0.9", "threshold must be between 0 and 1; got 1.0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(option, bad, good, message):
    assert parse([f"--{option}={good}"])
    with pytest.raises(ConfigError, match=message):
        parse([f"--{option}={bad}"])


@pytest.mark.parametrize(
    "raised", [RuntimeError("Unable to initialize backend 'tpu'"), AssertionError()]
)
def test_missing_accelerator_is_named_with_a_remedy(raised, monkeypatch):
    def none_found():
        raise raised  # an assertion: JAX without the plugin

    monkeypatch.setattr(accelerator.jax, "devices", none_found)
    monkeypatch.setattr(accelerator.jax.config, "update", lambda name, value: None)
    with pytest.raises(ConfigError, match=r"got --accelerator=tpu.*Use --accelerator=auto"):
        accelerator.select_accelerator("tpu")


def test_an_accelerator_is_not_exchanged_for_what_the_process_began_with(monkeypatch):
    assert accelerator.jax.devices()[0].platform == "cpu"
    monkeypatch.setattr(accelerator.jax.config, "update", lambda name, value: None)
    with pytest.raises(ConfigError, match="--accelerator=gpu where JAX has already begun on cpu"):
        accelerator.select_accelerator("gpu")


def test_user_mistake_ends_without_traceback(capsys):
    def main():
        raise ConfigError("rule; got x. Do y.")

    with pytest.raises(SystemExit) as stopped:
        console.run_main(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: rule; got x. Do y.\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], []),
        (["--predict.draws=3"], ["predict.draws has no effect, as no attention across slices"]),
        (
            ["--predict.distance-width-mm=2"],
            ["predict.distance_width_mm has no effect, as predict.mask_from is probability."],
        ),
        (
            ["--data.target=zones", "--predict.threshold=0.4"],
            ["predict.threshold has no effect, as there are several classes"],
        ),
        (
            [
                "--network.distance-clip-mm=15",
                "--predict.mask-from=distance",
                "--predict.distance-width-mm=2",
            ],
            [],
        ),
    ],
)
def test_settings_of_prediction_without_effect_are_said(options, said):
    found = without_effect(parse(options))
    assert len(found) == len(said)
    for sentence, words in zip(found, said, strict=True):
        assert sentence.startswith(words)
