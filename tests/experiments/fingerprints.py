"""Fingerprints of data sets as they are published, made up of their figures, for tests of plans."""

import dataclasses

from data_pipelines.preparing.fingerprint import CaseFacts, Fingerprint

ADC = (200.0, 1300.0, 2600.0)


def made(
    count: int,
    *,
    spacing: tuple[float, float, float],
    size: tuple[int, int, int],
    modalities: tuple[str, ...] = ("t2w", "adc", "hbv"),
    box: tuple[float, float, float] = (12.0, 14.0, 14.0),
    reach: tuple[float, float, float] = (20.0, 30.0, 30.0),
    positive: float = 1.0,
    classes: int = 1,
    **others,
) -> Fingerprint:
    """Cases that are all alike, of which a share holds target."""
    facts = CaseFacts(
        "", "", spacing, size, modalities, on_one_grid=False,
        intensity={name: ADC if name == "adc" else (5.0, 200.0, 800.0) for name in modalities},
        **others,
    )  # fmt: skip
    target = {
        "class_ml": (2.0,) * classes,
        "parts_ml": (2.0 * classes,),
        "box_mm": box,
        "reach_mm": reach,
    }
    cases = []
    for i in range(count):
        holds = (i + 1) * positive // 1 > i * positive // 1
        changes = {"case_id": f"c{i:04d}", "patient_id": f"p{i:04d}"}
        changes |= target if holds else {"class_ml": (0.0,) * classes}
        cases.append(dataclasses.replace(facts, **changes))
    return Fingerprint(tuple(cases))


# Boxes and reach of the lesions of 1,500 patients, if glands lie in the middle of their images.
PICAI = made(
    300, spacing=(3.0, 0.5, 0.5), size=(21, 384, 384), positive=0.28,
    box=(15.0, 14.0, 16.0), reach=(36.0, 36.0, 45.0),
)  # fmt: skip
PROSTATE158 = made(
    139, spacing=(3.0, 0.4, 0.4), size=(24, 442, 442), positive=0.6,
    box=(12.0, 13.0, 13.0), reach=(24.0, 35.0, 33.0),
)  # fmt: skip
DECATHLON = made(
    32, spacing=(3.6, 0.625, 0.625), size=(20, 320, 320), modalities=("t2w", "adc"), classes=2,
    box=(50.0, 45.0, 55.0), reach=(30.0, 32.0, 36.0),
)  # fmt: skip
BRATS = made(
    120, spacing=(1.0, 1.0, 1.0), size=(155, 240, 240), modalities=("flair", "t1", "t1c", "t2"),
    classes=3, box=(60.0, 65.0, 60.0), reach=(65.0, 80.0, 62.0), content_mm=(72.0, 90.0, 74.0),
)  # fmt: skip
CINE = made(
    100, spacing=(10.0, 1.56, 1.56), size=(10, 232, 200), modalities=("cine",), classes=3,
    box=(90.0, 90.0, 95.0), reach=(50.0, 70.0, 70.0),
)  # fmt: skip
SLICES = made(
    60, spacing=(5.0, 1.0, 1.0), size=(1, 256, 256), modalities=("t2w",),
    box=(5.0, 30.0, 30.0), reach=(2.5, 60.0, 60.0),
)  # fmt: skip
HUGE = made(
    10, spacing=(0.5, 0.5, 0.5), size=(800, 1024, 1024), modalities=("ct",),
    box=(100.0, 100.0, 100.0), reach=(150.0, 200.0, 200.0),
)  # fmt: skip
TINY = made(
    260, spacing=(1.0, 1.0, 1.0), size=(36, 50, 35), modalities=("t1",), classes=2,
    box=(15.0, 40.0, 20.0), reach=(10.0, 22.0, 13.0),
)  # fmt: skip
THREE = made(3, spacing=(3.0, 0.5, 0.5), size=(20, 320, 320))
