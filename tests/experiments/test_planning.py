"""Plans: a test for each rule, on made fingerprints, and what a plan is as a file and in a run."""

import dataclasses
import json
import math

import numpy as np
import pytest

from cmsad_jax.types import ConfigError
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.preparing.fingerprint import Fingerprint
from data_pipelines.serving import loading, splits
from experiments import plan as command
from experiments.planning import (
    chips,
    configure,
    forecast,
    planner,
    record,
    rules,
    scale,
    survey,
)
from experiments.planning.chips import CHIPS
from experiments.planning.rules import Known
from experiments.run_folder import RunFolder
from experiments.settings import command_line
from experiments.settings.config import Config
from experiments.settings.presets import PRESETS
from experiments.training.compiled import Account
from experiments.training.memory import GIB, Estimate
from tests.data_pipelines.fabricate import raw_case, write_folder
from tests.experiments import fingerprints as made

CPU = chips.Target("cpu", "cpu", 12.0)
DEVICES = {"cpu": CPU, "16": CHIPS["t4"], "80": CHIPS["a100-80"], "141": CHIPS["h200"]}
SETS = {
    name: getattr(made, name.upper())
    for name in ("picai", "prostate158", "decathlon", "brats", "cine", "slices", "huge", "tiny")
} | {"three": made.THREE}


def asked_for(fingerprint: Fingerprint) -> Config:
    target = "zones" if len(fingerprint.cases[0].class_ml) == 2 else "lesion"
    data = DataConfig(modalities=fingerprint.cases[0].modalities, target=target)
    return dataclasses.replace(PRESETS["auto"], data=data)


def plan_of(fingerprint, device=CPU, given=None, compiled=None):
    asked = asked_for(fingerprint)
    folds = survey.folds_of(asked, fingerprint, given or {})
    return planner.make(fingerprint, folds, asked, given or {}, device, compiled)


def known_of(fingerprint, device=CPU, **values) -> Known:
    asked = asked_for(fingerprint)
    folds = survey.folds_of(asked, fingerprint, {})
    training = [fingerprint.of(folds.training(fold)) for fold in range(len(folds))]
    return Known(
        fingerprint.cases, training, asked.data.classes, asked.data.modalities, device, values
    )


def changed(fingerprint, case: int, **changes) -> Fingerprint:
    cases = list(fingerprint.cases)
    cases[case] = dataclasses.replace(cases[case], **changes)
    return Fingerprint(tuple(cases))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETS)
def test_every_plan_is_a_configuration_that_fits(name, device):
    fingerprint, target = SETS[name], DEVICES[device]
    plan = plan_of(fingerprint, target)
    config = command_line.complete(record.applied(plan.base, plan.values, asked_for(fingerprint)))
    assert config.preset == "auto"
    assert config.network.num_classes == config.data.num_classes
    needed = scale.step_bytes(config, target.platform)
    assert needed <= planner.SHARE * target.memory_gib * GIB
    assert plan.trials[-1].fits
    assert plan.trials[-1].gib == pytest.approx(needed / GIB, abs=0.01)
    assert all(line.rule and line.fact and line.basis for line in plan.lines)


def test_two_plans_of_the_same_data_are_the_same():
    assert plan_of(made.THREE, CHIPS["t4"]) == plan_of(made.THREE, CHIPS["t4"])


def test_picai_is_planned_as_prostates_are():
    values = plan_of(made.PICAI, CHIPS["a100-80"]).values
    assert values["data.preprocess.spacing_mm"] == [3.0, 0.5, 0.5]
    # 1.5 times the targets' 2 x 45 mm is 135: 160 mm; 1.5 x 2 x 36 is more than the 63 of a view
    assert values["data.preprocess.size"] == [24, 320, 320]
    assert values["train.crop"] == [24, 320, 320]
    assert values["network.encoder.strides"] == [
        [1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2],
    ]  # fmt: skip
    assert values["network.encoder.kernels"][:3] == [[1, 3, 3], [1, 3, 3], [3, 3, 3]]
    assert values["network.encoder.channels"] == [32, 64, 128, 256, 320, 320]
    assert values["data.preprocess.scales"] == ["adc=1200/500"]
    assert values["num_folds"] == 5


def test_less_memory_gives_smaller_crops_and_more_gives_larger_batches():
    plans = [plan_of(made.PICAI, DEVICES[name]).values for name in ("16", "80", "141")]
    voxels = [math.prod(plan["train.crop"]) for plan in plans]
    batches = [plan["train.batch_size"] for plan in plans]
    assert voxels[0] < voxels[1] == voxels[2]
    assert 2 == batches[0] < batches[1] < batches[2]


def test_isotropic_brains_stride_along_all_axes_and_are_cut_to_the_head():
    values = plan_of(made.BRATS, CHIPS["a100-80"]).values
    assert values["data.preprocess.spacing_mm"] == [1.0, 1.0, 1.0]
    assert values["data.preprocess.size"] == [160, 192, 192]  # head of 144 x 148 x 180 mm
    assert set(map(tuple, values["network.encoder.strides"][1:])) == {(2, 2, 2)}
    assert set(map(tuple, values["network.encoder.kernels"])) == {(3, 3, 3)}
    assert values["data.preprocess.scales"] == []


def test_single_slices_get_a_network_of_slices():
    for device in (CPU, CHIPS["t4"]):
        values = plan_of(made.SLICES, device).values
        assert values["data.preprocess.size"][0] == values["train.crop"][0] == 1
        assert {len(kernel) for kernel in values["network.encoder.kernels"]} == {2}
    assert plan_of(made.SLICES).values["train.batch_size"] == 16


def test_target_larger_than_the_crop_is_said():
    """A target of 100 mm, voxels of 0.5 mm: 16 GB work on it in parts, or not at all whole."""
    fingerprint = made.HUGE
    plan = plan_of(fingerprint, CHIPS["t4"])
    sides = np.array(plan.values["train.crop"]) * plan.values["data.preprocess.spacing_mm"]
    assert (sides >= 96).all()
    assert plan.values["train.accumulation"] == 2
    small = plan_of(fingerprint, dataclasses.replace(CHIPS["t4"], memory_gib=8))
    assert small.values["train.accumulation"] > 1 or small.notes
    none = plan_of(fingerprint, CHIPS["t4"], {"train.crop": (64, 64, 64)})
    assert "10 of 10 targets are larger than the crop" in none.notes[0]


def test_three_patients_have_three_folds():
    assert plan_of(made.THREE).values["num_folds"] == 3
    with pytest.raises(DataError, match="patients to train on and others to validate; got 1"):
        plan_of(made.made(1, spacing=(3, 1, 1), size=(20, 100, 100)))


def test_data_without_any_target_are_not_planned_for(tmp_path):
    write_folder(tmp_path / "data", *(raw_case(f"c{n}", positive=False) for n in range(2)))
    words = [f"--data.path={tmp_path / 'data'}", f"--data.cache={tmp_path / 'cache'}"]
    with pytest.raises(DataError, match=r"holds the target lesion; got none among 2. Look at"):
        configure.configure(words)


# One rule each ----------------------------------------------------------------------------------


def test_grid_is_the_field_of_view_where_no_target_is_known():
    """Not the least side, which would hold all of none."""
    known = known_of(made.made(3, spacing=(3.0, 1.0, 1.0), size=(20, 96, 96), positive=0))
    decision = rules.size(
        dataclasses.replace(known, values={"data.preprocess.spacing_mm": (3.0, 2.0, 2.0)})
    )
    assert decision.value == (20, 48, 48)
    assert decision.basis == "all cases"


def test_thick_slices_are_not_interpolated_and_cpus_take_coarser_pixels():
    cases = [dataclasses.replace(case, spacing_mm=(mm, 0.5, 0.5)) for case, mm in zip(
        made.THREE.cases, (3.0, 3.0, 3.6), strict=True)]  # fmt: skip
    fingerprint = Fingerprint(tuple(cases))
    decision = rules.spacing_mm(known_of(fingerprint, CHIPS["t4"]))
    assert decision.value == (3.0, 0.5, 0.5)
    assert "10th percentile" in decision.rule
    assert decision.basis == "all cases"
    assert decision.fact == "median 3 0.5 0.5 mm of 3 cases"
    decision = rules.spacing_mm(known_of(made.THREE))
    assert decision.value == (3.0, 2.0, 2.0)  # 96 mm hold 1.5 x 2 x 30
    assert decision.basis == "training patients"


def test_grid_goes_by_the_field_of_view_where_folds_disagree():
    known = known_of(made.THREE, CHIPS["t4"], **{"data.preprocess.spacing_mm": (3.0, 0.5, 0.5)})
    assert rules.size(known).value == (20, 192, 192)
    # without the one patient whose target reaches far, 96 mm would do; with, 160
    far = changed(made.THREE, 1, reach_mm=(20.0, 50.0, 30.0))
    known = known_of(far, CHIPS["t4"], **{"data.preprocess.spacing_mm": (3.0, 0.5, 0.5)})
    decision = rules.size(known)
    assert decision.value == (20, 320, 320)
    assert "disagree" in decision.fact


def test_adc_keeps_its_unit_only_where_it_is_right():
    assert rules.scales(known_of(made.PICAI)).value == ("adc=1200/500",)
    other = {"adc": (0.0002, 0.0013, 0.0026)}  # mm2/s
    wrong = Fingerprint(
        tuple(dataclasses.replace(c, intensity={**c.intensity, **other}) for c in made.THREE.cases)
    )
    assert rules.scales(known_of(wrong)).value == ()
    # one of three: two folds train on it, one does not, and the folds disagree
    one = changed(made.THREE, 0, intensity={**made.THREE.cases[0].intensity, **other})
    assert rules.scales(known_of(one)).value == ()
    assert rules.scales(known_of(made.BRATS)).value == ()


def test_a_validation_patient_moves_no_statistic_of_its_own_fold():
    """All that a fold is given follows from others' intensities and targets."""
    fingerprint, device = made.PROSTATE158, CHIPS["t4"]
    asked = asked_for(fingerprint)
    folds = survey.folds_of(asked, fingerprint, {})
    plan = planner.make(fingerprint, folds, asked, {}, device)
    alone = splits.Folds((folds.validation[0], folds.training(0)))
    cases = {case.case_id: case for case in fingerprint.cases}
    for case_id in folds.validation[0]:
        if cases[case_id].positive:
            cases[case_id] = dataclasses.replace(
                cases[case_id], reach_mm=(24.0, 80.0, 80.0), intensity={"adc": (0.1, 0.2, 0.3)}
            )
    other = Fingerprint(tuple(cases.values()))
    known = Known(
        other.cases, [other.of(folds.training(0))], asked.data.classes, asked.data.modalities,
        device, {"data.preprocess.spacing_mm": (3.0, 0.4, 0.4)},
    )  # fmt: skip
    assert len(alone) == 2
    assert list(rules.size(known).value) == plan.values["data.preprocess.size"]
    assert list(rules.scales(known).value) == plan.values["data.preprocess.scales"]


def test_missing_modalities_are_kept_and_withheld():
    fingerprint = changed(made.THREE, 1, modalities=("t2w", "adc"))
    values = plan_of(fingerprint).values
    assert values["data.allow_missing"] is True
    assert values["train.modality_dropout"] == 0.3
    assert plan_of(made.THREE).values["train.modality_dropout"] == 0.0


def test_stages_follow_nnunet():
    # nnU-Net's published plan of the Decathlon prostate: 3d_fullres, 20 x 320 x 256 at
    # 3.6 x 0.62 x 0.62 mm, pools (1,2,2), (1,2,2), (2,2,2), (2,2,2), (1,2,2), (1,2,2)
    found = rules.stages_of((3.6, 0.62, 0.62), (20, 320, 256), most=7)
    assert found.strides[1:] == (
        (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2),
    )  # fmt: skip
    assert found.kernels == ((1, 3, 3), (1, 3, 3), *[(3, 3, 3)] * 5)
    # and of the Decathlon hippocampus: 40 x 56 x 40 at 1 mm, three times (2,2,2)
    found = rules.stages_of((1.0, 1.0, 1.0), (40, 56, 40), most=7)
    assert found.strides[1:] == ((2, 2, 2),) * 3
    assert found.kernels == ((3, 3, 3),) * 4


def test_crop_is_shortened_where_it_is_longest():
    values = {
        "data.preprocess.spacing_mm": (3.0, 0.5, 0.5), "data.preprocess.size": (20, 384, 384),
    }  # fmt: skip
    known = known_of(made.THREE, CHIPS["t4"], **values)
    assert rules.crops(known, 20 * 384 * 384)[0] == (20, 384, 384)
    assert rules.crops(known, 20 * 160 * 170)[0] == (20, 160, 160)
    for voxels in (1e6, 3e5, 1e5, 3e4):
        found = rules.crops(known, voxels)
        assert math.prod(found[0]) <= voxels
        assert [math.prod(crop) for crop in found] == sorted(map(math.prod, found), reverse=True)


def test_batch_holds_no_more_than_a_twentieth_of_the_data():
    values = {"data.preprocess.size": (20, 100, 100)}
    for count, expected in ((100, 5), (1000, 16), (10, 2)):
        known = known_of(made.made(count, spacing=(3, 1, 1), size=(20, 100, 100)), CHIPS["h200"])
        known.values |= values
        assert rules.batch_size(known, (20, 100, 100), 99).value == expected
    assert rules.batch_size(known, (20, 100, 100), 1).value == 2


def test_nothing_is_mirrored_that_has_a_side():
    known = known_of(made.THREE)
    assert rules.flip_probability(known).value == 0.5
    sided = dataclasses.replace(known, classes=("left_kidney", "right_kidney"))
    assert rules.flip_probability(sided).value == 0.0
    assert rules.flip_in_prediction(sided).value is False
    upright = dataclasses.replace(known, classes=("upright",))
    assert rules.flip_probability(upright).value == 0.5


def test_augmentation_is_a_length_and_registered_images_are_not_shifted():
    known = known_of(made.THREE, **{
        "data.preprocess.spacing_mm": (3.0, 0.5, 0.5), "train.crop": (20, 192, 192),
    })  # fmt: skip
    assert rules.translation_voxels(known).value == 16.0
    assert rules.misalignment_voxels(known).value == 8.0
    assert rules.misalignment_probability(known).value == 0.3
    registered = Fingerprint(
        tuple(dataclasses.replace(case, on_one_grid=True) for case in made.THREE.cases)
    )
    assert rules.misalignment_probability(known_of(registered)).value == 0.0


def test_foreground_is_sought_where_there_is_some():
    assert rules.foreground_share(known_of(made.PICAI)).value == 1 / 3
    nothing = made.made(4, spacing=(3, 1, 1), size=(20, 100, 100), positive=0.0)
    assert rules.foreground_share(known_of(nothing)).value == 0.0
    assert "no case holds any target" in plan_of(nothing).notes[0]
    one = made.made(3, spacing=(3, 1, 1), size=(20, 100, 100), positive=1 / 3)
    decision = rules.foreground_share(known_of(one))
    assert decision.value == 0.0
    assert decision.fact == "1 of 3 cases are positive, and 1 of 3 folds train on none of them"


@pytest.mark.parametrize("device", ["cpu", "16"])
def test_training_is_that_of_the_presets(device):
    values = plan_of(made.PICAI, DEVICES[device]).values
    preset = PRESETS["small" if device == "cpu" else "volume3d"]
    assert values["train.steps"] == preset.train.steps
    assert values["train.optimizer.learning_rate"] == preset.train.optimizer.learning_rate
    assert values["network.dtype"] == preset.network.dtype


# Memory -----------------------------------------------------------------------------------------


def test_scaled_memory_is_that_of_compiled_steps():
    """What XLA said of whole presets for one H100 and one v5e (benchmarks of 2026-11)."""
    volume = command_line.complete(PRESETS["volume3d"])
    assert scale.step_bytes(volume, "gpu") == pytest.approx(1.73e9 + 9.66e9, rel=0.1)
    assert scale.step_bytes(volume, "tpu") == pytest.approx(1.84e9 + 8.2e9, rel=0.2)
    slices = command_line.complete(PRESETS["slice2d"])
    assert scale.step_bytes(slices, "tpu") == pytest.approx(7.2e9, rel=0.1)


def test_compiled_memory_decides_and_all_that_was_tried_is_shown():
    """A compiler that says twice what was expected: the plan shrinks until it fits."""
    asked = []

    def compiled(config):
        asked.append(config.train.crop)
        return 2 * scale.step_bytes(config, "gpu")

    device = dataclasses.replace(CHIPS["a100-40"], at_hand=True)
    plan = plan_of(made.PICAI, device, compiled=compiled)
    assert len(plan.trials) == len(asked) > 1
    assert not plan.trials[0].fits
    assert plan.trials[-1].fits
    assert {trial.how for trial in plan.trials} == {"compiled"}
    voxels = [trial.batch_size * math.prod(trial.crop) for trial in plan.trials]
    assert voxels[-1] < voxels[0]
    assert plan.values["train.crop"] == list(plan.trials[-1].crop)


def test_what_does_not_fit_at_all_is_refused():
    with pytest.raises(ConfigError, match="training step must fit into memory; got 99"):
        plan_of(made.PICAI, CHIPS["t4"], compiled=lambda config: 99 * GIB)


def test_chip_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"chip must be one of t4, .*got 'h1000'"):
        chips.absent("h1000")
    assert chips.absent("h100", 40.0).memory_gib == 40.0
    assert chips.absent("v5e", count=16).count == 16
    with pytest.raises(ConfigError, match=r"a plan needs a chip or more; got 0"):
        chips.absent("v5e", count=0)


def test_a_number_of_chips_goes_with_their_name():
    with pytest.raises(ConfigError, match="a number of chips goes with their name; got --chips=4"):
        command.run(command.PlanCommand(chips=4), [])


def test_forecast_says_what_was_compiled_and_that_nothing_ran(monkeypatch):
    found = Account(Estimate(2 * GIB, 6 * GIB), 1.97e12, 81.9e9, {"all-reduce": 100_000_000}, 0, {})
    monkeypatch.setattr(forecast, "compiled_step", lambda config, name, chips: found)
    config = PRESETS["volume3d"]
    said = forecast.in_words(config, "v5e", 16)
    assert "compiled for 16 x v5e, not run" in said
    assert "8.00 of 16.0 GiB, 6.00 of them temporary; 1.970 TFLOP, 81.9 GB accessed" in said
    assert "all-reduce of 100.0 MB between chips" in said
    # 10 ms of arithmetic under 100 ms of memory, and 200 MB at 200 GB/s, 15/16 of them passed on.
    assert "at least 100.9 ms a step (10.0 of arithmetic, 100.0 of memory, 0.9 between" in said
    hours = 5 * config.train.steps * (0.1 + 2e8 * 15 / 16 / 200e9) / 3600
    assert f"take {hours:.2f} h or more" in said


def test_forecast_under_pmap_is_refused():
    with pytest.raises(ConfigError, match="absent chips are compiled under jit; got --parallel=pm"):
        forecast.in_words(dataclasses.replace(PRESETS["small"], parallel="pmap"), "v5e", 1)


# By hand, as a file, in a run -------------------------------------------------------------------


def test_values_by_hand_are_kept_and_what_they_changed_is_said():
    plan = plan_of(made.THREE, given={"data.preprocess.spacing_mm": (3.0, 1.0, 1.0)})
    line = next(line for line in plan.lines if line.field == "data.preprocess.spacing_mm")
    assert line.by_hand
    assert line.value == [3.0, 1.0, 1.0]
    assert "the rule says 3 2 2" in line.rule
    assert "data.preprocess.size: 20 48 48 became 20 96 96" in plan.changed_by_hand
    assert any(change.startswith("train.crop: 20 48 48 became") for change in plan.changed_by_hand)
    by_hand = plan_of(made.THREE, given={"train.crop": (8, 32, 32)})
    line = next(line for line in by_hand.lines if line.field == "train.crop")
    assert line.rule.startswith("given; the rule says 20 48 48: ")
    assert "given" in record.format_plan(plan)


def test_plan_is_a_file_that_may_be_edited(tmp_path):
    plan = plan_of(made.THREE)
    record.write(plan, tmp_path / "plan.json")
    assert record.read(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert content["schema"] == 1
    steps = next(line for line in content["lines"] if line["field"] == "train.steps")
    steps["value"] = 7
    (tmp_path / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    edited = record.read(tmp_path / "plan.json")
    assert edited.sha256 != plan.sha256
    arguments = [f"--plan={tmp_path / 'plan.json'}", "--data.name=phantom", "--seed=3"]
    planned = configure.configure(arguments)
    assert planned.plan == edited
    assert planned.config.train.steps == 7
    assert planned.config.seed == 3
    assert planned.config.train.crop == (20, 48, 48)
    over = configure.configure([*arguments, "--train.steps=9"]).config
    assert over.train.steps == 9


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train.stepz", 7, "plan must name settings of experiments.cv; got 'train.stepz'"),
        ("train.steps", "seven", 'give train.steps a value such as 250; got "seven"'),
        ("train.crop", [1, "a", 2], "give train.crop a value such as"),
    ],
)
def test_faulty_lines_of_a_plan_are_refused(field, value, said):
    with pytest.raises(ConfigError, match=said):
        record.applied("small", {field: value}, PRESETS["auto"])


def test_plan_and_preset_are_one_or_the_other(tmp_path):
    with pytest.raises(ConfigError, match=r"got --plan and --preset=small"):
        configure.configure([f"--plan={tmp_path}", "--preset", "small"])
    with pytest.raises(ConfigError, match="plan must be a file"):
        configure.configure([f"--plan={tmp_path / 'none.json'}"])
    with pytest.raises(ConfigError, match=r"plans nothing and follows no plan; got --preset=auto"):
        command_line.parse(["--preset=auto"])


def test_run_folder_with_a_plan_is_continued_by_it(tmp_path, capsys):
    plan = plan_of(made.THREE)
    record.write(plan, tmp_path / "plan.json")
    planned = configure.configure(["--preset=auto", f"--output={tmp_path}"])
    assert planned.plan == plan
    assert "the plan is that of the run folder" in capsys.readouterr().out


def test_files_are_planned_for_and_what_is_drawn_is_not(tmp_path, capsys):
    """Without a preset; a run that was begun without a plan goes on without one."""
    folder = tmp_path / "data"
    write_folder(folder, *(raw_case(f"case_{n}", seed=n) for n in range(3)))
    words = [f"--data.path={folder}", f"--data.cache={tmp_path / 'cache'}", "--accelerator=cpu"]
    planned = configure.configure([*words, f"--output={tmp_path / 'run'}"])
    assert planned.plan is not None
    assert planned.config.preset == "auto"
    assert planned.config.num_folds == 3
    assert "no --preset: planned for these data and this device" in capsys.readouterr().out
    assert configure.configure([*words, "--preset=small"]).plan is None

    drawn = configure.configure(["--data.name=phantom"])
    assert (drawn.plan, drawn.config.preset) == (None, "small")

    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text("{}", encoding="utf-8")
    goes_on = configure.configure([*words, f"--output={begun}"])
    assert (goes_on.plan, goes_on.config.preset) == (None, "small")
    assert f"{begun} was begun without a plan, and goes on so" in capsys.readouterr().out


def test_stages_by_hand_go_over_those_of_the_plan(tmp_path):
    record.write(plan_of(made.THREE), tmp_path / "plan.json")
    arguments = [f"--plan={tmp_path / 'plan.json'}", "--network.encoder.channels", "4", "4", "4"]
    assert configure.configure([*arguments, "8"]).config.network.encoder.channels == (4, 4, 4, 8)


def test_command_measures_plans_prints_and_writes(tmp_path, capsys):
    words = ["--data.phantom.num-cases=4", f"--data.cache={tmp_path}", "--accelerator=cpu"]
    plans = []
    for name in ("a", "b"):
        command.main([f"--write={tmp_path / name}.json", "--data.target=gland", *words])
        plans.append((tmp_path / f"{name}.json").read_bytes())
    assert plans[0] == plans[1], "the same data and device give the same plan"
    said = capsys.readouterr().out
    assert "4 cases of 4 patients, 4 with gland" in said
    assert "data.preprocess.spacing_mm                   3 2 2\n" in said
    assert "labels taken to the grid and back keep a Dice of 0.9" in said
    assert "2 crops of 24 48 48: 0." in said
    assert "experiments.cv --plan=" in said
    config = configure.configure([f"--plan={tmp_path / 'a.json'}", *words]).config
    assert config.num_folds == 4
    assert config.data.preprocess.scales == ("adc=1200/500",)


def test_command_plans_for_a_chip_that_is_not_there(tmp_path, capsys):
    words = ["--data.phantom.num-cases=3", f"--data.cache={tmp_path}", "--chip=h100"]
    command.main([f"--write={tmp_path / 'plan.json'}", *words])
    plan = record.read(tmp_path / "plan.json")
    assert plan.base == "volume3d"
    assert plan.device == "1 x h100 (gpu), 79.11 GiB, not at hand"
    assert {trial.how for trial in plan.trials} == {"scaled"}
    assert "scaled from other chips' accounts" in capsys.readouterr().out


def test_hash_of_the_plan_stands_in_the_record_of_the_run(tmp_path):
    plan = plan_of(made.THREE)
    config = configure.followed(plan, asked_for(made.THREE), [f"--output={tmp_path / 'run'}"])
    source = loading.CaseSource([], [], "fingerprint")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.open(config, source, splits.Folds((("a",), ("b",))), plan.sha256)
    assert folder.read_record().plan_sha256 == plan.sha256
    assert folder.read_config().train.crop == (20, 48, 48)
    assert folder.plan == tmp_path / "run" / "plan.json"
