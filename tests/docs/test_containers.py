"""Containers: their entry point outside of one, and that what they copy and install is there."""

import dataclasses
import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from data_pipelines.faults import DataError
from experiments import export
from experiments.measuring.lesions import detection_map
from experiments.settings.command_line import complete
from tests.data_pipelines.fabricate import raw_case, save
from tests.docs.test_documentation import ROOT
from tests.experiments.untrained_run import make_untrained_run, tiny_config

CONTAINERS = ROOT / "docs/containers"
FILES = sorted([*CONTAINERS.glob("*.Containerfile"), *CONTAINERS.glob("*/Containerfile")])
FOLDERS = {
    "t2w": "transverse-t2-prostate-mri",
    "adc": "transverse-adc-prostate-mri",
    "hbv": "transverse-hbv-prostate-mri",
}
"""As https://grand-challenge.org/algorithms/interfaces/ names them."""


@pytest.fixture(scope="module")
def process():
    path = CONTAINERS / "grand_challenge/process.py"
    spec = importlib.util.spec_from_file_location("grand_challenge_process", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config()
    data = dataclasses.replace(config.data, modalities=("t2w", "adc", "hbv"))
    make_untrained_run(folder / "run", complete(dataclasses.replace(config, data=data)))
    export.main([str(folder / "run"), "--output", str(folder / "model.cmsad")])
    return folder / "model.cmsad"


def write_case(root, *, without=()):
    for name, folder in FOLDERS.items():
        (root / "images" / folder).mkdir(parents=True)
        if name not in without:
            save(root / "images" / folder / "1b2c.mha", raw_case().images[name])


def test_entry_point_writes_what_the_interface_asks_for(process, model, tmp_path, capsys):
    write_case(tmp_path / "input")
    process.main(
        [f"--input={tmp_path / 'input'}", f"--output={tmp_path / 'output'}", f"--model={model}"]
    )
    written = {str(p.relative_to(tmp_path / "output")) for p in (tmp_path / "output").rglob("*.*")}
    assert written == {
        "images/cspca-detection-map/cspca_detection_map.mha",
        "cspca-case-level-likelihood.json",
    }
    t2w = sitk.ReadImage(str(tmp_path / "input/images" / FOLDERS["t2w"] / "1b2c.mha"))
    found = sitk.ReadImage(
        str(tmp_path / "output/images/cspca-detection-map/cspca_detection_map.mha")
    )
    assert found.GetPixelID() == sitk.sitkFloat32
    assert found.GetSize() == t2w.GetSize()
    for ours, theirs in (
        (found.GetOrigin(), t2w.GetOrigin()),
        (found.GetSpacing(), t2w.GetSpacing()),
        (found.GetDirection(), t2w.GetDirection()),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    values = sitk.GetArrayFromImage(found)
    likelihood = json.loads(
        (tmp_path / "output/cspca-case-level-likelihood.json").read_text("utf-8")
    )
    assert likelihood == pytest.approx(values.max(), abs=1e-6)
    assert 0 < likelihood < 1
    # a map of candidates is its own: each region has one confidence
    np.testing.assert_array_equal(detection_map(values) > 0, values > 0)
    assert capsys.readouterr().out.endswith(f"likelihood {likelihood:.4f}\n")


def test_image_that_is_missing_is_told_by_its_folder(process, model, tmp_path):
    write_case(tmp_path, without=("adc",))
    with pytest.raises(DataError, match=r"got 0 in .*transverse-adc-prostate-mri. Put one"):
        process.process(tmp_path, tmp_path / "output", model)


def test_case_that_cannot_be_read_fails_with_its_reason(process, model, tmp_path, capsys):
    write_case(tmp_path)
    (tmp_path / "images" / FOLDERS["hbv"] / "1b2c.mha").write_text("broken", encoding="utf-8")
    with pytest.raises(DataError, match="the case must be predicted"):
        process.process(tmp_path, tmp_path / "output", model)
    assert "case case is passed over" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_containers_were_found():
    assert len(FILES) == 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONTAINERS)))
def test_container_copies_and_installs_what_is_there(file):
    text = file.read_text("utf-8")
    for copied in re.findall(r"^COPY (?:--chown=\S+ )?(.+) \S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists() or name.endswith("/model.cmsad"), name
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (extras,) = re.findall(r'"/src\[([\w,]+)\]"', text)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
    for path in re.findall(r"build -f (\S+)", text):
        assert ROOT / path == file
