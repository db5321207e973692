"""Everything that is wrong is told at once: ten planted faults, each warning, and the sheet."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import validate
from data_pipelines.building import validation
from data_pipelines.building.builders import open_builder
from data_pipelines.case import Volume
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, Problem, format_table
from data_pipelines.preparing import contact_sheet
from data_pipelines.preparing.examination import Facts, duplicates, examine, fingerprint
from data_pipelines.preparing.preprocessing import preprocess_case
from tests.data_pipelines.fabricate import SMALL, raw_case, write_folder

ROOT = Path(__file__).parents[2]


def real_adc(raw, scale=1.0):
    """The case with an ADC of tissue, in 1e-6 mm2/s times ``scale``."""
    adc = raw.images["adc"]
    rng = np.random.default_rng(ord(raw.case_id))
    values = (rng.normal(1200, 200, adc.shape) * scale).astype(np.float32)
    return dataclasses.replace(raw, images={**raw.images, "adc": Volume(values, adc.affine)})


def moved(volume: Volume, voxels) -> Volume:
    matrix = volume.affine.copy()
    matrix[:3, 3] += matrix[:3, :3] @ voxels
    return Volume(volume.array, matrix)


def with_part(raw, part, volume):
    if part == "label":
        return dataclasses.replace(raw, label=volume)
    return dataclasses.replace(raw, images={**raw.images, part: volume})


def texts(raw, config=None) -> list[str]:
    config = config or DataConfig(preprocess=SMALL)
    return [problem.text for problem in examine(raw.case_id, raw, (), {}, config).problems]


def run(config: DataConfig, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipelines.validate", f"--data.name={config.name}"]
    command += [f"--data.path={config.path}", f"--data.cache={config.cache}"]
    command += ["--data.preprocess.size", "6", "16", "16"]
    command += ["--data.preprocess.spacing-mm", "3", "1", "1", f"--output={tmp_path / 'out'}"]
    return subprocess.run([*command, *options], capture_output=True, encoding="utf-8", cwd=ROOT)


def plant_ten_faults(root: Path) -> tuple[DataConfig, dict[str, tuple[str, str, str]]]:
    """A folder with ten faults; for each the case, what the table must say, and its level."""
    raws = {name: real_adc(raw_case(name, seed=i)) for i, name in enumerate("abcdefghij")}
    raws["d"].label.array[4, 11, 10] = 999
    far = moved(raws["e"].images["adc"], [500, 0, 0])
    raws["e"] = with_part(raws["e"], "adc", far)
    raws["f"].images["hbv"].array[:] = 4
    raws["g"].images["hbv"].array[0, 0, 0] = np.nan
    raws["h"] = real_adc(raws["h"], scale=1e-3)
    raws["i"] = with_part(raws["i"], "t2w", raws["b"].images["t2w"])
    flipped = raws["j"].label.affine @ np.diag([-1, 1, 1, 1])
    flipped[:3, 3] += raws["j"].label.affine[:3, 0] * 23
    raws["j"] = with_part(raws["j"], "label", Volume(raws["j"].label.array, flipped))
    config = write_folder(root, *raws.values())
    (root / "a" / "hbv.nii.gz").unlink()
    (root / "b" / "lesion.nii.gz").unlink()
    content = (root / "c" / "t2w.nii.gz").read_bytes()
    (root / "c" / "t2w.nii.gz").write_bytes(content[: len(content) // 2])
    return config, {
        "missing modality": ("a", "a case must have every modality", "error"),
        "missing label": ("b", "a case must have a label for the target 'lesion'", "error"),
        "truncated file": ("c", "must be a readable image", "error"),
        "label value": ("d", "label values must be whole numbers from 0 to 255", "error"),
        "no overlap": ("e", "'adc' must overlap the reference image", "error"),
        "constant image": ("f", "'hbv' must vary within the crop", "error"),
        "NaN": ("g", "must hold finite values", "error"),
        "ADC unit": ("h", "'adc' should be in 1e-6 mm2/s", "warning"),
        "one image twice": ("i", "an image must belong to one patient and modality", "warning"),
        "left-right": ("j", "should be stored in one left-right order", "warning"),
    }


def test_ten_planted_faults_are_told_in_one_run(tmp_path):
    config, faults = plant_ten_faults(tmp_path / "data")
    done = run(config, tmp_path)
    assert done.returncode == 2
    assert "the data set cannot be built; cases: 10, errors: 7" in done.stdout
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("cases      10 of 10 patients")
    findings = validation.validate(open_builder(config))
    for case_id, text, level in faults.values():
        hits = [
            problem
            for problem in findings.problems
            if problem.case_id == case_id and text in problem.text
        ]
        assert [problem.level for problem in hits] == [level], text
        for problem in hits:
            assert problem.rule
            assert problem.came
            assert problem.remedy
    assert len(findings.problems) == len(faults)
    assert {tile.case_id for tile in findings.tiles} == set("hij")
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
    with pytest.raises(DataError, match="the data set cannot be built; cases: 10, errors: 7"):
        validation.check(open_builder(config), print)


def test_faults_of_one_case_do_not_hide_each_other(tmp_path):
    raw = real_adc(raw_case("a"))
    raw.label.array[4, 11, 10] = 999
    raw.images["hbv"].array[:] = 4
    config = write_folder(tmp_path / "data", raw)
    (config.path / "a" / "adc.nii.gz").write_bytes(b"")
    problems = validation.validate(open_builder(config)).problems
    assert [problem.file.name for problem in problems] == [
        "adc.nii.gz",
        "hbv.nii.gz",
        "lesion.nii.gz",
    ]


def test_a_clean_data_set_passes_and_is_built_from_what_was_read(tmp_path, monkeypatch):
    raws = [real_adc(raw_case(name, seed=i)) for i, name in enumerate("ab")]
    config = write_folder(tmp_path / "data", *raws)
    done = run(config, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the data set can be built; cases: 2, errors: 0, warnings: 0." in done.stdout
    messages = []
    validation.check(open_builder(config), messages.append)
    reading = "reading 2 cases of nifti_folder; what is built is kept for later runs"
    assert messages == [reading], "nothing is wrong"
    builder = open_builder(config)
    monkeypatch.setattr(type(builder), "read_available", None)  # must not be needed again
    builder.prepare()
    assert [info.case_id for info in builder.infos] == ["a", "b"]
    validation.check(open_builder(config), messages.append)


def test_warnings_are_logged_and_do_not_stop_a_run(tmp_path):
    config = write_folder(tmp_path / "data", real_adc(raw_case("a"), scale=1e-3))
    messages = []
    validation.check(open_builder(config), messages.append)
    reading, table = messages
    assert reading.startswith("reading 1 case of nifti_folder")
    assert "warnings: 1." in table
    assert "1e-6 mm2/s" in table.replace("\n", " ")


def test_files_that_are_not_fetched_are_named_for_every_case(tmp_path, capsys):
    config = write_folder(tmp_path / "data", *(real_adc(raw_case(name)) for name in "ab"))
    for name in ("a/adc.nii.gz", "a/lesion.nii.gz", "b/t2w.nii.gz"):
        (config.path / name).unlink()
        (config.path / name).symlink_to(".git/annex/objects/absent")
    status = validate.main(validate.Arguments(config, num_workers=1, output=tmp_path / "out"))
    table = " ".join(capsys.readouterr().out.split())
    assert status == 2
    assert "errors: 3" in table
    assert table.count("a link") == 1
    assert "3 in 2 cases: a, b" in table
    with pytest.raises(DataError, match=r"b/t2w.nii.gz must be a file; got a link that leads now"):
        open_builder(config).prepare()


def test_faults_of_the_storage_are_faults_of_the_data(tmp_path, monkeypatch):
    config = write_folder(tmp_path / "data", real_adc(raw_case("a")))
    adc = config.path / "a/adc.nii.gz"
    content = adc.read_bytes()
    adc.unlink()
    adc.symlink_to(adc)
    with pytest.raises(DataError, match=r"readable; got: Too many levels .*a/adc.nii.gz. Check"):
        open_builder(config)
    adc.unlink()
    adc.write_bytes(content)
    builder = type(open_builder(config))

    def unreadable(self):
        raise OSError(5, "Input/output error", str(config.path))

    monkeypatch.setattr(builder, "find_cases", unreadable)
    with pytest.raises(
        DataError, match=r"readable; got: Input/output error, for .*data. Check the"
    ):
        builder(config)


def test_a_wrong_folder_is_one_message(tmp_path):
    config = DataConfig(name="nifti_folder", path=tmp_path / "no", cache=tmp_path / "cache")
    done = run(config, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no folder at")


def test_nothing_is_said_of_a_normal_case():
    assert texts(real_adc(raw_case())) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda raw: with_part(raw, "adc", moved(raw.images["adc"], [9, 0, 0])),
            "'adc' should cover the crop of the reference image; got ",
        ),
        (
            lambda raw: with_part(raw, "hbv", moved(raw.images["hbv"], [5.2, 0, 0])),
            "the lesion should lie within the field of view of 'hbv'; got ",
        ),
        (
            lambda raw: with_part(raw, "label", moved(raw.label, [0, 2, 0])),
            "label and image of equal size should lie on one grid; got grids that are 2.0 mm and "
            "0.0 degrees apart.",
        ),
        (lambda raw: real_adc(raw, scale=1e-6), "got a median of 0.001"),
    ],
)
def test_suspicious_cases_are_warned_of(change, text):
    assert any(text in found for found in texts(change(real_adc(raw_case()))))


def test_extreme_and_negative_intensities_are_warned_of():
    raw = real_adc(raw_case())
    raw.images["hbv"].array[0, 0, 0] = 1e7
    assert any("'hbv' should have no extreme intensities" in text for text in texts(raw))
    raw = real_adc(raw_case())
    raw.images["hbv"].array[3:5, 4:8] *= -1
    assert any("'hbv' should not be negative" in text for text in texts(raw))


def test_labels_of_odd_size_or_place_are_warned_of():
    raw = real_adc(raw_case())
    raw.label.array[:] = 0
    raw.label.array[4, 10, 10] = 1
    assert any("between 0.01 and 60 ml; got 0.003 ml" in text for text in texts(raw))
    raw.label.array[4, 10, :] = 1
    assert any("should lie within the crop of (6, 16, 16)" in text for text in texts(raw))


def test_a_lesion_too_thin_for_the_grid_is_warned_of():
    raw = real_adc(raw_case())
    raw.label.array[:] = 0
    raw.label.array[4, 10:12, 10:12] = 1
    coarse = dataclasses.replace(SMALL, spacing_mm=(3.0, 4.0, 4.0), size=(6, 6, 6))
    found = examine("a", raw, (), {}, DataConfig(preprocess=coarse))
    assert found.case.positive
    assert not found.case.label.any()
    assert not found.faulty
    assert any(
        "the lesion should leave voxels on the reference grid; got none of it at (3.0, 4.0, 4.0)"
        in problem.text
        for problem in found.problems
        if problem.level == "warning"
    )
    fine = examine("a", raw, (), {}, DataConfig(preprocess=SMALL))
    assert not any("should leave voxels" in problem.text for problem in fine.problems)


def test_images_that_occur_twice():
    def facts(patient, **hashes):
        return Facts(patient, {}, {}, hashes, ())

    cases = {"a": facts("p", t2w="1", adc="2"), "b": facts("p", t2w="1", adc="3")}
    assert list(duplicates(cases)) == []  # two studies of one patient may share an image
    cases["c"] = facts("q", t2w="1", adc="3")
    found = list(duplicates(cases))
    assert [problem.case_id for problem in found] == ["c", "c"]
    assert "t2w of a, t2w of b, t2w of c" in found[0].text
    swapped = {"a": facts("p", t2w="1", adc="1")}
    assert [problem.case_id for problem in duplicates(swapped)] == ["a"]


def test_problems_split_into_rule_what_came_and_remedy():
    problem = Problem("a", None, "a thing must be so; got 0.5 of it. Do this, e.g. that. Or else.")
    assert problem.rule == "a thing must be so"
    assert problem.came == "got 0.5 of it"
    assert problem.remedy == "Do this, e.g. that. Or else."
    other = Problem("b", Path("/d/x.mha"), "/d/x.mha must r; c. R.", "warning")
    table = format_table([problem, other])
    lines = table.splitlines()
    assert lines[0].split() == ["case", "file", "rule", "what", "came", "remedy"]
    assert max(map(len, lines)) <= 132
    assert lines[-1].split() == ["warning", "b", "x.mha", "the", "file", "must", "r", "c", "R."]
    assert format_table([]) == ""


def test_fingerprint_counts_what_there_is():
    raws = [real_adc(raw_case(n, positive=n != "b")) for n in "abc"]
    config = DataConfig(preprocess=SMALL)
    facts = {raw.case_id: examine(raw.case_id, raw, (), {}, config).facts for raw in raws}
    lines = fingerprint(facts, config).splitlines()
    assert lines[0] == "cases      3 of 3 patients, 2 with lesion (67%)"
    assert lines[1] == "t2w        3 cases; voxels d h w 8 x 24 x 24; mm 3.00 x 1.00 x 1.00"
    assert lines[4].startswith("lesion     0.12 ml median (5 to 95 %: 0.12 to 0.12), 1.00 parts")
    assert fingerprint({}, config) == "no case could be read"


def test_contact_sheet_outlines_the_label(tmp_path):
    case = preprocess_case(raw_case(), DataConfig(preprocess=SMALL))
    tile = contact_sheet.make_tile(case)
    assert tile.picture.shape == (128, 3 * 128, 3)
    red = (tile.picture == (255, 64, 64)).all(-1)[:, :128]
    rows, columns = np.nonzero(red)
    # The label fills rows 6 to 9 and columns 4 to 8 of 16, seen from below and from the front.
    assert (rows.min(), rows.max() + 1) == (6 * 8, 10 * 8)
    assert (columns.min(), columns.max() + 1) == (7 * 8, 12 * 8)
    assert not red[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()].any()
    tiles = [tile._replace(case_id=str(i)) for i in range(contact_sheet.CASES_PER_SHEET + 1)]
    paths = contact_sheet.write_sheets(tiles, tmp_path)
    assert [path.name for path in paths] == ["contact_sheet_1.png", "contact_sheet_2.png"]
    with Image.open(paths[1]) as sheet:
        assert sheet.size == (3 * 128 + 8, 128 + 22)


def test_real_patients_are_clean(shared_data, tmp_path):
    config = DataConfig(name="picai", path=shared_data / "picai_mini", cache=tmp_path)
    findings = validation.validate(open_builder(config))
    assert findings.problems == []
    assert len(findings.tiles) == 5
    lines = fingerprint(findings.facts, config).splitlines()
    assert lines[0] == "cases      5 of 5 patients, 2 with lesion (40%)"
