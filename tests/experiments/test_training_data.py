"""What a model was trained on: gathered, kept, said, and compared with what is predicted."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.building.builders import open_builder
from data_pipelines.case import CaseInfo, ImageFacts, Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.preparing.examination import image_facts
from experiments.measuring.training_data import (
    TrainingData,
    absences,
    from_provenance,
    gather,
    in_words,
    to_provenance,
    unlike,
)
from experiments.process.records import RecordError
from tests.data_pipelines.fabricate import affine
from tests.data_pipelines.test_places import stored_in

T2W, ADC = ImageFacts((3.0, 0.5, 0.5), (10, 200, 900)), ImageFacts((3.6, 2.0, 1.5), (50, 1200, 3e3))


def cases() -> list[CaseInfo]:
    other = dataclasses.replace(T2W, spacing_mm=(4.0, 0.4, 0.5), intensity=(10, 400, 900))
    return [
        CaseInfo("a", "p", True, images={"t2w": T2W, "adc": ADC}),
        CaseInfo("b", "p", False, images={"t2w": other, "adc": ADC}),
        CaseInfo("c", "q", False, images={"t2w": T2W}),
    ]


def test_facts_are_ranges_over_the_cases_that_have_a_modality():
    data = gather("picai", cases(), ("t2w", "adc"))
    assert (data.num_cases, data.num_patients, data.num_positive) == (3, 2, 1)
    assert not data.synthetic
    assert data.modalities["t2w"].spacing_mm == ((3.0, 4.0), (0.4, 0.5), (0.5, 0.5))
    assert data.modalities["t2w"].intensity == (200, 400)
    assert data.modalities["adc"].num_cases == 2
    assert absences(data) == ["adc is absent in 1 of 3 cases."]
    assert in_words(data) == (
        "3 cases of 2 patients, 1 of them positive, of the data set picai (images of patients)"
    )
    assert gather("phantom", cases(), ("t2w",)).synthetic
    before = gather("picai", [CaseInfo("a", "p", True)], ("t2w",))
    assert before.modalities == {}, "a data set of before, whose images were not measured"
    assert list(unlike(before, {"t2w": T2W})) == []


def test_what_an_artifact_says_comes_back_and_older_ones_say_less():
    data = gather("picai", cases(), ("t2w", "adc"))
    assert from_provenance({"training_data": to_provenance(data)}) == data
    older = {"config": {"data": {"name": "phantom"}}}
    assert from_provenance(older) == TrainingData("phantom", synthetic=True)
    assert in_words(from_provenance(older)) == (
        "the data set phantom (synthetic images, no patients), how many cases is not known"
    )
    assert from_provenance({"config": {"data": 3}}) is None
    assert in_words(None) == "data that are not known"
    later = {"training_data": {"schema": 2, "else": 1}} | older
    assert from_provenance(later) == TrainingData("phantom", synthetic=True)
    with pytest.raises(RecordError, match=r"training_data is 'all' where facts"):
        from_provenance({"training_data": "all"})
    with pytest.raises(RecordError, match=r"training_data\.name is 7"):
        from_provenance({"training_data": {"schema": 1, "name": 7, "synthetic": True}})


def test_images_far_from_the_training_data_are_named():
    data = gather("picai", cases(), ("t2w", "adc"))
    assert list(unlike(data, {"t2w": T2W, "adc": ADC, "pet": T2W})) == []
    assert list(unlike(None, {"t2w": T2W})) == []
    near = dataclasses.replace(T2W, spacing_mm=(5.9, 0.3, 0.7), intensity=(0, 1500, 9e9))
    assert list(unlike(data, {"t2w": near})) == []
    thick = dataclasses.replace(T2W, spacing_mm=(6.1, 0.5, 0.5))
    (said,) = unlike(data, {"t2w": thick})
    assert "got 6.1 mm between slices, and 3 to 4 mm in training" in said
    (said,) = unlike(data, {"adc": dataclasses.replace(ADC, intensity=(0, 1.2, 3))})
    assert "got a median of 1.2 in the middle of the image, and 1200 to 1200 in training" in said


def test_facts_of_an_image_do_not_depend_on_how_it_is_stored():
    array = np.arange(8 * 20 * 24, dtype=np.int16).reshape(8, 20, 24) - 5
    volume = Volume(array, affine((3.0, 0.5, 0.4)))
    facts = image_facts(volume)
    assert facts.spacing_mm == (3.0, 0.5, 0.4)
    middle = array[2:6, 5:15, 6:18]
    np.testing.assert_allclose(facts.intensity, np.percentile(middle, (0.5, 50, 99.5)), rtol=1e-5)
    assert image_facts(stored_in(volume, "PIL")) == facts
    assert image_facts(Volume(np.zeros((1, 2, 3)), affine())).intensity == (0, 0, 0)


def test_a_built_data_set_knows_what_its_images_are_like(tmp_path):
    config = DataConfig(
        phantom=PhantomOptions(num_cases=2),
        cache=tmp_path,
        modalities=("t2w", "adc"),
        preprocess=PreprocessConfig(spacing_mm=(6, 4, 4), size=(6, 24, 24)),
    )
    builder = open_builder(config)
    builder.prepare()
    entry = builder.sorted_entries[0]
    info = open_builder(config).infos[0]
    raw = builder.read_case(entry)
    assert {**info.images} == {name: image_facts(raw.images[name]) for name in ("t2w", "adc")}
    assert info.metadata == dict(raw.metadata)
