"""A cascade: where the box lies, what the second network is given, and runs of two networks."""

import dataclasses
import json
import zipfile

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest

from cmsad_jax import export
from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.modules import CMSAD, FusionConfig, NetworkConfig
from cmsad_jax.training import LossConfig
from cmsad_jax.types import ConfigError
from data_pipelines.case import STORED_UNIT, Case
from data_pipelines.faults import DataError
from data_pipelines.phantom import phantom
from data_pipelines.serving import loading
from experiments import missing_modalities, predict
from experiments.exporting.artifact import write_artifact
from experiments.exporting.opening import open_models
from experiments.prediction.cascade import as_background, beyond_margin, box_around
from experiments.prediction.models import Models, run_program
from experiments.prediction.windows import predict_case
from experiments.run_folder import RunFolder
from experiments.settings.cascade import first_config
from experiments.settings.command_line import complete, parse, without_effect
from experiments.settings.config import CascadeConfig, box_of
from experiments.studies import cascade, cross_validation
from experiments.training.programs import folds_at_once
from tests.data_pipelines.fabricate import write_folder
from tests.experiments.tiny_run import tiny
from tests.networks import random_params

BOX = (2, 4, 4)
STILL = AugmentationConfig(
    **{
        field.name: 0.0
        for field in dataclasses.fields(AugmentationConfig)
        if field.name.endswith("_probability")
    }
)


def case_of(shape, spacing, *, channels=2) -> Case:
    """A case whose intensities are numbers of voxels, so that each tells where it was."""
    numbers = np.arange(np.prod(shape)).reshape(shape).astype(np.int16)
    return Case(
        case_id="a",
        patient_id="a",
        image=np.stack([numbers, -numbers][:channels], -1),
        label=(numbers % 2).astype(np.uint8),
        present=np.ones(channels, bool),
        affine=np.diag([*spacing[::-1], 1.0]),
        original_shape=shape,
        original_affine=np.diag([*spacing[::-1], 1.0]),
        truth=np.zeros((0, 0, 0), np.uint8),
        truth_offset=(0, 0, 0),
    )


def found_at(*boxes, shape=(6, 8, 8), value=1.0, size=BOX):
    """What is located in a case of ``shape`` where the first, on the same grid, finds boxes."""
    case = case_of(shape, (3.0, 1.0, 1.0))
    probability = np.zeros((*shape, 1), np.float32)
    for box in boxes:
        probability[tuple(slice(*ends) for ends in box)] = value
    return box_around(probability, case, case, size), case


@pytest.mark.parametrize(
    ("boxes", "corner"),
    [
        ([((2, 4), (2, 6), (4, 6))], (2, 2, 3)),  # its middle is that of what was found
        ([((0, 1), (0, 1), (7, 8))], (0, 0, 4)),  # it stays within the grid
        ([((5, 6), (7, 8), (0, 1)), ((0, 2), (0, 3), (0, 2))], (0, 0, 0)),  # of two, the larger
    ],
)
def test_the_box_lies_around_what_was_found(boxes, corner):
    found, case = found_at(*boxes)
    assert (found.corner, found.remark) == (corner, "")
    cut = found.cut(case)
    box = tuple(slice(n, n + size) for n, size in zip(corner, BOX, strict=True))
    np.testing.assert_array_equal(cut.image[..., :2], case.image[box])
    np.testing.assert_array_equal(cut.label, case.label[box])
    first_voxel = np.array([*corner[::-1], 1])
    np.testing.assert_allclose(cut.affine @ [0, 0, 0, 1], case.affine @ first_voxel)
    np.testing.assert_array_equal(cut.affine[:3, :3], case.affine[:3, :3])


def test_the_probability_is_one_channel_more_in_units_of_what_is_stored():
    found, case = found_at(((2, 4), (2, 6), (4, 6)), value=0.75)
    prior = found.cut(case).image[..., 2]
    assert prior.dtype == np.int16
    assert {*np.unique(prior * STORED_UNIT)} == {0, 0.75}
    assert (prior > 0).sum() == 2 * 4 * 2


def test_nothing_found_and_too_much_are_said():
    nothing, _ = found_at()
    assert nothing.corner == (2, 2, 2), "the middle"
    assert nothing.remark.startswith("the first network of the cascade found nothing")
    faint, _ = found_at(((0, 2), (0, 2), (0, 2)), value=0.5)
    assert faint.remark == nothing.remark, "at most one half is not found"
    much, _ = found_at(((0, 3), (0, 5), (0, 2)))
    assert much.remark.endswith("larger than the box: 3 x 5 x 2 voxels in one of 2 x 4 x 4")


def test_a_coarse_grid_is_met_by_physical_position():
    """A ramp along x, which linear interpolation keeps: the same at the same place."""
    fine, coarse = case_of((4, 8, 8), (3.0, 1.0, 1.0)), case_of((4, 4, 4), (3.0, 2.0, 2.0))
    coarse.affine[:3, 3] = [0.5, 0.5, 0]
    x = 0.5 + 2 * np.arange(4)
    probability = np.broadcast_to((x / 10)[None, None, :, None], (4, 4, 4, 1)).astype(np.float32)
    cut = box_around(probability, coarse, fine, (4, 8, 8)).cut(fine)
    inner = cut.image[0, 2, 1:7, 2] * STORED_UNIT
    np.testing.assert_allclose(inner, np.arange(1, 7) / 10, atol=STORED_UNIT)


@pytest.mark.parametrize(
    ("margin_mm", "along_x", "along_y", "along_z"),
    [(0.0, 1, 1, 1), (1.9, 1, 3, 1), (2.0, 3, 5, 1), (3.0, 3, 7, 3), (99.0, 8, 8, 6)],
)
def test_beyond_a_margin_in_mm_is_background(margin_mm, along_x, along_y, along_z):
    """One voxel of 3 x 1 x 2 mm is found, and a fainter place that is none: lines through it."""
    case = case_of((6, 8, 8), (3.0, 1.0, 2.0))
    probability = np.zeros((6, 8, 8, 1), np.float32)
    probability[2, 4, 4], probability[5, 0, 0] = 0.9, 0.5
    cut = box_around(probability, case, case, (6, 8, 8)).cut(case)
    within = ~beyond_margin(cut, margin_mm)
    lines = within[2, 4, :], within[2, :, 4], within[:, 4, 4]
    assert [line.sum() for line in lines] == [along_x, along_y, along_z]
    assert within[2, 4, 4]


def test_the_margin_is_around_the_largest_part_and_nowhere_without_one():
    found, case = found_at(((0, 2), (0, 2), (0, 2)), ((5, 6), (6, 8), (7, 8)), size=(6, 8, 8))
    within = ~beyond_margin(found.cut(case), 0.0)
    assert within.sum() == 8
    assert within[:2, :2, :2].all()
    nothing, case = found_at()
    assert not beyond_margin(nothing.cut(case), 0.0).any()


def test_background_of_one_class_is_nothing_and_of_several_the_first():
    where = np.array([[[True, False]]])
    one = as_background(np.full((1, 1, 2, 1), 0.7, np.float32), where)
    np.testing.assert_array_equal(one[0, 0, :, 0], np.float32([0, 0.7]))
    several = as_background(np.full((1, 1, 2, 4), 0.25, np.float32), where)
    np.testing.assert_array_equal(several[0, 0], [[1, 0, 0, 0], [0.25] * 4])
    assert one.dtype == several.dtype == np.float32


def test_of_several_classes_whatever_is_no_background_is_found():
    case = case_of((6, 8, 8), (3.0, 1.0, 1.0))
    probability = np.zeros((6, 8, 8, 3), np.float32)
    probability[..., 0] = 1
    probability[0, 0, 0] = [0.2, 0.4, 0.4]
    assert box_around(probability, case, case, BOX).corner == (0, 0, 0)


def test_settings_of_the_first_network_follow_from_those_of_the_second(tmp_path):
    second = parse(["--cascade.target=gland", "--cascade.steps=7", "--cascade.coarser", "1", "3",
                    "3", "--output", str(tmp_path)])  # fmt: skip
    assert second.network.prior
    assert box_of(second) == (20, 36, 36)
    assert second.train.crop == (12, 36, 36), "cut to the box"
    assert complete(second) == second
    first = first_config(second, tmp_path / "first")
    assert (first.data.target, first.network.prior, first.cascade.target) == ("gland", False, "")
    assert first.data.preprocess.size == (20, 16, 16)
    assert first.data.preprocess.spacing_mm == (3.0, 6.0, 6.0)
    assert (first.train.crop, first.train.steps) == ((12, 16, 16), 7)
    usual = parse(["--cascade.target=gland", "--train.steps=7", "--output", str(tmp_path)])
    assert first_config(usual, tmp_path / "first").train.steps == 21
    assert (first.output, first.seed, first.loss) == (tmp_path / "first", second.seed, second.loss)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"coarser": (1, 0, 2)}, "1 or more times as large; got (1, 0, 2)"),
        ({"box_mm": (60.0, 0.0, 60.0)}, "must be above 0 mm; got (60.0, 0.0, 60.0)"),
        ({"margin_mm": -1.0}, "must be at least 0 mm; got -1.0. Use --cascade.margin-mm=6, or Non"),
        ({"margin_mm": float("nan")}, "must be at least 0 mm; got nan"),
        ({"steps": 0}, "cascade.steps must be at least 1; got 0"),
    ],
)
def test_impossible_cascades_are_refused(settings, sentence):
    with pytest.raises(ConfigError) as refused:
        CascadeConfig(target="gland", **settings)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cascade.target=prostat"], "got --cascade.target=prostat --cascade.coarser 1 2 2: a t"),
        (
            ["--cascade.target=gland", "--cascade.coarser", "20", "48", "48"],
            "coarser 20 48 48",
        ),
    ],
)
def test_a_first_network_that_cannot_be_is_refused_before_anything_is_read(
    options, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(cross_validation, "open_source", None)
    with pytest.raises(ConfigError) as refused:
        cross_validation.run(parse([*options, "--output", str(tmp_path / "run")]))
    assert "must be one that can be trained" in str(refused.value)
    assert sentence in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_box_that_is_too_small_for_the_network_is_named():
    with pytest.raises(ConfigError, match=r"got \(1, 2, 2\) voxels: every .* --cascade.box-mm 60"):
        parse(["--cascade.target=gland", "--cascade.box-mm", "3", "4", "4"])


def test_settings_of_no_cascade_have_no_effect_and_it_is_said():
    said = without_effect(parse(["--cascade.box-mm", "60", "60", "60"]))
    assert said == ["cascade.box_mm has no effect, as cascade.target names nothing to find first."]
    assert without_effect(parse(["--cascade.target=gland"])) == []


def test_folds_side_by_side_are_refused():
    config = parse(["--cascade.target=gland", "--folds-at-once=2"])
    with pytest.raises(
        ConfigError, match="one after another in one process; got --folds-at-once=2"
    ):
        folds_at_once(config, jax.devices())
    assert folds_at_once(parse(["--cascade.target=gland"]), jax.devices()) == 1


def test_a_case_without_a_label_for_the_first_network_is_named():
    with pytest.raises(DataError, match="2 of 3 have none, the first b") as refused:
        cascade.refuse_lacking(("a",), ("a", "c", "b"), "gland")
    assert "must have a label of gland" in str(refused.value)


def small_network(**changes) -> NetworkConfig:
    encoder = dataclasses.replace(tiny(None, None).network.encoder)
    return NetworkConfig(modalities=("t2w", "adc"), encoder=encoder, **changes)


@pytest.mark.parametrize("fusion", ["scff", "early"])
def test_each_encoder_sees_the_prior_beside_its_modality(fusion):
    config = small_network(prior=True)
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, kind=fusion))
    network = CMSAD(config)
    image = jax.random.normal(jax.random.key(0), (1, 4, 8, 8, 3))
    variables = {"params": random_params(network, image)}
    kernels = {
        name: module["stage0_block0"]["Conv_0"]["kernel"].shape[-2]
        for name, module in variables["params"].items()
        if name.startswith("encoder")
    }
    wanted = {"encoder": 3} if fusion == "early" else {"encoder_t2w": 2, "encoder_adc": 2}
    assert kernels == wanted
    present = jnp.array([[True, False]])
    logits_of = jax.jit(lambda image: network.apply(variables, image, present).logits)
    logits = logits_of(image)
    assert np.abs(logits - logits_of(image.at[..., 2].add(1))).max() > 1e-3
    for spoilt in (7.0, np.nan):
        np.testing.assert_array_equal(logits_of(image.at[..., 1].set(spoilt)), logits)


def test_a_prior_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="and one for the prior; got 2 channels"):
        CMSAD(small_network(prior=True)).init(jax.random.key(0), jnp.zeros((1, 4, 8, 8, 2)))


def raw_case(case_id):
    """A case of the phantom by its id, or by its number."""
    cases = (phantom.make_case(number) for number in range(10))
    return next(case for n, case in enumerate(cases) if case_id in (n, case.case_id))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two folds of a cascade whose first network finds glands on voxels twice as large."""
    cache, output = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("runs") / "run"
    config = tiny(output, cache)
    config = dataclasses.replace(
        config,
        network=dataclasses.replace(
            config.network,
            encoder=dataclasses.replace(config.network.encoder, block="plain"),
            decoder_block="plain",
            fusion=FusionConfig(kind="mean"),
        ),
        train=dataclasses.replace(config.train, augmentation=STILL),
        loss=LossConfig(
            cross_modal_weight=0.0, self_weight=0.0, label_weight=0.0, correlation_weight=0.0
        ),
        num_folds=2,
        cascade=CascadeConfig(target="gland", box_mm=(24.0, 60.0, 60.0)),
        predict=dataclasses.replace(config.predict, figures=0, overlap=0.0, flip=False),
    )
    config = complete(config)
    cross_validation.run(config)
    return config


def test_no_first_network_has_seen_the_validation_patients_of_its_fold(run):
    folders = RunFolder(run.output), RunFolder(RunFolder(run.output).first)
    second, first = (folder.read_folds() for folder in folders)
    assert first == second
    assert all(folder.done(2) == [0, 1] for folder in folders)
    rows = folders[0].read_results().summary.metric_per_case
    assert sorted(row.case_id for row in rows) == sorted(second.cases)
    assert {row.name for row in folders[1].read_results().summary.metric_per_case} == {"gland"}


def test_the_report_says_that_it_is_one_and_where_the_first_is(run):
    said = (
        "a first network finds gland (its own report: first/report.html); beyond a box of "
        "24 x 60 x 60 mm around it nothing is looked at, and beyond 6 mm of it nothing is called"
    )
    for report in (RunFolder(run.output).report_html, RunFolder(run.output).report_markdown):
        assert said in report.read_text("utf-8")
    first = RunFolder(RunFolder(run.output).first)
    assert "Cascade:" not in first.report_markdown.read_text("utf-8")


def test_beyond_the_box_nothing_is_found(run):
    source = loading.build(run.data)
    first = cascade.Cascade(run, first_config(run, RunFolder(run.output).first), jax.devices()[:1])
    case_id = RunFolder(run.output).read_folds().validation[1][0]
    case = source[case_id]
    cut = first.see(first.params(1), case).cut(case)
    assert cut.image.shape == (8, 20, 20, 4)
    (file,) = RunFolder(run.output).fold(1).probabilities(case_id, ("lesion",))
    probability = nibabel.load(file).get_fdata().T
    ijk = np.linalg.solve(cut.affine, nibabel.load(file).affine)
    index = np.stack(np.meshgrid(*map(np.arange, probability.shape[::-1]), indexing="ij"), -1)
    inside = index @ ijk[:3, :3].T + ijk[:3, 3]
    outside = ((inside < -0.5) | (inside > np.array([19.5, 19.5, 7.5]))).any(-1).T
    assert outside.any()
    assert probability[outside].max() == 0 < probability.max()


def test_beyond_the_margin_nothing_is_called_in_a_run_and_of_its_artifact(run):
    """Of a network that calls everything, the gland and 6 mm around it are left."""
    probability = np.zeros((8, 20, 20, 1), np.float32)
    probability[3:5, 8:12, 8:12] = 1
    case = case_of((8, 20, 20), (3.0, 3.0, 3.0))
    third = np.zeros((8, 20, 20, 1), np.int16)
    image = np.concatenate([case.image, third], -1)
    case = dataclasses.replace(case, image=image, present=np.ones(3, bool))
    cut = box_around(probability, case, case, (8, 20, 20)).cut(case)
    within = ~beyond_margin(cut, 6.0)

    def everything(params, windows, present):
        return jnp.full((*windows.shape[:-1], 1), 0.9)

    found = predict_case(everything, {}, cut, run)
    np.testing.assert_allclose(found[..., 0], 0.9 * within, rtol=1e-6)
    assert within.sum() == 32 + 2 * 2 * (16 + 8 + 8) + 4 * (4 + 4 + 2) + 8  # faces, edges, corners
    anywhere = dataclasses.replace(run, cascade=dataclasses.replace(run.cascade, margin_mm=None))
    assert predict_case(everything, {}, cut, anywhere).min() > 0.8
    (model,) = open_models(run.output, (1,), {}).each
    assert model.description.margin_mm == 6
    model = dataclasses.replace(model, programs={"predict": everything, "drawn": everything})
    for program in ("predict", "drawn"):
        said = run_program(model, cut, program).probability
        np.testing.assert_allclose(said[..., 0], 0.9 * within, rtol=1e-6)


def test_a_run_goes_on_where_it_was_and_trains_no_first_network_again(run, monkeypatch, capsys):
    metrics = RunFolder(run.output).metrics.read_bytes()
    monkeypatch.setattr(cross_validation, "open_source", _none_but(run.data.target))
    cross_validation.run(run)
    assert RunFolder(run.output).metrics.read_bytes() == metrics
    assert "fold 1 (2 of 2): done before" in capsys.readouterr().out
    log = RunFolder(run.output).log.read_text("utf-8")
    assert "first network of the cascade: gland on voxels of 3 x 6 x 6 mm" in log
    assert "second network of the cascade: lesion" in log, "the log goes on after the first's"


def _none_but(target):
    opened = cross_validation.open_source

    def open_source(config):
        assert config.data.target == target
        return opened(config)

    return open_source


def test_an_artifact_holds_both_networks_and_predicts_as_the_run(run, tmp_path, capsys):
    """A case that fold 1 validates on, by the two networks of fold 1 alone."""
    write_artifact(run.output, tmp_path / "model.cmsad", folds=(0, 1), platforms=("cpu",))
    model = export.load(tmp_path / "model.cmsad")
    assert model.description.box == (8, 20, 20)
    assert model.first.description.target == "gland"
    assert model.select(["fold_1"]).first.description.members == ("fold_1",)
    assert model.description.margin_mm == 6
    assert "a first network in this file finds gland; this" in model.card
    assert "Beyond 6 mm of it nothing is called." in model.card
    with pytest.raises(ConfigError, match="of a cascade a channel of the first's result"):
        model(np.zeros((8, 20, 20, 3), np.float32))
    case_id = RunFolder(run.output).read_folds().validation[1][0]
    write_folder(tmp_path / "in", raw_case(case_id))
    predict.main(
        ["--model", str(tmp_path / "model.cmsad"), "--folds", "1", "--no-page",
         "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--accelerator", "cpu"]
    )  # fmt: skip
    (mine,) = (tmp_path / "out/probabilities").iterdir()
    (theirs,) = RunFolder(run.output).fold(1).probabilities(case_id, ("lesion",))
    np.testing.assert_allclose(
        nibabel.load(mine).get_fdata(), nibabel.load(theirs).get_fdata(), atol=2e-3
    )


def test_what_was_not_found_is_recorded_of_the_case(run, tmp_path, monkeypatch, capsys):
    case_id = RunFolder(run.output).read_folds().validation[1][0]
    write_folder(tmp_path / "in", raw_case(case_id))
    see = box_around
    monkeypatch.setattr(
        "experiments.prediction.models.box_around",
        lambda probability, *rest: see(0 * probability, *rest),
    )
    predict.main(
        ["--model", str(run.output), "--folds", "1", "--no-page",
         "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--accelerator", "cpu"]
    )  # fmt: skip
    record = json.loads((tmp_path / "out/predictions.json").read_text("utf-8"))
    assert "the first network of the cascade found nothing" in record["cases"][0]["warnings"][-1]
    assert f"warning: case {case_id}: the first network" in capsys.readouterr().err


def test_a_first_network_without_finite_probabilities_passes_the_case_over(run):
    models = open_models(run.output, (1,), {})
    (model,) = models.each
    broken = dataclasses.replace(
        model.first,
        programs={"predict": lambda weights, windows, present: np.nan * windows[..., :1]},
    )
    spoilt = Models((dataclasses.replace(model, first=broken),), models.data)
    with pytest.raises(DataError, match="probabilities must be finite"):
        spoilt.in_boxes(spoilt.prepare(raw_case(0)))


def test_a_modality_that_is_withheld_is_withheld_from_both_networks(run, monkeypatch):
    seen = []
    see = cascade.Cascade.see

    def watched(self, params, case):
        seen.append(tuple(case.present))
        return see(self, params, case)

    monkeypatch.setattr(cascade.Cascade, "see", watched)
    dice, _ = missing_modalities.measure(run.output, "cpu", (1,))
    assert {without for without, _ in dice} == {"nothing", "t2w", "adc", "hbv"}
    assert seen.count((True, True, True)) == len(dice["nothing", "lesion"]) > 0
    assert {*seen} == {
        (True, True, True), (False, True, True), (True, False, True), (True, True, False)
    }  # fmt: skip


def test_artifacts_of_half_a_cascade_are_refused(run, tmp_path):
    write_artifact(run.output, tmp_path / "model.cmsad", folds=(0,), platforms=("cpu",))
    model = export.load(tmp_path / "model.cmsad")
    with zipfile.ZipFile(tmp_path / "model.cmsad") as archive:
        program, first = map(archive.read, ("programs/predict.stablehlo", "first.cmsad"))
    facts = {"description": model.description, "card": "", "license_text": ""}
    parts = {
        "programs": {"predict": program},
        "weights": [dict(model.weights[0])],
    }
    export.save(tmp_path / "alone.cmsad", **facts, **parts)
    with pytest.raises(ConfigError, match="got a box and none"):
        export.load(tmp_path / "alone.cmsad")
    other = dataclasses.replace(model.description, members=("b",))
    export.save(tmp_path / "other.cmsad", **{**facts, "description": other}, **parts, first=first)
    with pytest.raises(ConfigError, match="members b of the second network; got"):
        export.load(tmp_path / "other.cmsad")
    whole = (tmp_path / "model.cmsad").read_bytes()
    export.save(tmp_path / "deep.cmsad", **facts, **parts, first=whole)
    with pytest.raises(ConfigError, match="got a cascade within a cascade"):
        export.load(tmp_path / "deep.cmsad")
    boxless = dataclasses.replace(model.description, box=(), margin_mm=None)
    export.save(tmp_path / "x.cmsad", **{**facts, "description": boxless}, **parts, first=first)
    with pytest.raises(ConfigError, match="windows of shape"):  # one channel less
        export.load(tmp_path / "x.cmsad")
    for odd in (-1.0, float("inf")):
        strange = dataclasses.replace(model.description, margin_mm=odd)
        with pytest.raises(ConfigError, match="margin_mm must be a number of at least 0 beside"):
            export.save(tmp_path / "z.cmsad", **{**facts, "description": strange}, **parts)
    larger = dataclasses.replace(model.description, box=(99, 20, 20))
    with pytest.raises(ConfigError, match="box must be no larger than the grid"):
        export.save(tmp_path / "y.cmsad", **{**facts, "description": larger}, **parts)
