import csv
import dataclasses
import itertools
import json
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.reading.volume_io import write_nifti
from experiments import evaluate
from experiments.evaluate import main
from experiments.measuring.metrics import METRICS, case_metrics
from experiments.measuring.summary import format_summary, summarise
from experiments.process.storage import write_text
from experiments.run_folder import Best, FoldSummary, Results, RunFolder
from tests.experiments.fake_run import row_of

SPACING = (3.0, 0.5, 0.5)


def box(shape, start, size):
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = 1
    return mask


def measure(prediction, truth, spacing=SPACING):
    return case_metrics(prediction, truth, spacing, ("lesion",))["lesion"]


def test_cube_shifted_by_one_voxel_has_the_overlap_counted_by_hand():
    truth = box((8, 9, 10), (2, 2, 2), (4, 4, 4))
    result = measure(np.roll(truth, 1, 1), truth)
    assert result["dice"] == 48 * 2 / 128
    assert result["sensitivity"] == result["precision"] == 0.75
    assert result["iou"] == 48 / 80
    assert result["specificity"] == pytest.approx(1 - 16 / (8 * 9 * 10 - 64))
    assert result["volume_difference_ml"] == 0
    assert result["volume_truth_ml"] == pytest.approx(64 * 0.75e-3)
    assert result["volume_predicted_ml"] == pytest.approx(64 * 0.75e-3)
    assert result["false_positive_volume_ml"] == pytest.approx(16 * 0.75e-3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hd95_of_a_shifted_cube_is_the_step_in_millimetres(axis):
    # Each face across the shift is more than 5 % of the surface and lies one step away.
    spacing = (3.0, 1.0, 0.8)
    truth = box((10, 10, 10), (2, 2, 2), (6, 6, 6))
    result = measure(np.roll(truth, 1, axis), truth, spacing)
    assert result["hd95_mm"] == pytest.approx(spacing[axis])


def test_surface_dice_of_a_shifted_slab_counts_the_faces_that_moved():
    # The slab of the next test: 6272 of 7616 mm2 moved by 2 mm, with the sides' ends; the rest, at
    # most 1344 / 7616 = 0.18 (bevelled edges apart), coincides.
    truth = box((8, 60, 60), (3, 2, 2), (3, 56, 56))
    across = measure(np.roll(truth, 1, 0), truth, (2.0, 1.0, 1.0))
    assert 0.1 < across["surface_dice_1mm"] < 0.2
    assert across["surface_dice_2mm"] == 1
    along = measure(np.roll(truth, 1, 1), truth, (2.0, 1.0, 1.0))
    assert along["surface_dice_1mm"] == 1


def test_assd_of_a_shifted_slab_weighs_distances_by_area():
    # 2 x 56 x 56 mm2 of faces lie 2 mm apart, 4 x 56 x 6 mm2 of sides mostly coincide: about
    # 2 mm x 6272 / 7616 = 1.65 mm. An unweighted mean over surface voxels would be 1.78 mm.
    truth = box((8, 60, 60), (3, 2, 2), (3, 56, 56))
    result = measure(np.roll(truth, 1, 0), truth, (2.0, 1.0, 1.0))
    assert result["assd_mm"] == pytest.approx(1.65, abs=0.05)


def test_perfect_prediction():
    truth = box((5, 6, 7), (0, 0, 0), (5, 6, 7))  # touches every border
    result = measure(truth, truth)
    assert result["dice"] == result["sensitivity"] == result["precision"] == 1
    assert result["hd95_mm"] == result["assd_mm"] == result["false_positive_volume_ml"] == 0


def test_empty_truth_and_prediction_define_volumes_only():
    empty = np.zeros((3, 4, 5), np.uint8)
    result = measure(empty, empty)
    assert list(result) == list(METRICS)
    assert {name for name, value in result.items() if value is not None} == {
        "specificity",
        "false_positive_volume_ml",
        "volume_truth_ml",
        "volume_predicted_ml",
    }
    assert result["false_positive_volume_ml"] == 0
    assert result["specificity"] == 1


def test_false_positive_volume_of_a_negative_is_all_that_is_predicted():
    prediction = box((3, 4, 5), (1, 1, 1), (1, 2, 2))
    result = measure(prediction, np.zeros_like(prediction))
    assert result["false_positive_volume_ml"] == pytest.approx(4 * 0.75e-3)
    assert result["dice"] is result["precision"] is result["hd95_mm"] is None


def test_empty_prediction_of_a_positive_is_a_zero_and_not_a_gap():
    truth = box((3, 4, 5), (1, 1, 1), (1, 2, 2))
    result = measure(np.zeros_like(truth), truth)
    assert result["dice"] == result["sensitivity"] == 0
    assert result["precision"] is result["hd95_mm"] is result["assd_mm"] is None
    assert result["iou"] == result["surface_dice_1mm"] == result["surface_dice_2mm"] == 0
    assert result["volume_difference_ml"] == pytest.approx(-4 * 0.75e-3)
    diagonal = (9**2 + 2**2 + 2.5**2) ** 0.5  # of 3 x 4 x 5 voxels of 3 x 0.5 x 0.5 mm
    assert result["hd95_penalised_mm"] == pytest.approx(diagonal)
    assert result["assd_penalised_mm"] == pytest.approx(diagonal)


def test_penalised_distances_are_the_plain_ones_where_both_are_found():
    truth = box((8, 9, 10), (2, 2, 2), (4, 4, 4))
    result = measure(np.roll(truth, 1, 1), truth)
    assert result["hd95_penalised_mm"] == result["hd95_mm"] > 0
    assert result["assd_penalised_mm"] == result["assd_mm"] > 0


def test_truth_that_fills_the_volume_has_no_specificity():
    everything = np.ones((2, 3, 4), np.uint8)
    result = measure(everything, everything)
    assert result["specificity"] is None
    assert result["dice"] == 1


def test_probability_must_exceed_the_threshold():
    probability = np.array([[[0.2, 0.5, 0.51]]], np.float32)
    truth = np.array([[[0, 1, 1]]], np.uint8)
    assert measure(probability, truth)["sensitivity"] == 0.5
    lower = case_metrics(probability, truth, SPACING, ("lesion",), threshold=0.4)["lesion"]
    assert lower["dice"] == 1


def test_classes_are_measured_one_by_one():
    truth = np.array([[[1, 1, 2, 0]]], np.uint8)
    prediction = np.array([[[1, 2, 2, 0]]], np.uint8)
    result = case_metrics(prediction, truth, SPACING, ("pz", "tz"))
    assert result["pz"]["dice"] == pytest.approx(2 / 3)
    assert result["tz"]["dice"] == pytest.approx(2 / 3)
    assert result["pz"]["precision"] == 1
    assert result["tz"]["precision"] == 0.5


def blobs():
    rng = np.random.default_rng(3)
    noise = ndimage.gaussian_filter(rng.normal(size=(9, 15, 17)), 1.2)
    shifted = np.roll(noise, 1, 1) + 0.05 * rng.normal(size=noise.shape)
    return (shifted > 0.1).astype(np.uint8), (noise > 0.08).astype(np.uint8), (3.3, 0.61, 0.73)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2)])
def test_flipping_the_grid_changes_nothing(axes):
    prediction, truth, spacing = blobs()
    flipped = measure(np.flip(prediction, axes), np.flip(truth, axes), spacing)
    assert flipped == pytest.approx(measure(prediction, truth, spacing), rel=1e-12)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_permuting_axes_with_their_spacing_changes_nothing(order):
    prediction, truth, spacing = blobs()
    permuted = measure(
        prediction.transpose(order), truth.transpose(order), [spacing[axis] for axis in order]
    )
    assert permuted == pytest.approx(measure(prediction, truth, spacing), rel=1e-12)


def test_padding_the_volume_changes_nothing():
    prediction, truth, spacing = blobs()
    padded = measure(np.pad(prediction, 5), np.pad(truth, 5), spacing)
    plain = measure(prediction, truth, spacing)
    assert padded.pop("specificity") > plain.pop("specificity")  # more background, same errors
    assert padded == pytest.approx(plain, rel=1e-12)


def test_surface_metrics_equal_those_of_surface_distance(shared_data):
    oracle = json.loads((shared_data / "oracles/surface_metrics.json").read_text("utf-8"))
    with np.load(shared_data / "oracles/surface_metrics.npz") as masks:
        for pair in oracle:
            name = f"{pair['case']}__{pair['pair']}"
            result = measure(masks[f"{name}__pred"], masks[f"{name}__ref"], pair["spacing_zyx"])
            assert result["dice"] == pytest.approx(pair["sd_dice"], abs=1e-12)
            assert result["hd95_mm"] == pytest.approx(pair["sd_hd95"], abs=1e-9)
            assert result["assd_mm"] == pytest.approx(np.mean(pair["sd_avg"]), abs=1e-9)
            assert result["surface_dice_1mm"] == pytest.approx(pair["sd_nsd1mm"], abs=1e-9)
            assert result["surface_dice_2mm"] == pytest.approx(pair["sd_nsd2mm"], abs=1e-9)


def test_bad_arrays_are_refused():
    truth = np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(DataError, match=r"must have one shape; got \(2, 3, 5\) and \(2, 3, 4\)"):
        measure(np.zeros((2, 3, 5), np.uint8), truth)
    with pytest.raises(DataError, match="probabilities must be finite; got NaN"):
        measure(np.full(truth.shape, np.nan, np.float32), truth)
    for logit in (-4.0, 3.0):
        with pytest.raises(
            DataError, match=r"must lie in 0\.\.1; got .* Apply the sigmoid to logits"
        ):
            measure(np.full(truth.shape, logit, np.float32), truth)
    measure(np.full(truth.shape, 1 + 1e-4, np.float32), truth)  # resampled
    with pytest.raises(DataError, match=r"values of the prediction must lie in 0\.\.1.*got 0\.\.3"):
        measure(box(truth.shape, (0, 0, 0), (1, 1, 1)) * np.uint8(3), truth)
    with pytest.raises(DataError, match=r"values of the truth must lie in 0\.\.1"):
        measure(truth, truth + np.uint8(2))
    with pytest.raises(DataError, match="several classes need an integer mask; got float32"):
        case_metrics(truth.astype(np.float32), truth, SPACING, ("pz", "tz"))


def row(case_id, fold, dice, *, truth_ml=1.0, predicted_ml=1.0, false_ml=0.0, hd95=None):
    return row_of(
        case_id,
        fold=fold,
        truth_ml=truth_ml,
        predicted_ml=predicted_ml,
        dice=dice,
        sensitivity=dice,
        hd95_mm=hd95,
        false_positive_volume_ml=false_ml,
    )


def example():
    return [
        row("d", 1, 0.8, hd95=4.0),
        row("a", 0, 0.4, hd95=2.0),
        row("b", 0, 0.0, predicted_ml=0.0),
        row("c", 0, None, truth_ml=0.0, predicted_ml=0.0),
        row("e", 2, None, truth_ml=0.0, predicted_ml=2.0, false_ml=2.0),
    ]


def test_summary_of_a_small_run_by_hand():
    summary = summarise(example(), [0, 1, 2])
    tables = ("mean", "sd", "median", "num_defined")
    lesion = {key: getattr(summary, key)["lesion"] for key in tables}
    assert lesion["mean"]["dice"] == pytest.approx(0.4)
    assert lesion["median"]["dice"] == pytest.approx(0.4)
    assert lesion["sd"]["dice"] == pytest.approx(0.4)  # of 0.4, 0, 0.8 with n - 1
    assert lesion["num_defined"]["dice"] == 3
    assert lesion["mean"]["hd95_mm"] == pytest.approx(3.0)
    assert lesion["num_defined"]["hd95_mm"] == 2
    assert lesion["mean"]["assd_mm"] is None
    assert summary.sd_of_fold_means["lesion"]["dice"] == pytest.approx(np.std([0.2, 0.8], ddof=1))
    assert summary.num_cases == 5
    assert summary.num_patients["lesion"]["dice"] == 3
    low, high = summary.interval["lesion"]["dice"]
    assert 0 <= low < 0.4 < high < 0.81
    assert summary.interval["lesion"]["assd_mm"] is None
    assert summary.num_positive == {"lesion": 3}
    assert summary.num_negatives == {"lesion": 2}
    assert summary.num_missed == {"lesion": 1}
    assert summary.num_no_overlap == {"lesion": 1}
    false = summary.false_positives_on_negatives["lesion"]
    assert (false.num_cases, false.mean_ml, false.median_ml, false.max_ml) == (1, 1.0, 1.0, 2.0)
    assert false.sd_ml == pytest.approx(2**0.5)
    assert summary.folds_without_positives == (2,)
    assert [fold.note for fold in summary.per_fold] == [
        None,
        None,
        "no case with lesion: Dice undefined",
    ]
    assert summary.per_fold[2].mean["lesion"]["dice"] is None
    assert [entry.case_id for entry in summary.metric_per_case] == list("abcde")


def test_summary_does_not_depend_on_the_order_of_rows_and_reads_its_own_rows():
    summary = summarise(example(), [0, 1, 2])
    assert summarise(example()[::-1], [2, 0, 1]) == summary
    assert summarise(summary.metric_per_case, [0, 1, 2]) == summary


def test_summary_without_any_positive_case():
    negatives = [entry for entry in example() if entry.dice is None]
    summary = summarise(negatives, [0, 2])
    assert summary.mean["lesion"]["dice"] is summary.sd["lesion"]["dice"] is None
    assert summary.folds_without_positives == (0, 2)
    assert "undefined" in format_summary(summary)


def test_bad_rows_are_refused():
    with pytest.raises(DataError, match="at least one case must be evaluated; got none"):
        summarise([])
    with pytest.raises(DataError, match=r"once per class; got \[\('a', 'lesion'\)\] twice"):
        summarise([row("a", 0, 0.5), row("a", 0, 0.6)], [0])
    new = row("a", 0, 0.5)
    old = {key: value for key, value in new.metrics.items() if key != "iou"}
    with pytest.raises(DataError, match="got one without iou, as another version wrote it"):
        dataclasses.replace(new, metrics=old)
    with pytest.raises(DataError, match=r"got case a of fold 3 and folds \[0, 1\]"):
        summarise([row("a", 3, 0.5)], [0, 1])


def test_files_hold_null_and_empty_cells_for_undefined(tmp_path):
    results = Results(summarise(example(), [0, 1, 2]), target="lesion")
    RunFolder(tmp_path).write_results(results)
    assert "NaN" not in (tmp_path / "metrics.json").read_text("utf-8")
    assert RunFolder(tmp_path).read_results() == results
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [entry["dice"] for entry in rows] == ["0.4", "0.0", "", "0.8", ""]
    assert list(rows[0])[:4] == ["case_id", "patient_id", "fold", "class"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.json"]


def test_a_diverged_loss_is_written_as_null(tmp_path):
    diverged = FoldSummary(1.0, 1.0, 1.0, 1.0, float("nan"), 0, Best())
    results = Results(summarise(example(), [0, 1, 2]), fold_summaries={0: diverged})
    RunFolder(tmp_path).write_results(results)
    (read,) = RunFolder(tmp_path).read_results().fold_summaries.values()
    assert read == dataclasses.replace(diverged, loss=None)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "new \ud800")
    assert [path.read_text("utf-8") for path in tmp_path.iterdir()] == ["old"]


def test_missing_metrics_file_is_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"must hold metrics\.json; got none in"):
        RunFolder(tmp_path).read_results()


AFFINE = np.diag([0.5, 0.5, 3.0, 1.0])


@pytest.fixture
def folders(tmp_path):
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    predictions.mkdir()
    labels.mkdir()
    truth = box((6, 8, 10), (1, 1, 1), (3, 4, 4))
    for name, mask in (("x", np.roll(truth, 1, 1)), ("y", np.zeros_like(truth))):
        write_nifti(predictions / f"{name}.nii.gz", mask, AFFINE)
        write_nifti(labels / f"{name}.nii.gz", truth * np.uint8(3), AFFINE)  # a grade, not 1
    return predictions, labels


def test_command_compares_two_folders(folders, tmp_path, capsys):
    predictions, labels = folders
    output = tmp_path / "out"
    main([str(predictions), str(labels), "--output", str(output)])
    summary = RunFolder(output).read_results().summary
    assert [entry.dice for entry in summary.metric_per_case] == [0.75, 0.0]
    assert summary.metric_per_case[0].volume_truth_ml == pytest.approx(48 * 0.75e-3)
    assert summary.per_fold == ()
    assert "2 of 2 cases positive, 1 missed" in capsys.readouterr().out


def test_probabilities_are_evaluated_for_detection_too(folders, tmp_path, capsys):
    predictions, labels = folders
    truth = box((6, 8, 10), (1, 1, 1), (3, 4, 4))
    write_nifti(predictions / "x.nii.gz", 0.8 * truth.astype(np.float32), AFFINE)
    write_nifti(predictions / "y.nii.gz", 0.7 * truth.astype(np.float32), AFFINE)
    write_nifti(labels / "y.nii.gz", 0 * truth, AFFINE)
    main([str(predictions), str(labels), "--output", str(tmp_path)])
    summary = RunFolder(tmp_path).read_results().summary
    assert summary.detection.average_precision == 1
    assert summary.detection.auroc == 1
    confidences = [entry.detection.confidence for entry in summary.metric_per_case]
    assert confidences == pytest.approx([0.8, 0.7])
    assert summarise(summary.metric_per_case) == summary
    assert "AP 1.000, AUROC of cases 1.000, PI-CAI score 1.000" in capsys.readouterr().out
    main([str(predictions), str(labels), "--target", "gland"])
    assert "lesions:" not in capsys.readouterr().out


def test_files_of_a_patient_count_as_one_where_a_table_says_so(folders, tmp_path):
    predictions, labels = folders
    arguments = [str(predictions), str(labels), f"--output={tmp_path}"]
    main(arguments)
    assert RunFolder(tmp_path).read_results().summary.num_patients["lesion"]["dice"] == 2
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\nx,p\ny,p\n", encoding="utf-8")
    main([*arguments, f"--patients={table}"])
    assert RunFolder(tmp_path).read_results().summary.num_patients["lesion"]["dice"] == 1
    assert RunFolder(tmp_path).read_results().summary.interval["lesion"]["dice"] is None
    table.write_text("case,patient\nx,p\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"must name the patient of every case; got none of y\."):
        main([*arguments, f"--patients={table}"])


def test_command_refuses_faulty_folders(folders, tmp_path):
    predictions, labels = folders
    arguments = [str(predictions), str(labels)]
    with pytest.raises(MissingDataError, match=r"must be folders; got .*nowhere"):
        main([str(tmp_path / "nowhere"), str(labels)])
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingDataError, match=r"one name, but for the ending; got none in .*none"):
        main([str(tmp_path / "none"), str(labels)])
    with pytest.raises(
        DataError, match=r"the label x\.nii\.gz: label values must be .* from 0 to 2"
    ):
        main([*arguments, "--target", "zones"])
    write_nifti(predictions / "x.nii.gz", box((6, 8, 10), (0, 0, 0), (1, 1, 1)), np.eye(4))
    with pytest.raises(DataError, match=r"one grid; got corners up to .* mm apart for x\.nii\.gz"):
        main(arguments)


def test_masks_beside_probabilities_are_refused(folders):
    predictions, labels = folders
    probabilities = 0.8 * box((6, 8, 10), (1, 1, 1), (3, 4, 4)).astype(np.float32)
    write_nifti(predictions / "x.nii.gz", probabilities, AFFINE)
    with pytest.raises(DataError, match=r"or masks of all; got whole numbers in y beside"):
        main([str(predictions), str(labels)])


@pytest.mark.parametrize("threshold", ["50", "0", "nan"])
def test_thresholds_that_no_probability_can_meet_are_refused(folders, threshold):
    with pytest.raises(ConfigError, match=f"threshold must lie between 0 and 1; got {threshold}"):
        main([*map(str, folders), f"--threshold={threshold}"])


def test_a_case_of_two_patients_is_refused(folders, tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\nx,p\ny,p\nx,q\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"one patient for each case; got p and q for x\."):
        main([*map(str, folders), f"--patients={table}"])


def test_what_has_no_other_is_counted_and_not_measured(folders, capsys):
    predictions, labels = folders
    before = evaluate.evaluate_folders(evaluate.EvaluateConfig(predictions, labels))
    for number in range(5):
        (labels / f"z{number}.mha").touch()
    (predictions / "w.nii").touch()
    capsys.readouterr()
    found = evaluate.evaluate_folders(evaluate.EvaluateConfig(predictions, labels))
    assert found == before
    assert capsys.readouterr().out.splitlines() == [
        "measured are 2 cases; 5 labels have no prediction and are not: z0, z1, z2 and 2 more",
        "measured are 2 cases; 1 predictions have no label and are not: w",
    ]
    for path in labels.iterdir():
        path.unlink()
    (labels / "v.nii.gz").touch()
    with pytest.raises(MissingDataError, match=r"got w, x, y in .*predictions and v in .*labels"):
        main([str(predictions), str(labels)])


def test_endings_may_differ(folders):
    predictions, labels = folders
    config = evaluate.EvaluateConfig(predictions, labels)
    before = evaluate.evaluate_folders(config)
    image = sitk.ReadImage(str(labels / "x.nii.gz"))
    sitk.WriteImage(image, str(labels / "x.mha"))
    (labels / "x.nii.gz").unlink()
    np.testing.assert_equal(evaluate.evaluate_folders(config).mean, before.mean)
    (labels / "X.nrrd").touch()
    with pytest.raises(DataError, match=r"named for their cases, .* got X, x. Rename or"):
        main([str(predictions), str(labels)])


def test_names_of_files_must_be_text(folders):
    predictions, labels = folders
    arguments = [str(predictions), str(labels)]
    (predictions / "read me.txt").touch()
    main(arguments)
    (predictions / os.fsdecode(b"caf\xe9.nii")).touch()
    with pytest.raises(DataError, match=r"printable text; got 'caf\\udce9\.nii' in"):
        main(arguments)


def test_zones_must_be_whole_numbers(folders):
    predictions, labels = folders
    half = np.full((6, 8, 10), 0.5, np.float32)
    write_nifti(predictions / "x.nii.gz", half, AFFINE)
    with pytest.raises(DataError, match=r"x\.nii\.gz: a mask of several .* whole numbers; got fr"):
        main([str(predictions), str(labels), "--target", "zones"])


def test_labels_are_read_as_for_training(folders):
    predictions, labels = folders
    truth = box((6, 8, 10), (1, 1, 1), (3, 4, 4))
    write_nifti(labels / "x.nii.gz", ndimage.gaussian_filter(truth.astype(np.float32), 1), AFFINE)
    with pytest.raises(
        DataError, match=r"the label x\.nii\.gz: label values must be whole numbers"
    ):
        main([str(predictions), str(labels)])


def test_masks_and_labels_that_nibabel_scaled_are_what_was_meant(folders, tmp_path):
    predictions, labels = folders
    for folder in folders:
        for name in ("x", "y"):
            file = folder / f"{name}.nii.gz"
            image = nib.Nifti1Image(nib.load(file).get_fdata(), AFFINE)
            image.set_data_dtype(np.int16)
            nib.save(image, file)
    assert nib.load(labels / "x.nii.gz").header["scl_slope"] != 1
    main([str(predictions), str(labels), "--output", str(tmp_path / "out")])
    measured = RunFolder(tmp_path / "out").read_results().summary.metric_per_case
    assert [entry.dice for entry in measured] == [0.75, 0.0]


def test_probabilities_in_percent_are_refused(folders):
    predictions, labels = folders
    percent = np.arange(6 * 8 * 10, dtype=np.uint8).reshape(6, 8, 10) % 101
    write_nifti(predictions / "x.nii.gz", percent, AFFINE)
    with pytest.raises(DataError, match=r"prediction x\.nii\.gz: a predicted mask must hold 0 and"):
        main([str(predictions), str(labels)])


def test_hidden_files_are_passed_over(folders, tmp_path):
    predictions, labels = folders
    (labels / "._x.nii.gz").write_bytes(b"Mac OS X")
    (predictions / ".x.nii.gz").write_bytes(b"half written")
    main([str(predictions), str(labels), "--output", str(tmp_path / "out")])
    assert len(RunFolder(tmp_path / "out").read_results().summary.metric_per_case) == 2


def test_one_grid_stored_in_two_orientations_is_one_grid(folders, tmp_path):
    """Without a value being resampled; a place half a millimetre off is another grid."""
    predictions, labels = folders
    image = nib.load(labels / "x.nii.gz")
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("PSL")
    )
    nib.save(image.as_reoriented(turn), labels / "x.nii.gz")
    main([str(predictions), str(labels), "--output", str(tmp_path / "out")])
    measured = RunFolder(tmp_path / "out").read_results().summary.metric_per_case
    assert [entry.dice for entry in measured] == [0.75, 0.0]
    moved = image.affine.copy()
    moved[0, 3] += 0.1
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), labels / "x.nii.gz")
    with pytest.raises(DataError, match=r"got corners up to 0.10 mm apart for x"):
        main([str(predictions), str(labels)])


def test_files_of_one_case_and_patients_written_in_two_ways_are_refused(folders, tmp_path):
    predictions, labels = folders
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\nx,02\ny,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"written in one way in all cases, .* got 02, 2"):
        main([str(predictions), str(labels), "--patients", str(table)])
    for folder in folders:
        (folder / "x.nii").write_bytes(b"")
    with pytest.raises(DataError, match=r"must be named for their cases, .* got x, x\. Rename"):
        main([str(predictions), str(labels)])
