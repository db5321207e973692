"""What people open of a folder of predictions: page, tables, segmentations for Slicer and DICOM."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import SimpleITK as sitk
from playwright.sync_api import sync_playwright

import cmsad_jax.export
from data_pipelines.faults import DataError
from data_pipelines.preparing.geometry import canonical
from data_pipelines.reading.volume_io import read_volume
from data_pipelines.targets import target_of
from experiments import predict
from experiments.exporting.artifact import describe
from experiments.prediction import segments
from experiments.prediction.outputs import PredictedCase
from experiments.prediction.sharing import cases_csv, parts_of_file
from experiments.reporting.prediction_page import candidate_table, prediction_table
from tests.data_pipelines.fabricate import raw_case, write_dicom, write_folder
from tests.experiments.test_report import decoded, viewer_data
from tests.experiments.test_report_browser import CHROMIUM, DRAWN
from tests.experiments.untrained_run import tiny_config

FRAME = {"0020|0052": "1.2.3.77", "0010|0020": "P1", "0020|0010": "S1"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A case of files, one of DICOM series and a broken one, by a model: brighter is likelier."""
    root = tmp_path_factory.mktemp("shared")

    def probability(weights, windows, present):
        return 1 / (1 + np.exp(-2 * windows[..., :1]))

    model = cmsad_jax.export.Model(
        describe(
            tiny_config(),
            members=["fold_0"],
            provenance={"config": {"data": {"name": "phantom2"}}},
            metrics={},
            license="",
        ),
        {"predict": probability},
        ({},),
        card="",
        license_text="",
        digests=("0",),
    )
    raw = raw_case("a")
    images = {name: raw.images[name] for name in ("t2w", "adc")}
    write_folder(root / "in", dataclasses.replace(raw, images=images, label=None))
    for name, image in images.items():
        write_dicom(root / "in" / "d" / name, image, name=name, tags=FRAME)
    write_folder(root / "in", dataclasses.replace(raw, case_id="z", images=images, label=None))
    (root / "in/z/adc.nii.gz").write_bytes(b"broken")
    (root / "model.cmsad").touch()
    arguments = ["--model", str(root / "model.cmsad"), "--input", str(root / "in")]
    arguments += ["--output", str(root / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict.export, "load", lambda _: model)
        with pytest.raises(SystemExit) as stopped:
            predict.main(arguments)
    assert stopped.value.code == 4
    return root


def mask_of(shared, case_id):
    return read_volume(shared / "out" / "masks" / f"{case_id}.nii.gz")


def test_slicer_finds_names_and_colours_where_the_mask_lies(shared):
    file = shared / "out/segmentations/a.seg.nrrd"
    found, mask = read_volume(file), mask_of(shared, "a")
    np.testing.assert_array_equal(found.array, mask.array)
    assert mask.array.any()
    np.testing.assert_allclose(found.affine, mask.affine, atol=1e-4)
    image = sitk.ReadImage(str(file))
    assert image.GetMetaData("Segment0_Name") == "lesion"
    assert image.GetMetaData("Segment0_LabelValue") == "1"
    color = [float(value) for value in image.GetMetaData("Segment0_Color").split()]
    assert color == pytest.approx([230 / 255, 60 / 255, 50 / 255], abs=1e-4)
    assert "SCT^52988006^Lesion" in image.GetMetaData("Segment0_Tags")
    low_i, high_i, *_, low_k, high_k = map(int, image.GetMetaData("Segment0_Extent").split())
    k, _, i = np.nonzero(mask.array)
    assert (low_i, high_i, low_k, high_k) == (i.min(), i.max(), k.min(), k.max())


def test_several_classes_are_segments_of_one_layer(tmp_path):
    mask = np.zeros((3, 4, 5), np.uint8)
    mask[1, 2, 1:3], mask[2, 0, 0] = 1, 2
    affine = np.array([[0.5, 0, 0, -9], [0, 0.5, 0.1, 4], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    named = segments.segments_of(target_of("organ", ("near=1", "far=2", "mine=3")))
    segments.write_seg_nrrd(tmp_path / "a.seg.nrrd", mask, affine, named)
    header = (tmp_path / "a.seg.nrrd").read_bytes().split(b"\n\n")[0].decode()
    assert "Segment1_Name:=far\n" in header
    assert "Prostate" not in header, "of one's own classes no region is known"
    assert "Segment1_Extent:=0 0 0 0 2 2\n" in header
    assert "Segment2_Extent:=0 -1 0 -1 0 -1\n" in header  # Slicer's way to say empty
    assert header.startswith("NRRD0004\n")
    assert len({each.color for each in named}) == 3


def test_a_segmentation_has_the_same_bytes_whatever_it_is_written_through(tmp_path, monkeypatch):
    mask, named = np.eye(4, dtype=np.uint8)[None], segments.segments_of(target_of("lesion"))
    written = []
    for pid in (1, 22):  # of which the name of the file that is being written is made
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        segments.write_seg_nrrd(tmp_path / f"{pid}.seg.nrrd", mask, np.eye(4), named)
        written.append((tmp_path / f"{pid}.seg.nrrd").read_bytes())
    assert written[0] == written[1]


def test_own_values_of_masks_are_parts_and_named(tmp_path):
    target = target_of("organs", ("near=5", "far=300"))
    written = target.to_file(np.array([[[0, 1, 2]]]))
    assert written.tolist() == [[[0, 5, 300]]]
    assert parts_of_file(written, target).tolist() == [[[0, 1, 2]]]
    lines = segments.label_descriptions(segments.segments_of(target), [5, 300])
    assert [line.split()[0] for line in lines.splitlines()[5:]] == ["0", "5", "300"]


def test_itk_snap_finds_the_labels(shared):
    lines = (shared / "out/labels.txt").read_text("utf-8").splitlines()
    rows = [line.split(None, 7) for line in lines if not line.startswith("#")]
    assert [(row[0], row[7]) for row in rows] == [("0", '"Clear Label"'), ("1", '"lesion"')]
    assert rows[1][1:4] == ["230", "60", "50"]
    assert lines[1] == "# ITK-SnAP Label Description File"


def dciodvfy(file):
    """What the validator of dicom3tools calls an error."""
    if shutil.which("dciodvfy") is None:
        if os.environ.get("CI"):
            pytest.fail("the checks must run with dciodvfy; install dicom3tools")
        pytest.skip("no dciodvfy on this machine")
    done = subprocess.run(
        ["dciodvfy", str(file)], capture_output=True, encoding="utf-8", check=False
    )
    said = (done.stdout + done.stderr).splitlines()
    assert "Segmentation" in said
    return [line for line in said if line.startswith("Error")]


def test_dicom_seg_refers_to_its_series_and_holds_the_mask(shared):
    highdicom = pytest.importorskip("highdicom")
    file = shared / "out/dicom_seg/d.dcm"
    found = highdicom.seg.segread(file)
    mask = mask_of(shared, "d").array
    import pydicom

    of_slice = {}
    for path in (shared / "in/d/t2w").iterdir():
        source = pydicom.dcmread(path)
        of_slice[float(source.ImagePositionPatient[2])] = source
    ordered = [source for _, source in sorted(of_slice.items())]
    uids = [source.SOPInstanceUID for source in ordered]
    frames = found.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(frames, mask)
    assert mask.any()
    assert found.PatientID == "P1"
    assert found.StudyInstanceUID == ordered[0].StudyInstanceUID
    assert found.FrameOfReferenceUID == "1.2.3.77"
    (segment,) = found.SegmentSequence
    assert (segment.SegmentLabel, segment.SegmentAlgorithmType) == ("lesion", "AUTOMATIC")
    assert dciodvfy(file) == []
    assert not (shared / "out/dicom_seg/a.dcm").exists()  # of no DICOM series
    assert "dicom_seg/*.dcm" in (shared / "out/predictions.html").read_text("utf-8")


@pytest.mark.parametrize(
    "target", [target_of("zones"), target_of("organ", ("near=1", "far=2"))], ids=["zones", "own"]
)
def test_dicom_seg_of_several_classes_and_of_nothing_is_valid_and_the_same_again(target, tmp_path):
    pytest.importorskip("highdicom")
    image = raw_case("a").images["t2w"]
    write_dicom(tmp_path / "t2w", image, tags=FRAME)
    affine = read_volume(tmp_path / "t2w").affine
    mask = np.zeros(image.shape, np.uint8)
    for name in ("empty", "full", "again"):
        file = tmp_path / f"{name}.dcm"
        named = segments.segments_of(target)
        segments.write_dicom_seg(file, mask, affine, tmp_path / "t2w", named, "ab")
        assert dciodvfy(file) == []
        mask[2, 3:6, 4:9], mask[3, 1:3, 4:6] = 1, 2
    import pydicom

    full, again = (pydicom.dcmread(tmp_path / f"{name}.dcm") for name in ("full", "again"))
    assert full.SOPInstanceUID == again.SOPInstanceUID
    regions = [getattr(each, "AnatomicRegionSequence", ()) for each in full.SegmentSequence]
    assert [len(found) for found in regions] == ([1, 1] if target.name == "zones" else [0, 0])
    assert full.PixelData == again.PixelData
    assert str(full.SOPInstanceUID).startswith("2.25.")


def test_what_a_dicom_seg_cannot_be_made_of_is_said(tmp_path):
    pytest.importorskip("highdicom")
    image = raw_case("a").images["t2w"]
    named = segments.segments_of(target_of("lesion"))
    mask = np.zeros(image.shape, np.uint8)
    write_dicom(tmp_path / "t2w", image)
    affine = read_volume(tmp_path / "t2w").affine

    def write(mask):
        segments.write_dicom_seg(tmp_path / "a.dcm", mask, affine, tmp_path / "t2w", named, "ab")

    with pytest.raises(DataError, match=r"frame of reference of its series; got none in .*t2w"):
        write(mask)
    write_dicom(tmp_path / "t2w", image, tags=FRAME)
    with pytest.raises(DataError, match="needs a file of the series for each slice; got"):
        write(mask[1:])
    with pytest.raises(DataError, match=r"does not give what it needs: .* Use the NIfTI mask"):
        write(mask[:, 1:])
    assert not (tmp_path / "a.dcm").exists()


def test_without_highdicom_it_is_said(shared, tmp_path, monkeypatch):
    from experiments.prediction import sharing
    from experiments.prediction.inputs import find_inputs
    from experiments.prediction.outputs import PredictionFolder

    shutil.copytree(shared / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/dicom_seg", ignore_errors=True)
    monkeypatch.setattr(sharing, "has_highdicom", lambda: False)
    entries = {entry.case_id: entry for entry in find_inputs(shared / "in", ("t2w", "adc"))}
    said = []
    folder = PredictionFolder(tmp_path / "out")
    sharing.write_segmentations(folder, ["a", "d"], entries, target_of("lesion"), "ab", said.append)
    assert said == [
        "no DICOM SEG of 1 cases read from DICOM: highdicom is not installed. "
        'Run pip install "cmsad-jax[dicom]" and predict again.'
    ]
    assert not (tmp_path / "out/dicom_seg").exists()


def test_tables_say_what_the_record_says(shared):
    record = json.loads((shared / "out/predictions.json").read_text("utf-8"))
    with (shared / "out/cases.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["case_id"]: row for row in csv.DictReader(file)}
    with (shared / "out/candidates.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert set(rows) == {"a", "d", "z"}
    for case in record["cases"]:
        row = rows[case["case_id"]]
        if "error" in case:
            assert row["error"] == case["error"] != ""
            assert row["volume_lesion_ml"] == ""
            continue
        assert float(row["volume_lesion_ml"]) == case["volume_ml"]["lesion"]
        assert row["modalities"] == "t2w adc"
        assert int(row["num_candidates"]) == len(case["candidates"]) > 0
        of_case = [row for row in found if row["case_id"] == case["case_id"]]
        assert [float(row["z_mm"]) for row in of_case] == [
            candidate["centre_mm"][2] for candidate in case["candidates"]
        ]
    judged = PredictedCase("q", called=True, lesion_probability=0.25, candidates=())
    assert cases_csv([judged], ["lesion"]).splitlines()[1] == "q,,,,,,0,0.25,True,"
    assert prediction_table([judged], ["lesion"]).rows[0][4:6] == ("0.250", "yes")
    assert candidate_table([PredictedCase("q", volume_ml={"gland": 1.0})], {}) is None


def test_page_shows_the_files_as_they_are(shared):
    html = (shared / "out/predictions.html").read_text("utf-8")
    assert "Research software, not a medical device" in html
    assert "trained on phantom2, synthetic" in html
    assert re.search(r"z could not be predicted: .*adc\.nii\.gz", html)
    cases = {case["id"]: case for case in viewer_data(html)}
    assert set(cases) == {"a", "d"}
    case, source = cases["a"], canonical(raw_case("a").images["t2w"])
    layer = case["layers"]["images"]["t2w"]
    step = (layer["high"] - layer["low"]) / 255
    values = decoded(layer, case["shape"], case["columns"])
    wanted = np.clip(source.array, layer["low"], layer["high"])
    np.testing.assert_allclose(values, wanted[:, ::-1, ::-1], atol=0.6 * step)
    shown = decoded(case["layers"]["prediction"], case["shape"], case["columns"])
    np.testing.assert_array_equal(shown, canonical(mask_of(shared, "a")).array[:, ::-1, ::-1])
    assert case["layers"]["truth"] is None
    np.testing.assert_allclose(case["affine"], source.affine[:3], rtol=1e-4, atol=1e-4)
    assert len(html.encode()) < 20e6


def test_candidates_open_where_they_are(shared):
    html = (shared / "out/predictions.html").read_text("utf-8")
    record = json.loads((shared / "out/predictions.json").read_text("utf-8"))
    first = next(case for case in record["cases"] if case["case_id"] == "a")["candidates"][0]
    affine = canonical(mask_of(shared, "a")).affine
    w, h, d = (np.linalg.inv(affine) @ [*first["centre_mm"], 1])[:3]
    z, x, y = re.search(
        r'data-case="a" data-slice="(\d+)" data-x="(.*?)" data-y="(.*?)"', html
    ).groups()
    _, height, width = canonical(raw_case("a").images["t2w"]).shape
    assert int(z) == round(d)
    assert (float(x), float(y)) == pytest.approx((width - w - 0.5, height - h - 0.5), abs=0.06)


@pytest.mark.parametrize("width", [400, 1280])
def test_page_works_in_a_browser(shared, width):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")  # tests of the report fail then, in CI
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.goto((shared / "out/predictions.html").as_uri())
        page.wait_for_function(DRAWN)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert not page.locator("#truth-control").is_visible()
        page.locator("#lesions tbody button").last.click()
        page.wait_for_function(DRAWN)
        assert "candidate" in page.locator("#viewer-lesion").inner_text()
        assert page.evaluate("document.activeElement.id") == "viewer-panes"
        browser.close()
    assert faults == []


def test_no_page_where_none_is_asked_for(shared, tmp_path, monkeypatch):
    command = predict.PredictCommand(
        (shared / "model.cmsad",), shared / "in", shared / "out", page=False
    )
    assert predict.PredictCommand(command.model, command.input, command.output).page
    folder = predict.PredictionFolder(tmp_path)
    record = predict.PredictionFolder(shared / "out").read()
    folder.write(dataclasses.replace(record, cases=()))

    class NoModel:
        description = describe(
            tiny_config(), members=["fold_0"], provenance={}, metrics={}, license=""
        )
        sha256 = "ab"

    predict.share(command, NoModel, [], folder)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("predictions.json", "cases.csv", "labels.txt")
    }
