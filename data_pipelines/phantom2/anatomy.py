"""What patients of the second phantom have: a centre, a gland on its grid, lesions and mimics.

Gland, lesions and the ways to place them are those of ``data_pipelines.phantom.anatomy``; here are
the grids, the mimics, and how each focus shows. Figures come from README.md of this folder.
"""

import dataclasses
from typing import Literal

import numpy as np

from data_pipelines.phantom.anatomy import (
    EVERYWHERE,
    OUTSIDE,
    PZ,
    TZ,
    WITHIN_GLAND,
    WITHIN_PZ,
    WITHIN_TZ,
    Anatomy,
    Focus,
    FocusPlacer,
    Grid,
    is_positive,
    make_gland,
    patient_of,
    place_lesions,
    rectal_border,
)

FAINT_SHARE = 0.12
"""Of lesions and of what resembles them in all contrasts, the share that shows weakly in all."""
DIFFUSE_SHARE = 0.1
"""Share without a sharp border."""
UNSEEN_SHARES = {"t2w": 0.1, "adc": 0.02, "hbv": 0.14}
"""Share that does not show in one contrast."""

Texture = Literal["none", "grain", "bands"]
"""Of a focus: none of its own; alike in all directions; or parallel bands."""


@dataclasses.dataclass(frozen=True)
class Centre:
    """Where patients are examined, and what that does to their images.

    Attributes:
        name: of the centre.
        share: of the patients.
        slice_mm, pixel_mm: T2W voxel size.
        slices: fewest and most of T2W.
        diffusion_mm: voxel size of ADC and HBV, ``d h w``.
        adc_factor: of all ADC values: gradients are calibrated differently.
        hbv_power: of the ratio of a focus to the gland in HBV, which grows with the b-value.
        noise: of all images, in units of the first centre's.
    """

    name: str
    share: float
    slice_mm: float
    pixel_mm: float
    slices: tuple[int, int]
    diffusion_mm: tuple[float, float, float]
    adc_factor: float
    hbv_power: float
    noise: float


CENTRES = (
    Centre("A", 0.5, 3.0, 0.65, (20, 24), (3.0, 2.0, 2.0), 1.0, 1.0, 1.0),
    Centre("B", 0.3, 3.6, 0.55, (17, 20), (3.6, 1.6, 1.6), 0.94, 1.15, 1.2),
    Centre("C", 0.2, 3.0, 0.8, (21, 25), (4.0, 2.4, 2.4), 1.05, 0.88, 0.9),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A focus and how it shows.

    Attributes:
        focus: what and where it is.
        visibility: in t2w, adc, hbv, the share of its contrast with its surroundings that shows.
        texture: within it.
        capsule: whether a dark rim surrounds it on T2W.
        diffuse: whether its border is soft.
    """

    focus: Focus
    visibility: tuple[float, float, float]
    texture: Texture = "none"
    capsule: bool = False
    diffuse: bool = False

    @property
    def equivocal(self) -> bool:
        """Whether a careful reader may pass over it."""
        return max(self.visibility) < 0.75


def centre_of(index: int, *, seed: int) -> Centre:
    """The centre of a case's patient."""
    return _drawn_patient(index, seed)[0]


def _drawn_patient(index: int, seed: int) -> tuple[Centre, Grid, np.random.Generator]:
    """Centre and T2W grid of the patient, and the generator to go on with."""
    rng = np.random.default_rng((seed, patient_of(index)[0], 10))
    centre = CENTRES[rng.choice(len(CENTRES), p=[one.share for one in CENTRES])]
    slices = int(rng.integers(centre.slices[0], centre.slices[1] + 1))
    field_mm = rng.uniform(96, 112)
    if rng.random() < 0.2:  # less than the reference grid holds
        slices -= int(rng.integers(2, 5))
        field_mm = rng.uniform(82, 96)
    pixels = 2 * round(field_mm / centre.pixel_mm / 2)
    grid = Grid((slices, pixels, pixels), (centre.slice_mm, centre.pixel_mm, centre.pixel_mm))
    return centre, grid, rng


def make_anatomy(index: int, *, seed: int = 0) -> Anatomy:
    """Gland, zones, lesions and mimics of a case; both studies of a patient share the gland."""
    _, grid, gland_rng = _drawn_patient(index, seed)
    anatomy = make_gland(gland_rng, grid, spread=1.7)
    placer = FocusPlacer(np.random.default_rng((seed, index, 11)), anatomy)
    if is_positive(index, seed=seed):
        zz, yy, xx = grid.mesh
        place_lesions(placer, (np.abs(zz) < 24) & (np.abs(yy) < 40) & (np.abs(xx) < 40))
    _place_mimics(placer)
    return dataclasses.replace(anatomy, foci=tuple(placer.foci))


def _place_mimics(placer: FocusPlacer) -> None:
    """What may be taken for a lesion, alike in positive and negative cases."""
    rng, zones, level = placer.rng, placer.anatomy.zones, placer.anatomy.gland_level
    pz, tz, gland = zones == PZ, zones == TZ, zones > OUTSIDE

    def place(kind, zone, count, where, costs, *, like_lesions=False, aspect=(1.0, 1.0, 1.0)):
        for _ in range(count):
            if like_lesions:
                volume_ml = float(np.clip(rng.lognormal(0.2, 0.8), 0.3, 4.0))
            else:
                volume_ml = float(np.clip(rng.lognormal(0.1, 0.9), 0.2, 4.0))
            placer.place(kind, zone, volume_ml, where=where, costs=costs, aspect=aspect)

    place("band", PZ, rng.poisson(0.8), pz, WITHIN_PZ, like_lesions=True, aspect=(1.2, 0.5, 1.7))
    place("nodule", TZ, rng.poisson(0.8), tz, WITHIN_TZ, like_lesions=True)
    place("stromal", TZ, rng.poisson(0.7), tz, WITHIN_TZ)
    place("haemorrhage", PZ, rng.poisson(0.5), pz, WITHIN_PZ)
    place("shine", PZ, rng.poisson(1.0), gland, WITHIN_GLAND)
    place("hot", OUTSIDE, rng.poisson(0.8), rectal_border(placer.anatomy), EVERYWHERE)
    place("dim", PZ, rng.poisson(0.5), gland, WITHIN_GLAND)
    place("glandular", TZ, rng.poisson(1.5), tz, WITHIN_TZ)
    place("node", OUTSIDE, 2 + rng.poisson(2), level > 1.6, EVERYWHERE)


def draw_findings(rng: np.random.Generator, anatomy: Anatomy) -> list[Finding]:
    """How each focus shows; bands and nodules have the visibilities of lesions."""
    findings = []
    for focus in anatomy.foci:
        if focus.kind not in ("lesion", "band", "nodule"):
            findings.append(Finding(focus, (1.0, 1.0, 1.0)))
            continue
        strength = rng.uniform(0.45, 0.65) if rng.random() < FAINT_SHARE else rng.uniform(0.85, 1.0)
        visibility = strength * rng.uniform(0.9, 1.0, 3)
        unseen = rng.choice(4, p=[*UNSEEN_SHARES.values(), 1 - sum(UNSEEN_SHARES.values())])
        if unseen < 3:
            visibility[unseen] = 0
        t2w, adc, hbv = (float(value) for value in visibility)
        findings.append(
            Finding(
                focus,
                (t2w, adc, hbv),
                texture="grain" if focus.kind == "lesion" else "bands",
                capsule=focus.kind == "nodule",
                diffuse=bool(rng.random() < DIFFUSE_SHARE),
            )
        )
    return findings
