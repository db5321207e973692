"""Cross-validation begins with the data: all faults in one table, and nothing else is done."""

import dataclasses

import pytest

from data_pipelines.faults import DataError
from experiments.settings.command_line import complete
from experiments.settings.config import Config, TrainConfig
from experiments.studies import cross_validation
from tests.data_pipelines.fabricate import raw_case, write_folder


def test_cv_stops_at_faults_of_the_data(tmp_path):
    data = write_folder(tmp_path / "data", *(raw_case(name) for name in "abc"))
    (data.path / "a" / "adc.nii.gz").unlink()
    (data.path / "b" / "hbv.nii.gz").write_bytes(b"no image")
    size = dataclasses.replace(data.preprocess, size=(8, 16, 16))
    config = complete(
        Config(
            accelerator="cpu",
            output=tmp_path / "run",
            data=dataclasses.replace(data, preprocess=size),
            train=TrainConfig(crop=(8, 16, 16)),
        )
    )
    with pytest.raises(DataError) as caught:
        cross_validation.run(config)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the data set cannot be built; cases: 3, errors: 2, warnings: ")
    assert lines[1].split() == ["case", "file", "rule", "what", "came", "remedy"]
    assert [line.split()[1] for line in lines if line.startswith("error")] == ["a", "b"]
    assert not (tmp_path / "run").exists()
