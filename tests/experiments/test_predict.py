"""Prediction of new cases, from files to files, with models of random weights."""

import contextlib
import dataclasses
import errno
import json
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import jax
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import cmsad_jax.export
from cmsad_jax.modules import FusionConfig
from cmsad_jax.modules.slices import SliceAttentionConfig
from cmsad_jax.types import ConfigError
from data_pipelines.case import Volume
from data_pipelines.faults import DataError
from data_pipelines.preparing import preprocessing
from experiments import evaluate, export, predict
from experiments.exporting.artifact import describe, write_artifact
from experiments.measuring import lesions
from experiments.measuring.training_data import ModalityData, TrainingData, to_provenance
from experiments.prediction import models
from experiments.prediction.inputs import find_inputs, read_case
from experiments.prediction.models import Models, Prepared, data_config
from experiments.prediction.outputs import Extras, PredictionFolder
from experiments.process.storage import locked
from experiments.run_folder import FoldFolder
from experiments.studies import cross_validation
from experiments.training.programs import compile_programs
from tests.data_pipelines.fabricate import affine, raw_case, save, write_dicom, write_folder
from tests.experiments.untrained_run import make_untrained_run, tiny_config

MODALITIES = ("t2w", "adc")


def case_of(case_id="a", *, seed=0, images=MODALITIES):
    raw = raw_case(case_id, seed=seed)
    return dataclasses.replace(raw, images={name: raw.images[name] for name in images}, label=None)


@pytest.fixture(scope="module")
def config():
    return tiny_config()


@pytest.fixture(scope="module")
def run(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, make_untrained_run(folder, config)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, run):
    file = tmp_path_factory.mktemp("artifacts") / "model.cmsad"
    export.main([str(run[0]), "--output", str(file)])
    return file


@pytest.fixture
def quick(config, tmp_path, monkeypatch):
    """A path that stands for a model that is not compiled: brighter is more probable."""

    def probability(weights, windows, present):
        return 1 / (1 + np.exp(-windows.mean(-1, keepdims=True)))

    members = ["fold_0", "fold_1"]
    model = cmsad_jax.export.Model(
        describe(config, members=members, provenance={}, metrics={}, license=""),
        {"predict": probability, "attention": lambda _, windows, present: np.abs(windows)},
        ({}, {}),
        card="",
        license_text="",
        digests=("0", "1"),
    )
    monkeypatch.setattr(predict.export, "load", lambda _: model)
    path = tmp_path / "quick.cmsad"
    path.touch()
    return path


@pytest.fixture(scope="module")
def predicted(tmp_path_factory, artifact):
    """Three cases, one of them broken, in two formats."""
    root = tmp_path_factory.mktemp("predicted")
    write_folder(root / "in", case_of("a"), ending=".nii.gz")
    write_folder(root / "in", case_of("b", seed=1), ending=".mha")
    write_folder(root / "in", case_of("c", seed=2))
    (root / "in/c/adc.nii.gz").write_bytes(b"broken")
    arguments = ["--model", str(artifact), "--input", str(root / "in"), "--attention"]
    with pytest.raises(SystemExit) as stopped:
        predict.main([*arguments, "--uncertainty", "--output", str(root / "out")])
    assert stopped.value.code == 4, "a case was passed over"
    return root


def load(path):
    return nib.load(path).get_fdata(dtype=np.float32).T


def test_probability_is_that_of_the_run_itself(predicted, run, config):
    """The mean over the folds of what ``cv`` writes for a validation case of that fold."""
    _, members = run
    programs = compile_programs(config, jax.devices()[:1])
    raw = dataclasses.replace(case_of("a"), label=raw_case("a").label)
    case = preprocessing.preprocess_case(raw, config.data)
    expected = []
    for fold, params in enumerate(members):
        directory = predicted / f"cv_{fold}"
        folder = FoldFolder(directory)
        cross_validation.predict_and_measure(config, programs, params, case, fold, folder)
        expected.append(load(directory / "probabilities/a.nii.gz"))
    probability = load(predicted / "out/probabilities/a.nii.gz")
    np.testing.assert_allclose(probability, np.mean(expected, 0), atol=1e-5)
    assert probability.std() > 0.01
    disagreement = load(predicted / "out/disagreement/a.nii.gz")
    inside = disagreement > 0  # elsewhere is outside the grid
    # the spread is resampled, not recomputed: equal on the reference grid, which voxels share here
    np.testing.assert_allclose(disagreement[inside], np.std(expected, 0)[inside], atol=0.05)


@pytest.mark.parametrize("case_id", ["a", "b"])
def test_images_lie_in_the_frame_of_the_t2w_file(predicted, case_id):
    (t2w,) = (predicted / "in" / case_id).glob("t2w*")
    source = sitk.ReadImage(str(t2w))
    names = ["masks/{}", "probabilities/{}", "entropy/{}", "disagreement/{}"]
    names += ["attention/{}_t2w", "attention/{}_adc"]
    for name in names:
        image = sitk.ReadImage(str(predicted / "out" / f"{name.format(case_id)}.nii.gz"))
        assert image.GetSize() == source.GetSize()
        for of_image, of_source in (
            (image.GetOrigin(), source.GetOrigin()),
            (image.GetSpacing(), source.GetSpacing()),
            (image.GetDirection(), source.GetDirection()),
        ):
            np.testing.assert_allclose(of_image, of_source, atol=1e-4)
        values = sitk.GetArrayFromImage(image)
        assert values.min() >= 0
        assert 0 < values.max() <= 1 + 1e-6


def test_mask_and_entropy_follow_from_the_probability(predicted):
    probability = load(predicted / "out/probabilities/a.nii.gz")
    np.testing.assert_array_equal(load(predicted / "out/masks/a.nii.gz"), probability > 0.5)
    p = np.clip(probability.astype(np.float64), 1e-12, 1 - 1e-12)
    expected = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    np.testing.assert_allclose(load(predicted / "out/entropy/a.nii.gz"), expected, atol=1e-5)


def test_account_names_the_model_the_candidates_and_what_failed(predicted, capsys):
    record = json.loads((predicted / "out/predictions.json").read_text("utf-8"))
    assert "not a medical device" in record["disclaimer"]
    assert record["model"]["members"] == ["fold_0", "fold_1"]
    assert record["model"]["git_commit"] == "abc123"
    assert record["settings"]["threshold"] == 0.5
    a, b, c = record["cases"]
    assert (a["case_id"], b["case_id"], c["case_id"]) == ("a", "b", "c")
    assert "adc.nii.gz must be a readable image" in c["error"]
    assert not (predicted / "out/masks/c.nii.gz").exists()
    assert a["modalities"] == ["t2w", "adc"]
    assert a["missing_modalities"] == []
    mask = load(predicted / "out/masks/a.nii.gz")
    voxel_ml = 3.0 / 1000
    assert a["volume_ml"]["lesion"] == pytest.approx(mask.sum() * voxel_ml, abs=1e-3)
    confidences = [candidate["confidence"] for candidate in a["candidates"]]
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] == a["highest_probability"]["lesion"]


def test_run_and_artifact_are_one_model(predicted, run, tmp_path, capsys):
    predict.main(
        ["--model", str(run[0]), "--input", str(predicted / "in/a"), "--output", str(tmp_path)]
    )
    ours = json.loads((tmp_path / "predictions.json").read_text("utf-8"))
    theirs = json.loads((predicted / "out/predictions.json").read_text("utf-8"))
    assert ours["model"] == theirs["model"]
    np.testing.assert_array_equal(
        load(tmp_path / "probabilities/a.nii.gz"),
        load(predicted / "out/probabilities/a.nii.gz"),
    )
    assert "1 of 1 cases predicted" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "masks",
        "probabilities",
        "predictions.json",
        *("segmentations", "labels.txt", "cases.csv", "candidates.csv", "predictions.html"),
    }
    assert (tmp_path / ".lock").read_text("utf-8") == "", "no one holds the folder"


def test_chosen_folds_and_windows_change_the_result(predicted, artifact, tmp_path):
    predict.main(
        [
            *("--model", str(artifact), "--input", str(predicted / "in/a")),
            *("--output", str(tmp_path), "--folds", "1", "--overlap", "0", "--uncertainty"),
        ]
    )
    record = json.loads((tmp_path / "predictions.json").read_text("utf-8"))
    assert record["model"]["members"] == ["fold_1"]
    assert record["settings"]["overlap"] == 0
    assert not load(tmp_path / "disagreement/a.nii.gz").any()


def test_results_of_another_model_are_refused(predicted, artifact):
    arguments = ["--model", str(artifact), "--input", str(predicted / "in/a"), "--folds", "0"]
    with pytest.raises(ConfigError, match="holds the results of one model and its settings"):
        predict.main([*arguments, "--output", str(predicted / "out")])


def test_an_interrupted_prediction_goes_on_and_a_whole_one_begins_anew(
    quick, tmp_path, monkeypatch, capsys
):
    write_folder(tmp_path / "in", case_of("a"), case_of("b", seed=1), case_of("c", seed=2))
    arguments = ["--model", str(quick), "--input", str(tmp_path / "in"), "--output"]
    compute, computed = predict.compute, []

    def interrupted(models, cases, extras):
        if cases[0].case.case_id == "b" and "b" not in computed:
            computed.append("b")
            raise KeyboardInterrupt
        computed.append(cases[0].case.case_id)
        return compute(models, cases, extras)

    monkeypatch.setattr(predict, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict.main([*arguments, str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/predictions.json").read_text("utf-8"))
    assert [case["case_id"] for case in record["cases"]] == ["a"]
    with pytest.raises(ConfigError, match="holds the results of one model and its settings"):
        predict.main([*arguments, str(tmp_path / "out"), "--threshold=0.4"])

    computed.append("again")
    predict.main([*arguments, str(tmp_path / "out")])
    assert computed == ["a", "b", "again", "b", "c"]
    assert "2 cases; lesion from t2w, adc" in (said := capsys.readouterr().out)
    assert "1 were predicted before the interruption" in said
    record = json.loads((tmp_path / "out/predictions.json").read_text("utf-8"))
    assert [case["case_id"] for case in record["cases"]] == ["a", "b", "c"]

    computed.append("anew")
    predict.main(["--model", str(quick), "--input", str(tmp_path / "in/b"), *arguments[4:],
                  str(tmp_path / "out")])  # fmt: skip
    assert computed[-2:] == ["anew", "b"], "what came to its end is predicted again"
    record = json.loads((tmp_path / "out/predictions.json").read_text("utf-8"))
    assert [case["case_id"] for case in record["cases"]] == ["a", "b", "c"], "others are kept"


def test_a_killed_prediction_has_recorded_every_case_that_it_finished(
    quick, tmp_path, monkeypatch, capsys
):
    write_folder(tmp_path / "in", *(case_of(name, seed=n) for n, name in enumerate("abcd")))
    out = tmp_path / "out"
    arguments = ["--model", str(quick), "--input", str(tmp_path / "in"), "--output", str(out)]
    compute, computed = predict.compute, []

    def watched(models, cases, extras):
        if cases[0].case.case_id == "d" and "again" not in computed:
            raise RuntimeError("as if killed")
        computed.append(cases[0].case.case_id)
        return compute(models, cases, extras)

    monkeypatch.setattr(predict, "compute", watched)
    with monkeypatch.context() as killed:
        killed.setattr(predict, "recorded", lambda account: contextlib.nullcontext())
        with pytest.raises(RuntimeError, match="as if killed"):
            predict.main(arguments)
    record = record_of(out)
    assert not record["complete"]
    assert [case["case_id"] for case in record["cases"]] == ["a", "b", "c"]
    assert {*record["inputs"]} >= {"a", "b", "c"}
    assert {*record["cases"][0]["files"]} == {"masks/a.nii.gz", "probabilities/a.nii.gz"}

    whole = (out / "probabilities/b.nii.gz").read_bytes()
    (out / "masks/a.nii.gz").unlink()
    (out / "probabilities/b.nii.gz").write_bytes(whole[:-1])
    left = [out / "masks/.d.4242.nii.gz", out / ".predictions.4242.json"]
    for path in left:
        path.write_bytes(b"half")
    computed.append("again")
    predict.main(arguments)
    assert computed[-4:] == ["again", "a", "b", "d"], "c alone is as it was written"
    assert "1 were predicted before the interruption" in capsys.readouterr().out
    assert (out / "masks/a.nii.gz").exists()
    assert (out / "probabilities/b.nii.gz").read_bytes() == whole
    assert not any(path.exists() for path in left)
    assert [case["case_id"] for case in record_of(out)["cases"]] == [*"abcd"]
    assert record_of(out)["complete"]

    (out / "masks/a.nii.gz").unlink()
    predict.main([*arguments[:2], "--input", str(tmp_path / "in/b"), *arguments[4:]])
    assert "the record of case a is left out: its images in" in capsys.readouterr().err
    assert [case["case_id"] for case in record_of(out)["cases"]] == [*"bcd"]


def test_one_command_works_on_a_folder_at_a_time(quick, tmp_path):
    write_folder(tmp_path / "in", case_of("a"))
    (tmp_path / "out").mkdir()
    arguments = ["--model", str(quick), "--input", str(tmp_path / "in")]
    with (
        locked(tmp_path / "out"),
        pytest.raises(ConfigError, match=r"one process works on a folder at a time; .*/out is in"),
    ):
        predict.main([*arguments, "--output", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_case_without_finite_probabilities_is_passed_over(quick, tmp_path, monkeypatch, capsys):
    write_folder(tmp_path / "in", case_of("a"), case_of("b", seed=1))
    run_program = models.run_program

    def diverged(model, case, program="predict"):
        found = run_program(model, case, program)
        if case.case_id == "a":
            found.probability[0, 0, 0] = np.nan
        return found

    monkeypatch.setattr(models, "run_program", diverged)
    with pytest.raises(SystemExit) as stopped:
        predict.main(
            ["--model", str(quick), "--input", str(tmp_path / "in"),
             "--output", str(tmp_path / "out")]
        )  # fmt: skip
    assert stopped.value.code == 4
    assert "case a is passed over: probabilities must be finite" in capsys.readouterr().err
    a, b = record_of(tmp_path / "out")["cases"]
    assert "probabilities must be finite; got NaN" in a["error"]
    assert "error" not in b
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["b.nii.gz"]


def test_a_full_disk_ends_with_the_path_and_keeps_what_is_done(quick, tmp_path, monkeypatch):
    write_folder(tmp_path / "in", case_of("a"), case_of("b", seed=1))
    out, save = tmp_path / "out", nib.save

    def full(image, path):
        save(image, path)
        if ".b." in path.name and path.parent.name == "masks":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    arguments = ["--model", str(quick), "--input", str(tmp_path / "in"), "--output", str(out)]
    with pytest.raises(OSError, match="cannot write: No space left") as stopped:
        predict.main(arguments)
    assert stopped.value.filename == str(out / "masks/b.nii.gz")
    assert [case["case_id"] for case in record_of(out)["cases"]] == ["a"]
    assert [path.name for path in (out / "masks").iterdir()] == ["a.nii.gz"]


def test_what_a_model_was_trained_on_is_said_and_compared(quick, tmp_path, capsys):
    write_folder(tmp_path / "in", case_of("a"))
    arguments = ["--model", str(quick), "--input", str(tmp_path / "in"), "--output"]
    predict.main([*arguments, str(tmp_path / "unknown")])
    said = capsys.readouterr()
    assert "the model was trained on data that are not known" in said.out
    assert said.err == ""
    (case,) = record_of(tmp_path / "unknown")["cases"]
    assert "warnings" not in case

    like = ModalityData(7, ((3.0, 3.0), (0.4, 2.0), (0.4, 2.0)), (1.0, 1e5))
    other = dataclasses.replace(like, spacing_mm=((9.0, 9.0), (0.4, 3.0), (0.4, 3.0)))
    data = TrainingData("phantom", True, 7, 6, 5, {"t2w": like, "adc": other})
    model = predict.export.load(quick)
    model.description.provenance["training_data"] = to_provenance(data)
    predict.main([*arguments, str(tmp_path / "known")])
    said = capsys.readouterr()
    assert "trained on 7 cases of 6 drawn subjects, 5 of them positive, of the" in said.out
    assert "warning: this model has seen synthetic images alone" in said.err
    record = record_of(tmp_path / "known")
    assert record["model"]["training_data"]["name"] == "phantom"
    (warning,) = record["cases"][0]["warnings"]
    assert "'adc' should have voxels like those that the model was trained on; got 3 mm" in warning
    assert f"warning: case a: {warning}" in said.err
    model.description.provenance["training_data"] = 7
    with pytest.raises(ConfigError, match="must say what it was trained on as this version does"):
        predict.main([*arguments, str(tmp_path / "odd")])


def test_volumes_that_nothing_reads_are_named(quick, tmp_path, capsys):
    write_folder(tmp_path / "in", case_of("a"))
    for name in ("sub1_ktrans", "t2", "lesion_2", "hbv", "prostate_mask"):
        (tmp_path / f"in/a/{name}.nii.gz").write_bytes(b"")
    (tmp_path / "in/a/notes.txt").touch()
    predict.main(
        ["--model", str(quick), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    )
    (case,) = record_of(tmp_path / "out")["cases"]
    (warning,) = case["warnings"]
    assert "should be used; got sub1_ktrans.nii.gz, t2.nii.gz, of which nothing is read" in warning
    assert "Rename it if it is one of t2w, adc," in warning
    assert f"warning: case a: {warning}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "spleen"}, "a target must be lesion, gland.*got 'spleen' without"),
        ({"modalities": ("T2W", "adc")}, "called t2w, adc here; got T2W, adc"),
        ({"preprocess": {"centre": "feet"}}, "preprocess.centre is 'feet' where"),
        ({"preprocess": {"clip_percentiles": [0.5]}}, r"clip_percentiles is \[0.5\] where"),
        ({"preprocess": {"clip_percentiles": [99, 1]}}, "percentiles must rise within 0 to 100"),
        ({"preprocess": {"size": "all"}}, "preprocess.size is 'all' where"),
        ({"preprocess": {"colour": 1}}, "got 'colour' in PreprocessConfig"),
        ({"preprocess": {"centre": "gland"}, "target": "gland"}, "placed by what is to be found"),
    ],
)
def test_what_a_model_says_of_its_images_is_checked_before_any_is_read(
    change, message, quick, tmp_path
):
    model = predict.export.load(quick)
    description = dataclasses.replace(model.description, **change)
    with pytest.raises(ConfigError, match=message):
        data_config(description)
    assert data_config(model.description).modalities == MODALITIES


def test_missing_modality_is_a_fault_unless_trained_for(artifact, tmp_path, capsys):
    write_folder(tmp_path / "in", case_of("a", images=("adc",)), case_of("b"))
    arguments = ["--input", str(tmp_path / "in"), "--model"]
    with pytest.raises(SystemExit):
        predict.main([*arguments, str(artifact), "--output", str(tmp_path / "strict")])
    assert "case a is passed over: a case must have every modality" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "strict/masks").iterdir()] == ["b.nii.gz"]

    with zipfile.ZipFile(artifact) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files["manifest.json"])
    manifest["description"]["allow_missing"] = True  # as after training with modality dropout
    files["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(tmp_path / "ready.cmsad", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    ready = str(tmp_path / "ready.cmsad")
    predict.main([*arguments, ready, "--output", str(tmp_path / "trained")])
    case = json.loads((tmp_path / "trained/predictions.json").read_text("utf-8"))["cases"][0]
    assert case["modalities"] == ["adc"]
    assert case["missing_modalities"] == ["t2w"]
    mask = nib.load(tmp_path / "trained/masks/a.nii.gz")
    assert mask.shape == nib.load(tmp_path / "in/a/adc.nii.gz").shape, "without T2W, ADC's frame"


def test_candidates_are_those_that_are_counted_in_detection():
    probability = np.full((4, 20, 24), 0.01, np.float32)
    probability[1:3, 2:6, 5:9] = 0.9  # 32 voxels
    probability[1:3, 12:16, 12:17] = 0.4  # 40 voxels, below the threshold of the mask
    probability[0, 18, 0:3] = 0.95  # too small
    grid = affine((3.0, 0.5, 0.4))
    first, second = lesions.candidates(probability, grid)
    assert first.volume_ml == pytest.approx(32 * 0.6 / 1000, abs=1e-4)
    assert second.volume_ml == pytest.approx(40 * 0.6 / 1000, abs=1e-4)
    assert (first.confidence, second.confidence) == pytest.approx((0.9, 0.4))
    expected = nib.affines.apply_affine(grid, [6.5, 3.5, 1.5])
    np.testing.assert_allclose(first.centre_mm, expected, atol=0.01)
    counted = lesions.detect(probability, np.zeros(probability.shape, np.uint8)).lesions
    found = sorted(candidate.confidence for candidate in (first, second))
    assert sorted(match.confidence for match in counted) == pytest.approx(found)
    assert lesions.candidates(np.zeros((2, 3, 4), np.float32), grid) == ()


def names_of(root):
    return {
        case.case_id: {name: path.name for name, path in case.images.items()}
        for case in find_inputs(root, MODALITIES)
    }


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_cases_are_found_in_every_layout(tmp_path):
    touch(tmp_path / "one", "T2W.nii.gz", "adc_map.nrrd", "lesion.nii.gz", "notes.txt")
    assert names_of(tmp_path / "one") == {"one": {"t2w": "T2W.nii.gz", "adc": "adc_map.nrrd"}}

    touch(tmp_path / "many", "x/t2w.mha", "x/adc.mha", "y/t2.nii", "y/adc.nii", ".z/adc.nii.gz")
    assert names_of(tmp_path / "many").keys() >= {"x", "y"}

    picai = tmp_path / "picai"
    for study in ("10000_1000000", "10000_1000001"):
        touch(picai, *(f"images/10000/{study}_{name}.mha" for name in ("t2w", "adc", "hbv", "sag")))
    touch(picai, "labels/10000_1000000.nii.gz")
    assert names_of(picai) == {
        study: {name: f"{study}_{name}.mha" for name in MODALITIES}
        for study in ("10000_1000000", "10000_1000001")
    }

    nnunet = tmp_path / "nnunet"
    touch(
        nnunet, "imagesTs/p_1_0000.nii.gz", "imagesTs/p_1_0001.nii.gz", "imagesTs/p_1_0002.nii.gz"
    )
    channels = {"0": "T2W", "1": "ADC map", "2": "PET"}
    (nnunet / "dataset.json").write_text(json.dumps({"channel_names": channels}), encoding="utf-8")
    assert names_of(nnunet) == {"p_1": {"t2w": "p_1_0000.nii.gz", "adc": "p_1_0001.nii.gz"}}

    touch(tmp_path / "flat", "kim_t2_tse.mha", "kim_adc.mha", "lee-t2w.mha", "lee-adc.mha")
    assert names_of(tmp_path / "flat") == {
        "kim": {"t2w": "kim_t2_tse.mha", "adc": "kim_adc.mha"},
        "lee": {"t2w": "lee-t2w.mha", "adc": "lee-adc.mha"},
    }


def test_the_mask_of_the_gland_is_found_in_every_layout(tmp_path):
    touch(tmp_path / "many", "x/t2w.mha", "x/adc.mha", "x/gland.nii.gz")
    touch(tmp_path / "picai", "p/p_1_t2w.mha", "p/p_1_adc.mha", "p/p_1_gland.nii.gz")
    touch(tmp_path / "nnunet", *(f"imagesTs/a_{end}.nii.gz" for end in ("0000", "0001", "gland")))
    touch(tmp_path / "nnunet", *(f"imagesTs/b_{end}.nii.gz" for end in ("0000", "0001", "0002")))
    touch(tmp_path / "nnunet", "imagesTs/c_0001.nii.gz", "glandTr/c.nii.gz")
    touch(tmp_path / "decathlon", "imagesTs/d_4.nii.gz", "imagesTs/d_4_gland.nii.gz")
    channels = {"0": "T2", "1": "ADC", "2": "gland"}
    for name in ("nnunet", "decathlon"):
        (tmp_path / name / "dataset.json").write_text(
            json.dumps({"channel_names": channels}), encoding="utf-8"
        )
        channels.popitem()
    found = {
        case.case_id: case.gland.name if case.gland else None
        for name in ("many", "picai", "nnunet", "decathlon")
        for case in find_inputs(tmp_path / name, MODALITIES, with_gland=True)
    }
    assert found == {
        "x": "gland.nii.gz",
        "p_1": "p_1_gland.nii.gz",
        "a": "a_gland.nii.gz",
        "b": "b_0002.nii.gz",
        "c": None,
        "d_4": "d_4_gland.nii.gz",
    }


def test_modalities_along_a_fourth_axis_are_told_apart(tmp_path, artifact):
    """Files of the Decathlon, the modalities in another order than the model's."""
    fine = case_of("a").images["t2w"]
    adc = np.flip(fine.array, 1) // 2
    both = np.stack([adc, fine.array]).T
    images = tmp_path / "Task05/imagesTs"
    images.mkdir(parents=True)
    nib.save(nib.Nifti1Image(both, fine.affine), images / "prostate_03.nii.gz")
    save(tmp_path / "Task05/labelsTr/prostate_03.nii.gz", fine)
    nib.save(nib.Nifti1Image(fine.array.T, fine.affine), images / "prostate_04.nii.gz")
    modalities = {"modality": {"0": "ADC", "1": "T2"}}
    (tmp_path / "Task05/dataset.json").write_text(json.dumps(modalities), encoding="utf-8")
    arguments = ["--model", str(artifact), "--input"]
    with pytest.raises(SystemExit):
        predict.main([*arguments, str(tmp_path / "Task05"), "--output", str(tmp_path / "out")])
    good, bad = json.loads((tmp_path / "out/predictions.json").read_text("utf-8"))["cases"]
    assert (good["case_id"], good["modalities"]) == ("prostate_03", ["t2w", "adc"])
    assert "prostate_04.nii.gz must have a fourth axis with channel" in bad["error"]

    save(tmp_path / "apart/prostate_03/t2w.nii.gz", fine)
    save(tmp_path / "apart/prostate_03/adc.nii.gz", Volume(adc, fine.affine))
    predict.main([*arguments, str(tmp_path / "apart"), "--output", str(tmp_path / "expected")])
    np.testing.assert_array_equal(
        load(tmp_path / "out/probabilities/prostate_03.nii.gz"),
        load(tmp_path / "expected/probabilities/prostate_03.nii.gz"),
    )

    touch(tmp_path, "one/case.nii", "one/adc.nii", "two/case.nii", "two/adc.nii")
    (tmp_path / "one/dataset.json").write_text(json.dumps(modalities), encoding="utf-8")
    assert names_of(tmp_path / "one") == {
        "case": {"t2w": "case.nii", "adc": "case.nii"},
        "one": {"adc": "adc.nii"},
    }
    assert names_of(tmp_path / "two") == {"two": {"adc": "adc.nii"}}, "no one names the channels"


def test_dicom_folders_and_the_gland_for_the_crop_are_read(tmp_path, config):
    raw = raw_case("a")
    for name in MODALITIES:
        volume = Volume(raw.images[name].array.astype(np.int16), raw.images[name].affine)
        write_dicom(tmp_path / "a" / name.upper(), volume)
    mask = np.zeros(raw.images["t2w"].shape, np.uint8)
    mask[3:6, 4:9, 12:20] = 1
    save(tmp_path / "a/gland.nii.gz", Volume(mask, raw.images["t2w"].affine))
    grid = dataclasses.replace(config.data.preprocess, centre="gland", size=(3, 8, 8))
    data = dataclasses.replace(config.data, preprocess=grid)
    (files,) = find_inputs(tmp_path, MODALITIES, with_gland=True)
    read = read_case(files, data)
    expected = preprocessing.preprocess_case(
        dataclasses.replace(case_of("a"), gland=Volume(mask, raw.images["t2w"].affine)),
        data,
        require_label=False,
    )
    np.testing.assert_allclose(read.affine, expected.affine, atol=1e-3)
    np.testing.assert_allclose(read.image, expected.image, atol=2)  # multiples of 1 / 2048

    (without,) = find_inputs(tmp_path, MODALITIES)
    with pytest.raises(
        DataError, match=r"needs a mask of it; got none for a\. Add gland\.nii\.gz to"
    ):
        read_case(without, data)


def test_a_threshold_is_refused_where_the_most_probable_class_is_taken(
    artifact, tmp_path, monkeypatch
):
    model = cmsad_jax.export.load(artifact)
    zones = dataclasses.replace(model.description, classes=("pz", "tz"))
    monkeypatch.setattr(
        predict.export, "load", lambda _: dataclasses.replace(model, description=zones)
    )
    with pytest.raises(ConfigError, match=r"goes with one class; got 0\.4 for pz, tz"):
        predict.open_command(predict.PredictCommand((artifact,), tmp_path, tmp_path, threshold=0.4))


def test_inputs_without_a_case_are_refused(tmp_path):
    touch(tmp_path, "lesion.nii.gz", "t2w.txt")
    with pytest.raises(
        DataError, match=r"named by modality \(t2w, adc\), such as CASE/t2w.nii.gz .* found none"
    ):
        find_inputs(tmp_path, MODALITIES)
    with pytest.raises(DataError, match="the input must be a folder"):
        find_inputs(tmp_path / "nowhere", MODALITIES)
    touch(tmp_path, "n/imagesTs/a_0000.nii.gz")
    (tmp_path / "n/dataset.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(DataError, match=r"must hold an object; got \[1\]"):
        find_inputs(tmp_path / "n", MODALITIES)


def test_ambiguous_cases_are_passed_over(tmp_path, artifact, capsys):
    write_folder(tmp_path / "in", case_of("a"), case_of("b"))
    write_folder(tmp_path / "in/other", case_of("a"))
    save(tmp_path / "in/b/t2w.mha", Volume(np.zeros((2, 3, 3), np.int16), affine()))
    arguments = ["--model", str(artifact), "--input", str(tmp_path / "in")]
    with pytest.raises(SystemExit):
        predict.main([*arguments, "--output", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert "must have one file for 't2w'; got t2w.mha, t2w.nii.gz" in errors
    assert sorted(p.name for p in (tmp_path / "out/masks").iterdir()) == [
        "a.nii.gz",
        "other_a.nii.gz",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "1"], "threshold must lie between 0 and 1"),
        (["--overlap", "1"], "overlap be 0 or more and below 1"),
        (["--batch-size", "0"], "batch size must be 1 or more; got 0"),
        (["--folds", "7"], "members must be among fold_0, fold_1; got fold_7"),
    ],
)
def test_options_that_cannot_work_are_refused(artifact, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        predict.main(
            ["--model", str(artifact), "--input", str(tmp_path), "--output", "out", *options]
        )


def test_no_model_is_said(tmp_path):
    with pytest.raises(ConfigError, match="the model must be a run folder or an artifact"):
        predict.main(
            ["--model", str(tmp_path / "none"), "--input", str(tmp_path), "--output", "out"]
        )


def test_cases_are_read_ahead_but_not_all_of_them():
    read, ready = [], threading.Event()

    def slow(item):
        read.append(item)
        if len(read) == 2:
            ready.set()
        return item * item

    with ThreadPoolExecutor(1) as executor:
        results = predict.read_ahead(executor, slow, range(20))
        assert next(results) == 0
        assert ready.wait(10), "the next one is read while this one is used"
        assert [next(results) for _ in range(5)] == [1, 4, 9, 16, 25]
        assert len(read) <= 6 + predict.READ_AHEAD
        assert list(results) == [n * n for n in range(6, 20)]


def test_several_classes_and_networks_of_slices(config, tmp_path):
    """Zones from a stand-in for a network of slices: class by intensity of the T2W."""

    def program(weights, windows, present):
        assert windows.shape[1:] == (8, 8, 2)
        value = windows[..., 0]
        logits = np.stack([np.zeros_like(value), value, 2 * value - 1], -1)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        return share / share.sum(-1, keepdims=True)

    description = describe(config, members=["a"], provenance={}, metrics={}, license="")
    description = dataclasses.replace(
        description, target="zones", classes=("pz", "tz"), window=(8, 8)
    )
    model = cmsad_jax.export.Model(description, {"predict": program}, ({},), "", "", ("0",))
    data = data_config(description)
    assert data.classes == ("pz", "tz")
    case = preprocessing.preprocess_case(case_of("a"), data, require_label=False)
    computed = predict.compute(Models((model,), (data,)), (Prepared(case),), Extras())
    account = PredictionFolder(tmp_path).write_case(computed, description, uncertainty=True)
    mask = load(tmp_path / "masks/a.nii.gz")
    pz, tz = (load(tmp_path / f"probabilities/a_{name}.nii.gz") for name in description.classes)
    assert set(np.unique(mask)) == {0, 1, 2}
    np.testing.assert_array_equal(mask == 2, (tz > pz) & (tz > 1 - pz - tz) & (pz + tz > 0))
    assert account.candidates is None, "a zone is always there"
    assert account.volume_ml["tz"] == pytest.approx((mask == 2).sum() * 3.0 / 1000, abs=1e-3)
    assert account.highest_probability["tz"] == pytest.approx(tz.max(), abs=1e-6)
    assert load(tmp_path / "entropy/a.nii.gz").max() <= 1 + 1e-6


def test_weights_of_modalities_and_draws_are_told_of_models_that_have_them(tmp_path):
    config = tiny_config()
    encoder = dataclasses.replace(
        config.network.encoder,
        block="plain",
        slices="csam",
        slice_attention=SliceAttentionConfig(sampling=True, stages=(0,)),
    )
    network = dataclasses.replace(
        config.network, encoder=encoder, fusion=FusionConfig(kind="weighted", hidden=4)
    )
    make_untrained_run(tmp_path / "run", dataclasses.replace(config, network=network), done=1)
    write_artifact(tmp_path / "run", tmp_path / "model.cmsad", folds=[0], platforms=("cpu",))
    model = cmsad_jax.export.load(tmp_path / "model.cmsad")
    assert {*model.programs} == {"predict", "attention", "modality_weights", "drawn"}
    case = preprocessing.preprocess_case(case_of("a"), config.data, require_label=False)
    models = Models((model,), (config.data,))
    assert predict.compute(models, (Prepared(case),), Extras()).drawn is None
    computed = predict.compute(models, (Prepared(case),), Extras(uncertainty=True))
    drawn = computed.drawn
    assert 1e-6 < drawn.max() < 0.5
    folder = PredictionFolder(tmp_path / "out")
    told = folder.write_case(computed, model.description, uncertainty=True)
    assert [*told.modality_weights] == ["t2w", "adc"]
    assert sum(told.modality_weights.values()) == pytest.approx(1, abs=1e-5)
    assert 0 < told.modality_weights["adc"] < 1
    assert load(folder.image("drawn", "a")).max() == pytest.approx(drawn.max(), rel=0.2)


def record_of(output):
    return json.loads((output / "predictions.json").read_text("utf-8"))


def test_a_result_never_replaces_that_of_other_images(quick, tmp_path, capsys):
    for seed, patient in enumerate("AB"):
        write_folder(tmp_path / patient, case_of("mri", seed=seed))
    arguments = ["--model", str(quick), "--output", str(tmp_path / "out"), "--input"]
    predict.main([*arguments, str(tmp_path / "A/mri")])
    before = record_of(tmp_path / "out")["cases"]
    mask = (tmp_path / "out/probabilities/mri.nii.gz").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        predict.main([*arguments, str(tmp_path / "B/mri")])
    assert stopped.value.code == 4
    assert "a result must not replace that of other images" in capsys.readouterr().err
    assert record_of(tmp_path / "out")["cases"] == before
    assert (tmp_path / "out/probabilities/mri.nii.gz").read_bytes() == mask
    predict.main([*arguments, str(tmp_path / "A/mri")])  # the same images may be predicted again
    assert record_of(tmp_path / "out")["cases"] == before
    (tmp_path / "both").mkdir()
    for patient in "AB":
        (tmp_path / "both" / patient).symlink_to(tmp_path / patient)
    predict.main([*arguments, str(tmp_path / "both")])
    assert [case["case_id"] for case in record_of(tmp_path / "out")["cases"]] == [
        "A_mri",
        "B_mri",
        "mri",
    ]


def test_what_was_done_before_an_interruption_must_be_of_the_same_images(quick, tmp_path):
    for seed, patient in enumerate("AB"):
        write_folder(tmp_path / patient, case_of("mri", seed=seed))
    arguments = ["--model", str(quick), "--output", str(tmp_path / "out"), "--input"]
    predict.main([*arguments, str(tmp_path / "A/mri")])
    record = record_of(tmp_path / "out")
    (tmp_path / "out/predictions.json").write_text(
        json.dumps(record | {"complete": False}), encoding="utf-8"
    )
    with pytest.raises(SystemExit):
        predict.main([*arguments, str(tmp_path / "B/mri")])
    assert record_of(tmp_path / "out")["cases"] == record["cases"]


def test_results_may_lie_within_the_input(quick, tmp_path):
    write_folder(tmp_path / "in", case_of("c9"))
    arguments = ["--model", str(quick), "--attention", "--input", str(tmp_path / "in")]
    for _ in range(2):
        predict.main([*arguments, "--output", str(tmp_path / "in/results")])
        record = record_of(tmp_path / "in/results")
        assert [case["case_id"] for case in record["cases"]] == ["c9"]
        assert record["complete"]


def test_masks_of_a_sheared_image_are_measured_where_it_lies(artifact, tmp_path):
    sheared = affine((3.0, 1.0, 1.0))
    sheared[:3, 2] += [0, 0.4, 0]
    raw = case_of("shear")
    for name in MODALITIES:
        path = tmp_path / f"in/shear/{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(raw.images["t2w"].array.T, sheared)
        image.set_qform(None, 0)
        nib.save(image, path)
    arguments = ["--model", str(artifact), "--input", str(tmp_path / "in"), "--output"]
    predict.main([*arguments, str(tmp_path / "out")])
    mask = nib.load(tmp_path / "out/masks/shear.nii.gz")
    np.testing.assert_allclose(mask.affine, sheared, atol=1e-5)
    (tmp_path / "labels").mkdir()
    truth = nib.Nifti1Image(np.asarray(mask.dataobj), sheared)
    truth.set_qform(None, 0)
    nib.save(truth, tmp_path / "labels/shear.nii.gz")
    evaluate.main(
        [str(tmp_path / "out/masks"), str(tmp_path / "labels"), "--output", str(tmp_path / "m")]
    )
    (row,) = json.loads((tmp_path / "m/metrics.json").read_text("utf-8"))["metric_per_case"]
    assert row["dice"] == 1


def test_a_stray_part_of_the_gland_moves_no_crop_and_is_said(config, tmp_path, capsys):
    raw = case_of("a")
    gland = np.zeros(raw.images["t2w"].shape, np.uint8)
    gland[2:6, 6:16, 6:16] = 1
    stray = gland.copy()
    stray[0, 0, 0] = 1
    grid = dataclasses.replace(config.data.preprocess, centre="gland")
    around = dataclasses.replace(config, data=dataclasses.replace(config.data, preprocess=grid))
    make_untrained_run(tmp_path / "run", around, done=1)
    for name, mask in (("clean", gland), ("stray", stray)):
        write_folder(tmp_path / name, raw)
        save(tmp_path / name / "a/gland.nii.gz", Volume(mask, raw.images["t2w"].affine))
        predict.main(
            [
                *("--model", str(tmp_path / "run"), "--folds", "0"),
                *("--input", str(tmp_path / name), "--output", str(tmp_path / f"{name}_out")),
            ]
        )
    np.testing.assert_array_equal(
        load(tmp_path / "clean_out/probabilities/a.nii.gz"),
        load(tmp_path / "stray_out/probabilities/a.nii.gz"),
    )
    assert "warning: case a: the mask of the gland should be one" in capsys.readouterr().err
    (clean,), (said,) = (record_of(tmp_path / f"{n}_out")["cases"] for n in ("clean", "stray"))
    assert "warnings" not in clean
    assert "got 2, the largest of 1.2 ml and 0.003 ml in the others" in said["warnings"][0]
