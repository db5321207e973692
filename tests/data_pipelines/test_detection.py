"""Whose layout a folder has, and which file is which where names are other people's."""

import dataclasses
import json
from pathlib import Path

import pytest

from data_pipelines import validate
from data_pipelines.building.builders import builder_names, open_builder
from data_pipelines.config import AUTO, DataConfig, origin_of
from data_pipelines.faults import DataError, MissingDataError, Problem, format_table
from data_pipelines.reading import file_patterns
from data_pipelines.reading.layout import resolved
from experiments.settings.command_line import parse
from tests.data_pipelines.fabricate import SMALL, raw_case, write_folder

MODALITIES = ("t2w", "adc", "hbv")


def made(root: Path, *names: str) -> Path:
    """A folder with empty files of these names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


LAYOUTS = {
    "picai": ["images/10005/10005_1000005_t2w.mha", "labels/x"],
    "prostate158": ["train/020/t2.nii.gz", "train/020/adc_tumor_reader1.nii.gz"],
    "msd_prostate": ["dataset.json", "imagesTr/prostate_00.nii.gz", "labelsTr/prostate_00.nii.gz"],
    "nifti_folder": ["case_a/t2.nii.gz", "case_a/ADC.nii.gz", "case_a/lesion.nii.gz"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folder_alone_says_which_data_set_it_is(name, tmp_path):
    said = []
    config = resolved(DataConfig(path=made(tmp_path, *LAYOUTS[name])), said.append)
    assert config.name == name
    assert said[0].startswith(f"data set {name}: ")


@pytest.mark.parametrize(
    ("names", "name", "why"),
    [
        (["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "nifti_folder", "nnU-Net's"),
        (["Task05_Prostate/imagesTr/p.nii.gz"], "msd_prostate", "Task05_Prostate"),
        (["public_images_fold0/1/1_2_t2w.mha"], "picai", "public_images_fold0/"),
        (["020/t2.nii.gz", "020/adc.nii.gz", "020/lesion.nii.gz"], "nifti_folder", "020/adc"),
        (["a/t2w/1.dcm", "a/t2w/2.dcm"], "nifti_folder", "a/t2w"),
    ],
)
def test_layouts_that_look_alike_are_told_apart(names, name, why, tmp_path):
    said = []
    assert resolved(DataConfig(path=made(tmp_path, *names)), said.append).name == name
    assert why in said[0]


def test_published_cases_are_known(shared_data):
    assert resolved(DataConfig(path=shared_data / "picai_mini")).name == "picai"


def test_without_a_folder_it_is_the_phantom():
    assert resolved(DataConfig()).name == "phantom"
    assert parse([]).data.name == "phantom"


def test_command_line_names_the_data_set_in_folder_and_configuration(tmp_path, capsys):
    config = parse([f"--data.path={made(tmp_path, *LAYOUTS['nifti_folder'])}"])
    assert config.data.name == "nifti_folder"
    assert config.output == Path("runs/small-nifti_folder-lesion")
    assert capsys.readouterr().out.startswith("data set nifti_folder: a folder for each case")


def test_drawn_data_sets_are_those_that_read_no_files():
    drawn = {n for n in builder_names() if not hasattr(_builder(n), "root")}
    assert drawn == {name for name in builder_names() if origin_of(name).synthetic}


def _builder(name: str) -> type:
    import importlib

    return importlib.import_module(f"data_pipelines.{name}.{name}_dataset_builder").Builder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DataConfig(name="phantom", path=Path("mine")),
            r"drawn reads no folder; got --data.name=phantom and --data.path=mine. Leave out",
        ),
        (
            DataConfig(name="picai", path=Path("mine"), files=("t2w=*T2*",)),
            r"go with your own files; got --data.files and --data.name=picai. Leave out one",
        ),
        (DataConfig(files=("t2w=*T2*",)), r"need the folder .* got 't2w=\*T2\*' and no path. Add"),
    ],
)
def test_option_that_nothing_uses_is_refused(config, message):
    with pytest.raises(DataError, match=message):
        resolved(config)


def test_folder_that_is_not_there_is_told():
    with pytest.raises(MissingDataError, match=r"no folder at /nowhere. Check --data.path."):
        resolved(DataConfig(path=Path("/nowhere")))


def test_unknown_layout_tells_what_is_there_and_the_line_to_type(tmp_path):
    names = ("T2_tra.nii.gz", "ADC_map.nii.gz", "ep2d_b1400.nii.gz", "T2_ROI.nii.gz")
    made(tmp_path, *(f"P{i}/MR/{name}" for i in range(5) for name in names))
    with pytest.raises(DataError) as error:
        resolved(DataConfig(path=tmp_path))
    said = str(error.value)
    assert "folders P0, P1, P2 and 2 more; in P0/MR: ADC_map.nii.gz, T2_ROI.nii.gz" in said
    assert "t2w (t2, t2_tra) or adc (adc_map) or hbv (dwi, high_b)" in said
    assert "--data.files t2w='*T2*' adc='*ADC*' hbv='*b1400*' label='*ROI*'" in said


def test_suggestion_for_one_folder_names_the_case(tmp_path):
    made(tmp_path, "P1_T2.nii.gz", "P1_dwi.nii.gz", "P1_mask.nii.gz", "P2_T2.nii.gz")
    with pytest.raises(DataError) as error:
        resolved(DataConfig(path=tmp_path))
    assert (
        "--data.files t2w='{case}_T2*' adc='*...*' hbv='{case}_dwi*' label='{case}_mask*'"
        in str(error.value)
    )


FILES = ("t2w=*T2*", "adc=*adc*", "lesion=*ROI*")


def found(root: Path, *files: str, target="lesion", modalities=("t2w", "adc"), **more):
    patterns = file_patterns.read(root, files)
    compiled = file_patterns.compiled(patterns, modalities, target)
    return file_patterns.find(root, compiled, modalities, with_gland=False, **more)


def test_patterns_find_files_without_regard_to_case_and_labels_first(tmp_path):
    made(
        tmp_path,
        *("P1/S1/x_t2_tra.nii.gz", "P1/S1/ADC.mha", "P1/S1/T2_roi.nii.gz", "P1/S1/notes.txt"),
        *("P2/S1/x_t2_tra.nii.gz", "P2/S1/ADC/1.dcm", "P2/S1/.T2.nii.gz"),
    )
    first, second = found(tmp_path, *FILES)
    assert (first.case_id, first.patient_id) == ("P1_S1", "P1_S1")
    assert {k: v.name for k, v in first.files.items()} == {
        "t2w": "x_t2_tra.nii.gz",
        "adc": "ADC.mha",
        "label": "T2_roi.nii.gz",
    }
    assert second.images["adc"] == tmp_path / "P2/S1/ADC", "a DICOM series"
    assert second.label is None
    assert second.looked_for["label"] == f"'*ROI*' in {tmp_path / 'P2/S1'}"


def test_place_of_case_and_patient_is_told(tmp_path):
    made(tmp_path, *(f"A/{s}/{n}" for s in ("1", "2") for n in ("T2/a.mha", "D/b.mha", "s.mha")))
    files = ("t2w={patient}/{case}/T2/*", "adc={patient}/{case}/D/*", "label={patient}/{case}/s*")
    cases = found(tmp_path, *files)
    assert [(c.case_id, c.patient_id) for c in cases] == [("A_1", "A"), ("A_2", "A")]
    assert all(len(case.files) == 3 for case in cases)
    flat = made(tmp_path / "flat", "P1_T2.mha", "P1_adc.mha", "P1_ROI.mha")
    (case,) = found(flat, "t2w={case}_T2*", "adc={case}_adc*", "lesion={case}_roi*")
    assert (case.case_id, len(case.files)) == ("P1", 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("t2w",), r"given as name=pattern; got 't2w'. Write --data.files t2w="),
        (("t3w=*a*",), r"must be among t2w, adc, lesion, label, gland; got 't3w'. Write"),
        (("t2w=a/*",), r"with / must say where .* got 'a/\*'. Write it as t2w='\{case\}/\*'"),
        (("lesion=*a*",), r"a pattern for a modality \(t2w, adc\); got lesion. Write"),
        (("t2w=*a*", "T2=*b*"), r"a name has one pattern; got '\*a\*' and '\*b\*' for t2w. Leave"),
        (("t2w=*nope*",), r"must find an image; got none for t2w='\*nope\*' in .*folders P1.*told"),
        (("t2w=*T2*", "adc=*T*"), r"found by one pattern; got P1/T2.mha, which t2w.* and adc.* f"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(files, message, tmp_path):
    made(tmp_path, "P1/T2.mha")
    with pytest.raises(DataError, match=message):
        found(tmp_path, *files)


def test_files_of_one_folder_need_the_place_of_the_case(tmp_path):
    made(tmp_path, "P1_T2.mha")
    with pytest.raises(DataError, match=r"need \{case\} .* Write it as t2w='\{case\}_T2\*'"):
        found(tmp_path, "t2w=*T2*")


def test_several_files_of_a_name_are_a_problem_of_the_case(tmp_path):
    (case,) = found(made(tmp_path, "P1/T2a.mha", "P1/T2b.mha"), "t2w=*T2*")
    assert "got T2a.mha, T2b.mha by '*T2*'. Write a narrower pattern" in case.problems[0].text


@pytest.mark.parametrize("name", file_patterns.FILES)
def test_patterns_lie_beside_the_data(name, tmp_path):
    patterns = {"t2w": "*T2*", "adc": "*adc*"}
    (tmp_path / name).write_text(json.dumps(patterns), encoding="utf-8")
    assert file_patterns.read(tmp_path, ()) == patterns
    assert file_patterns.read(tmp_path, ("t2w=*x*",)) == {"t2w": "*x*"}, "the command line wins"
    assert resolved(DataConfig(path=tmp_path)).name == "nifti_folder"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must hold names and patterns; got"),
        (": :\n:", "must be YAML or JSON"),
        ("", "got None"),
    ],
)
def test_faulty_file_of_patterns_is_named(text, message, tmp_path):
    (tmp_path / "cmsad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        file_patterns.read(tmp_path, ())


def test_data_set_of_other_names_is_built_and_a_moved_pattern_builds_it_anew(tmp_path):
    root = tmp_path / "data"
    write_folder(root, raw_case("a"))
    for old, new in (("t2w", "x_T2"), ("adc", "x_ADC"), ("lesion", "my_ROI")):
        (root / f"a/{old}.nii.gz").rename(root / f"a/{new}.nii.gz")
    config = DataConfig(
        path=root, files=FILES, modalities=("t2w", "adc"), cache=tmp_path, preprocess=SMALL
    )
    builder = open_builder(config)
    builder.prepare()
    assert [(info.case_id, info.positive) for info in builder.infos] == [("a", True)]
    other = open_builder(dataclasses.replace(config, files=("t2w=*ADC*", "adc=*T2*", FILES[2])))
    assert other.data_dir != builder.data_dir


def test_same_fault_of_many_cases_is_one_row_with_examples(tmp_path, capsys):
    root = tmp_path / "data"
    for number in range(6):
        folder = root / f"case{number}"
        folder.mkdir(parents=True)
        for name in ("t2w.nii.gz", "Diffusion.nii.gz", "lesion.nii.gz"):
            (folder / name).touch()
    config = DataConfig(path=root, modalities=("t2w", "adc"), cache=tmp_path / "cache")
    assert validate.main(validate.Arguments(config, num_workers=1, output=tmp_path / "out")) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("a case must have every") == 1
    assert "6 cases: case0," in said
    rows = (tmp_path / "out/problems.csv").read_text("utf-8").splitlines()
    missing = [row for row in rows if "a case must have every modality" in row]
    assert len(missing) == 6
    assert "which holds Diffusion.nii.gz, lesion.nii.gz, t2w.nii.gz" in missing[5]
    assert "told by --data.files t2w='*t2*' adc='*...*' label='*lesion*'" in missing[5]


def test_faults_of_few_cases_or_of_other_rules_keep_their_rows():
    def problem(case_id, rule="a thing must be so"):
        return Problem(case_id, None, f"{rule}; got {case_id}. Mend {case_id}.")

    assert "cases: " not in format_table([problem(f"case{i}") for i in range(2)])
    table = format_table([problem(f"case{i}") for i in range(4)] + [problem("b", "other")])
    assert table.count("4 cases:") == 1
    assert "in case0: got" in " ".join(table.split())
    assert "other" in table


def test_auto_is_the_default():
    assert DataConfig().name == AUTO
