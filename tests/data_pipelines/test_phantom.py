"""The phantom against the statistics of real patients, and its contrasts, geometry and builder."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.building.records import decode
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.phantom import phantom
from data_pipelines.phantom.anatomy import (
    AFMS,
    OUTSIDE,
    POSITIVE_SHARE,
    PZ,
    SHAPE,
    SPACING_MM,
    TZ,
    Anatomy,
    case_id_of,
    is_positive,
    make_anatomy,
    patient_of,
)
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.phantom.phantom import make_case
from data_pipelines.phantom.phantom_dataset_builder import Builder
from data_pipelines.preparing.geometry import resample
from data_pipelines.preparing.preprocessing import preprocess_case

NUM_POSITIVE = 110
QUANTILES = (5, 25, 50, 75, 95)


@pytest.fixture(scope="module")
def positives() -> list[Anatomy]:
    """Anatomy of the first positive cases; no image is rendered."""
    indices = (i for i in range(10**6) if is_positive(i, seed=0))
    return [make_anatomy(next(indices)) for _ in range(NUM_POSITIVE)]


def column(path: Path, name: str, **only: str) -> np.ndarray:
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row[k] == only[k] for k in only)]
    return np.array([float(row[name]) for row in rows if row[name]])


def assert_quantiles(drawn, real, *, factor, quantiles=QUANTILES):
    ratio = np.percentile(drawn, quantiles) / np.percentile(real, quantiles)
    assert np.all((ratio > 1 / factor) & (ratio < factor)), dict(zip(quantiles, ratio, strict=True))


# Against real patients


@pytest.mark.slow
def test_lesion_volumes_are_those_of_human_masks(positives, shared_data):
    drawn = [lesion.volume_ml for anatomy in positives for lesion in anatomy.lesions]
    stats = shared_data / "anatomy/lesion_stats.csv"
    real = column(stats, "vol_mm3", source="resampled") / 1000
    assert_quantiles(drawn, real, factor=1.5)
    assert np.log(drawn).std() == pytest.approx(np.log(real).std(), rel=0.2)


def test_gland_volumes_are_the_real_ones(positives, shared_data):
    real = column(shared_data / "anatomy/case_stats.csv", "gland_ml")
    drawn = [anatomy.gland_ml for anatomy in positives]
    assert_quantiles(drawn, real, factor=1.3)


def test_lesion_counts_are_the_real_ones(positives, shared_data):
    real = column(shared_data / "anatomy/case_stats.csv", "n_lesions")
    single = np.mean([len(anatomy.lesions) == 1 for anatomy in positives])
    assert single == pytest.approx(np.mean(real[real > 0] == 1), abs=0.06)
    assert {len(anatomy.lesions) for anatomy in positives} <= {1, 2, 3}
    assert pytest.approx(np.mean(real > 0), abs=0.001) == POSITIVE_SHARE


def test_lesions_lie_in_the_zones_where_real_ones_do(positives, shared_data):
    inside, zones = [], []
    for anatomy in positives:
        for lesion in anatomy.lesions:
            zone = anatomy.zones[lesion.box][lesion.mask]
            inside.append(np.mean(zone > OUTSIDE))
            zones.append(np.bincount(np.minimum(zone, TZ), minlength=3).argmax())
    share = np.bincount(zones, minlength=3) / len(zones)
    # Zone holding most of a lesion, from the masks of 1,500 patients: README of the shared data.
    np.testing.assert_allclose(share, [0.045, 0.49, 0.46], atol=0.09)
    stats = shared_data / "anatomy/lesion_stats.csv"
    real = column(stats, "frac_in_gland", source="resampled")
    assert np.median(inside) == pytest.approx(np.median(real), abs=0.06)
    assert np.mean(inside) == pytest.approx(np.mean(real), abs=0.08)


def contrasts(tissue) -> dict[str, float]:
    """Ratios of means, and standard deviations, of ``{modality: {tissue: (mean, sd)}}``."""
    found = {}
    for modality, stats in tissue.items():
        found[f"{modality} TZ/PZ"] = stats["TZ"][0] / stats["PZ"][0]
        for name in ("PZ", "TZ", "lesion"):
            if name not in stats:
                continue
            mean, sd = stats[name]
            found[f"{modality} {name} sd/mean"] = sd / mean
            if modality == "adc":
                found[f"adc {name} mean"], found[f"adc {name} sd"] = mean, sd
        for name in ("PZ", "TZ", "gland"):
            if "lesion" in stats:
                found[f"{modality} lesion/{name}"] = stats["lesion"][0] / stats[name][0]
    return found


def measured(index: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and sd of each tissue, all modalities resampled onto the T2W grid."""
    case, zones = make_case(index), make_anatomy(index).zones
    assert case.label is not None
    lesion = case.label.array > 0
    masks = {"PZ": (zones == PZ) & ~lesion, "TZ": (zones == TZ) & ~lesion, "gland": zones > 0}
    if lesion.any():
        masks["lesion"] = lesion
    result = {}
    for name, volume in case.images.items():
        image, _ = resample(volume, case.label.shape, case.label.affine, order=1)
        result[name] = {t: (image[mask].mean(), image[mask].std()) for t, mask in masks.items()}
    return result


@pytest.mark.slow
def test_contrasts_are_the_real_ones(shared_data):
    """The median over cases lies within what nine real patients span, with a margin of 10 %."""
    cases = json.loads((shared_data / "anatomy/tissue_stats.json").read_text("utf-8")).values()
    real, drawn = {}, {}
    for found, tissues in ((real, cases), (drawn, map(measured, (1, 2, 4, 9, 12, 16, 17, 22, 25)))):
        for tissue in tissues:
            for name, value in contrasts(tissue).items():
                found.setdefault(name, []).append(value)
    assert real.keys() == drawn.keys()
    outside = {
        name: (np.median(drawn[name]), min(values), max(values))
        for name, values in real.items()
        if not 0.9 * min(values) < np.median(drawn[name]) < 1.1 * max(values)
    }
    assert not outside


# What it promises by itself


def test_displacement_has_the_stated_distribution():
    rng = np.random.default_rng(0)
    length = [np.linalg.norm(phantom.displacement_mm(rng)) for _ in range(4000)]
    np.testing.assert_allclose(np.percentile(length, (50, 90)), (2.3, 4.8), rtol=0.06)


@pytest.mark.parametrize("num_cases", [20, 60, 100, 358])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_prefix_holds_the_share_of_positives(num_cases, seed):
    positive = sum(is_positive(i, seed=seed) for i in range(num_cases))
    assert abs(positive - 0.283 * num_cases) < 2


def test_a_case_is_a_function_of_seed_and_index():
    first, again, other = make_case(3, seed=5), make_case(3, seed=5), make_case(3, seed=6)
    for name, volume in first.images.items():
        np.testing.assert_array_equal(volume.array, again.images[name].array)
        np.testing.assert_array_equal(volume.affine, again.images[name].affine)
        assert volume.array.dtype == np.float32
        assert np.isfinite(volume.array).all()
        assert (volume.array >= 0).all()
        assert not np.array_equal(volume.array, other.images[name].array)


def test_lesions_and_only_positives_have_labels(positives):
    for anatomy in positives[:20]:
        volume = sum(lesion.volume_ml for lesion in anatomy.lesions)
        voxel_ml = np.prod(SPACING_MM) / 1000
        assert anatomy.lesion_mask.sum() * voxel_ml == pytest.approx(volume)
    negative = next(i for i in range(9) if not is_positive(i, seed=0))
    label = make_case(negative).label
    assert label is not None
    assert not label.array.any()


def test_foci_are_disjoint_and_in_one_piece(positives):
    for anatomy in positives[:10]:
        count = np.zeros(SHAPE, int)
        for focus in anatomy.foci:
            count[focus.box] += focus.mask
            assert ndimage.label(focus.mask)[1] == 1
            assert focus.soft.min() >= 0
            assert focus.soft.max() <= 1
        assert count.max() == 1


def test_studies_of_a_patient_share_the_gland_and_the_patient_id():
    first, second = 18, 19
    assert patient_of(first)[0] == patient_of(second)[0]
    np.testing.assert_array_equal(make_anatomy(first).zones, make_anatomy(second).zones)
    cases = make_case(first), make_case(second)
    assert cases[0].patient_id == cases[1].patient_id
    assert cases[0].case_id != cases[1].case_id
    assert len({case_id_of(i) for i in range(200)}) == 200
    assert len({patient_of(i)[0] for i in range(200)}) == 190


def test_targets_share_images_and_differ_in_labels():
    zones = make_anatomy(1).zones
    labels = {}
    for target in ("lesion", "gland", "zones"):
        case = make_case(1, target=target)
        assert case.label is not None
        labels[target] = case.label.array
    assert labels["lesion"].any()
    np.testing.assert_array_equal(labels["gland"], zones > OUTSIDE)
    np.testing.assert_array_equal(labels["zones"] == 1, zones == PZ)
    np.testing.assert_array_equal(labels["zones"] == 2, (zones == TZ) | (zones == AFMS))


@pytest.mark.parametrize("shift_mm", [(0.0, 0.0, 0.0), (0.0, 6.0, -3.0)])
def test_headers_say_where_tissue_lies(monkeypatch, shift_mm):
    """ADC correlates with the painted tissue at the displacement, and nowhere better."""
    painted = {}
    paint = phantom._paint

    def keep(rng, anatomy):
        painted["mean"], painted["sd"] = paint(rng, anatomy)
        return painted["mean"], painted["sd"]

    monkeypatch.setattr(phantom, "_paint", keep)
    monkeypatch.setattr(phantom, "displacement_mm", lambda rng: np.array(shift_mm))
    case = make_case(4)
    t2w = case.images["t2w"]
    adc, _ = resample(case.images["adc"], t2w.shape, t2w.affine, order=1)
    middle = adc[4:-4, 24:-24, 24:-24]
    best, offset = -1.0, None
    for dz in (-1, 0, 1):
        for dy in range(-2, 13, 2):
            for dx in range(-8, 7, 2):
                moved = np.roll(painted["mean"][1], (dz, dy, dx), (0, 1, 2))
                r = np.corrcoef(moved[4:-4, 24:-24, 24:-24].ravel(), middle.ravel())[0, 1]
                if r > best:
                    best, offset = r, (dz * 3.0, dy * 0.75, dx * 0.75)
    assert best > 0.5
    np.testing.assert_allclose(offset, shift_mm, atol=1.5)


def test_mimics_look_like_a_lesion_in_some_modalities_only():
    """(dark on T2W, low ADC, bright HBV) of the painted means, against the zone around."""
    seen: dict[str, set[tuple[bool, bool, bool]]] = {}
    for index in range(12):
        anatomy = make_anatomy(index)
        (t2w, adc, hbv), _ = phantom._paint(np.random.default_rng(index), anatomy)
        bare = dataclasses.replace(anatomy, foci=())
        without, _ = phantom._paint(np.random.default_rng(index), bare)
        free = np.ones(SHAPE, bool)
        for focus in anatomy.foci:
            free[focus.box] &= focus.soft == 0
        for focus in anatomy.foci:
            core = np.zeros(SHAPE, bool)
            core[focus.box] = focus.mask & (focus.soft == 1)
            if core.sum() < 20 or focus.kind in ("node", "glandular"):
                continue
            zone = TZ if focus.zone == TZ else PZ
            before, around = (t2w, adc, hbv), free & (anatomy.zones == zone)
            if focus.kind in ("hot", "dim"):  # may lie across borders: against what they cover
                before, around = without, core
            signs = (
                bool(t2w[core].mean() < 0.95 * before[0][around].mean()),
                bool(adc[core].mean() < 0.85 * before[1][around].mean()),
                bool(hbv[core].mean() > 1.6 * before[2][around].mean()),
            )
            seen.setdefault(focus.kind, set()).add(signs)
    assert seen["lesion"] == {(True, True, True)}
    assert seen["stromal"] == {(True, True, False)}
    assert seen["haemorrhage"] == {(True, True, False)}
    assert {signs[1:] for signs in seen["shine"]} == {(False, True)}
    assert seen["hot"] == {(False, False, True)}
    assert seen["dim"] == {(False, True, False)}


@pytest.mark.slow
def test_lesions_reach_into_the_default_reference_grid(positives):
    half_mm = np.array([30.0, 48.0, 48.0])
    for anatomy in positives:
        for lesion in anatomy.lesions:
            index = np.argwhere(lesion.mask) + [part.start for part in lesion.box]
            place = (index - (np.array(SHAPE) - 1) / 2) * SPACING_MM
            assert (np.abs(place) < half_mm).all(axis=1).mean() > 0.5


# Builder


def test_a_built_case_does_not_depend_on_the_number_of_cases(tmp_path):
    stored = []
    for num_cases in (1, 2):
        builder = Builder(DataConfig(phantom=PhantomOptions(num_cases=num_cases), cache=tmp_path))
        builder.prepare()
        cases = [decode(record) for record in builder.source()]
        assert len(cases) == num_cases
        stored.append(cases[0])
    expected = preprocess_case(make_case(0), DataConfig())
    for case in stored:
        assert case.case_id == expected.case_id == "p00000_0"
        np.testing.assert_array_equal(case.image, expected.image)
        np.testing.assert_array_equal(case.label, expected.label)


@pytest.mark.slow
def test_another_seed_is_another_data_set(tmp_path):
    options = [PhantomOptions(seed=seed) for seed in (0, 1)]
    folders = {Builder(DataConfig(phantom=one, cache=tmp_path)).data_dir for one in options}
    assert len(folders) == 2


def test_no_cases_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"at least one case; got 0\. Use --data\.phantom\.num-cases=100"
    ):
        Builder(DataConfig(phantom=PhantomOptions(num_cases=0), cache=tmp_path))


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"seed must not be negative; got -1"):
        Builder(DataConfig(phantom=PhantomOptions(seed=-1), cache=tmp_path))
