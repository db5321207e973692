"""The fingerprint of a data set: by hand-made cases, and kept until a file changes."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.building import fingerprints
from data_pipelines.building.builders import open_builder
from data_pipelines.case import RawCase, Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.preparing import fingerprint
from data_pipelines.preparing.preprocessing import check_preprocess, preprocess_case

AFFINE = np.diag([0.5, 0.5, 3.0, 1.0])
DATA = DataConfig(modalities=("t2w", "adc"))


def raw_case() -> RawCase:
    """10 x 40 x 40 voxels; ADC on a coarser grid; lesions of 2 x 4 x 6 and of one voxel."""
    t2w = np.zeros((10, 40, 40), np.float32)
    t2w[:, 4:36, 4:36] = np.random.default_rng(0).uniform(50, 150, (10, 32, 32))
    adc = np.full((10, 20, 20), 1200.0, np.float32)
    adc[:, ::2] = 800
    label = np.zeros((10, 40, 40), np.uint8)
    label[3:5, 20:24, 20:26] = 1
    label[8, 10, 20] = 4
    coarse = np.diag([1.0, 1.0, 3.0, 1.0])
    coarse[:2, 3] = 0.25
    return RawCase(
        "c", "p", {"t2w": Volume(t2w, AFFINE), "adc": Volume(adc, coarse)}, Volume(label, AFFINE)
    )


def test_facts_of_a_case_by_hand():
    facts = fingerprint.measure(raw_case(), DATA)
    assert facts.spacing_mm == (3.0, 0.5, 0.5)
    assert facts.size == (10, 40, 40)
    assert facts.extent_mm == (30.0, 20.0, 20.0)
    assert facts.content_mm == (15.0, 8.0, 8.0)
    assert not facts.on_one_grid
    assert facts.class_ml == pytest.approx((49 * 0.75e-3,), abs=1e-4)
    assert facts.parts_ml == pytest.approx((48 * 0.75e-3, 0.75e-3), abs=1e-4)
    assert facts.box_mm == (6.0, 2.0, 3.0)
    # centre 4.5, 19.5, 19.5; farthest voxels 8, 10 and 25
    assert facts.reach_mm == (12.0, 5.0, 3.0)
    assert facts.intensity["adc"] == (800.0, 1000.0, 1200.0) or facts.intensity["adc"][1] in (
        800.0,
        1200.0,
    )


def test_orientation_changes_no_fact():
    raw = raw_case()
    turned = dataclasses.replace(
        raw,
        images={
            name: Volume(v.array[::-1, :, ::-1].copy(), flipped(v))
            for name, v in raw.images.items()
        },
    )
    assert fingerprint.measure(turned, DATA) == fingerprint.measure(raw, DATA)


def flipped(volume: Volume) -> np.ndarray:
    """The affine of the volume mirrored along d and w."""
    d, _, w = volume.shape
    mirror = np.diag([-1.0, 1.0, -1.0, 1.0])
    mirror[0, 3], mirror[2, 3] = w - 1, d - 1
    return volume.affine @ mirror


def test_case_without_target_or_label():
    raw = raw_case()
    empty = dataclasses.replace(raw, label=Volume(np.zeros((10, 40, 40), np.uint8), AFFINE))
    facts = fingerprint.measure(empty, DATA)
    assert not facts.positive
    assert facts.class_ml == (0.0,)
    assert fingerprint.round_trip_dice(empty, DATA) is None
    assert fingerprint.measure(dataclasses.replace(raw, label=None), DATA).class_ml == ()


def test_round_trip_costs_nothing_on_the_own_grid_and_more_on_coarser_ones():
    raw = raw_case()

    def cost(mm: float) -> float:
        grid = PreprocessConfig(spacing_mm=(3.0, mm, mm), size=(10, int(20 / mm), int(20 / mm)))
        found = fingerprint.round_trip_dice(raw, dataclasses.replace(DATA, preprocess=grid))
        assert found is not None
        return found

    assert cost(0.5) == 1.0
    assert 0.5 < cost(2.0) < cost(1.0) < 1.0


def test_fingerprint_is_taken_once_for_each_state(tmp_path, monkeypatch):
    options = PhantomOptions(num_cases=2)
    config = DataConfig(name="phantom", cache=tmp_path, phantom=options)
    builder = open_builder(config)
    found = fingerprints.take(builder)
    assert [case.case_id for case in found.cases] == [e.case_id for e in builder.sorted_entries]
    assert len(found.infos) == 2
    monkeypatch.setattr(fingerprint, "measure", None)  # is not called again
    again = fingerprints.take(open_builder(config))
    assert again == found
    assert again.sha256 == found.sha256
    (kept,) = (tmp_path / "phantom" / "fingerprints").iterdir()
    kept.write_text("{", encoding="utf-8")
    monkeypatch.undo()
    assert fingerprints.take(open_builder(config)) == found
    lines = fingerprint.describe(found, ("lesion",))
    assert lines[0].startswith("2 cases of 2 patients")
    assert any(line.startswith("adc: in 2 of 2 cases, median intensity 1") for line in lines)


def test_modality_with_a_scale_keeps_its_unit():
    grid = PreprocessConfig(spacing_mm=(3.0, 1.0, 1.0), size=(10, 20, 20), scales=("ADC=1000/400",))
    raw = raw_case()
    case = preprocess_case(raw, dataclasses.replace(DATA, preprocess=grid))
    assert set(np.unique(case.image[..., 1])) == {-1024, 1024}  # -0.5 and 0.5 of 2048
    assert case.image[..., 0].mean() == pytest.approx(0, abs=1)  # each case by its own mean


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        (("adc",), "written name=centre/width.*got 'adc'"),
        (("adc=1/0",), "width above 0"),
        (("adc=1/2", "adc=1/3"), "once for each modality"),
        (("hbv=1/2",), "one of a modality that is used; got one for hbv"),
    ],
)
def test_faulty_scales_are_refused(scales, said):
    with pytest.raises(DataError, match=said):
        check_preprocess(dataclasses.replace(DATA, preprocess=PreprocessConfig(scales=scales)))
