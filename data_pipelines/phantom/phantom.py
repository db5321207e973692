"""Prostate MRI drawn from statistics of real patients: no file is read, any number of cases.

A case has two halves. `anatomy.make_anatomy` builds, analytically on the T2W grid, the gland with
its zones, the lesions, and foci that look like a lesion in one or two modalities but not in all
three. `make_case` puts the organs around it, gives every tissue a mean and a standard deviation in
each modality, adds texture, noise and a coil bias field, and samples ADC and HBV on a coarser
grid of their own, on which the patient has moved. Figures come from README.md of this folder.

Axes and coordinates are those of `anatomy`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data_pipelines.case import RawCase, Volume
from data_pipelines.phantom.anatomy import (
    AFMS,
    OUTSIDE,
    TZ,
    Anatomy,
    Box,
    Focus,
    Grid,
    bounding_box,
    case_id_of,
    make_anatomy,
    patient_of,
    rotation,
    smooth_field,
    soft_step,
)

DIFFUSION_SHAPE = (22, 52, 52)
"""Voxels of ADC and HBV."""
DIFFUSION_SPACING_MM = (3.0, 2.0, 2.0)
"""Voxel size of ADC and HBV."""


class Tissue(NamedTuple):
    """Mean of each modality, and standard deviation as a share of it (of 1000 for ADC)."""

    t2w: float
    adc: float
    hbv: float
    t2w_sd: float
    adc_sd: float
    hbv_sd: float


def make_case(index: int, *, seed: int = 0, target: str = "lesion") -> RawCase:
    """Images and label of a case, a function of its arguments alone.

    T2W is in arbitrary units, ADC in 1e-6 mm2/s, HBV in arbitrary units. The label lies on the
    T2W grid.
    """
    anatomy = make_anatomy(index, seed=seed)
    rng = np.random.default_rng((seed, index, 2))
    affine = oblique_affine(rng, anatomy.grid)
    mean, sd = _paint(rng, anatomy)
    patient, _ = patient_of(index)
    return RawCase(
        case_id=case_id_of(index),
        patient_id=f"p{patient:05d}",
        images={
            "t2w": Volume(_t2w_image(rng, mean[0], sd[0], anatomy.grid), affine),
            **_diffusion_images(rng, mean[1:], sd[1:], affine, anatomy.grid),
        },
        label=Volume(label_of(anatomy, target), affine),
        metadata={
            "lesion_ml": " ".join(f"{lesion.volume_ml:.2f}" for lesion in anatomy.lesions),
            "gland_ml": f"{anatomy.gland_ml:.1f}",
        },
    )


def label_of(anatomy: Anatomy, target: str) -> np.ndarray:
    """The truth of a target, uint8 on the T2W grid."""
    if target == "lesion":
        return anatomy.lesion_mask
    if target == "gland":
        return (anatomy.zones > OUTSIDE).astype(np.uint8)
    return np.minimum(anatomy.zones, TZ)


# Contrasts


def _paint(rng: np.random.Generator, anatomy: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of t2w, adc, hbv (``m d h w`` each) on the T2W grid."""
    canvas, pz, tz = paint_tissues(rng, anatomy)
    for focus in anatomy.foci:
        paint_tissue(canvas, _focus_tissue(rng, focus, pz, tz), focus.soft, focus.box)
    return canvas[:3], canvas[3:]


def paint_tissues(rng: np.random.Generator, anatomy: Anatomy) -> tuple[np.ndarray, Tissue, Tissue]:
    """All but the foci: means and standard deviations ``6 d h w``, and what the two zones are."""
    t2w = rng.lognormal(np.log(295), 0.15)  # of PZ
    hbv = rng.lognormal(np.log(16), 0.45)
    pz_adc = rng.uniform(1300, 1780)
    tz_adc = pz_adc * rng.uniform(0.75, 0.9)
    tz_t2w = t2w * rng.uniform(0.5, 0.7)
    pz = Tissue(t2w, pz_adc, hbv, 0.27, 0.19, 0.25)
    tz = Tissue(tz_t2w, tz_adc, hbv * rng.uniform(1.0, 1.35), 0.24, 0.13, 0.2)
    canvas = np.zeros((6, *anatomy.grid.shape), np.float32)
    paint = functools.partial(paint_tissue, canvas)
    _paint_surroundings(rng, anatomy, paint, t2w, hbv)
    inside = soft_step((1 - anatomy.gland_level) * anatomy.radii[1] / 0.8)
    zone_mm = (1 - anatomy.zone_level) * anatomy.radii[1]
    paint(pz, inside)
    paint(tz, inside * soft_step(zone_mm / 0.8))
    septa = smooth_field(rng, anatomy.grid.axes, 9.0)
    dark = Tissue(0.6 * tz_t2w, 0.93 * tz_adc, np.nan, 0.25, 0.13, np.nan)
    paint(dark, inside * soft_step(zone_mm / 0.8) * soft_step(2 - 9 * np.abs(septa)))
    rim = Tissue(0.35 * t2w, np.nan, np.nan, 0.3, np.nan, np.nan)
    paint(rim, 0.5 * inside * soft_step(1.2 - np.abs(zone_mm)))  # the surgical capsule
    stroma = Tissue(0.3 * t2w, 0.85 * tz_adc, 0.8 * hbv, 0.27, 0.19, 0.25)
    paint(
        stroma, ndimage.uniform_filter((anatomy.zones == AFMS).astype(np.float32), 3, axes=(1, 2))
    )
    return canvas, pz, tz


def paint_tissue(
    canvas: np.ndarray, tissue: Tissue, share: np.ndarray, box: Box | None = None
) -> None:
    """Blend a tissue into means and standard deviations, within ``box`` if one is given."""
    if box is None:
        box = bounding_box(share > 0)
        share = share[box]
    part = canvas[(slice(None), *box)]
    for channel, value in zip(part, _mean_and_sd(tissue), strict=True):
        if np.isfinite(value):
            channel += share * (value - channel)


def _mean_and_sd(tissue: Tissue) -> tuple[float, ...]:
    return (
        tissue.t2w,
        tissue.adc,
        tissue.hbv,
        tissue.t2w * tissue.t2w_sd,
        1000 * tissue.adc_sd,
        tissue.hbv * tissue.hbv_sd,
    )


def _focus_tissue(rng: np.random.Generator, focus: Focus, pz: Tissue, tz: Tissue) -> Tissue:
    """Contrast of a focus; what is NaN stays as its surroundings are.

    Where a mimic resembles a lesion, it draws from the lesion's own distribution.
    """
    around = tz if focus.zone == TZ else pz
    gland_hbv = (pz.hbv + tz.hbv) / 2
    dark = pz.t2w * rng.uniform(0.4, 0.6) if focus.zone != TZ else tz.t2w * rng.uniform(0.5, 0.85)
    restricted = min(rng.uniform(520, 850), 0.62 * tz.adc)
    bright = gland_hbv * np.exp(rng.uniform(np.log(2.4), np.log(4.8)))
    match focus.kind:
        case "lesion" | "node":
            return Tissue(dark, restricted, bright, 0.17, 0.13, 0.2)
        case "stromal":
            return Tissue(dark, restricted, gland_hbv * rng.uniform(0.7, 1.1), 0.17, 0.13, 0.2)
        case "haemorrhage":
            return Tissue(dark, restricted, gland_hbv * rng.uniform(0.5, 1.0), 0.17, 0.13, 0.2)
        case "glandular":
            return Tissue(pz.t2w * rng.uniform(0.8, 1.2), pz.adc * 1.05, around.hbv, 0.3, 0.2, 0.2)
        case "shine":
            factor = rng.uniform(1.0, 1.3)
            return Tissue(around.t2w * factor, around.adc * factor, bright, 0.3, 0.2, 0.2)
        case "hot":
            return Tissue(np.nan, np.nan, bright, np.nan, np.nan, 0.2)
        case _:  # dim
            return Tissue(np.nan, restricted, np.nan, np.nan, 0.13, np.nan)


def _paint_surroundings(
    rng: np.random.Generator,
    anatomy: Anatomy,
    paint: Callable[..., None],
    t2w: float,
    hbv: float,
) -> None:
    """Fat, bone, muscle, bladder, rectum and seminal vesicles; units of the gland's intensities."""
    (cz, cy, cx), (rz, ry, rx) = anatomy.centre, anatomy.radii
    zz, yy, xx = anatomy.grid.mesh
    ones = np.ones(anatomy.grid.shape, np.float32)

    def ellipsoid(z: float, y: float, x: float, radii: tuple[float, float, float]) -> np.ndarray:
        a, b, c = radii
        level = np.sqrt(((zz - z) / a) ** 2 + ((yy - y) / b) ** 2 + ((xx - x) / c) ** 2)
        return soft_step((1 - level) * min(b, c))

    fat = Tissue(t2w * rng.uniform(0.75, 1.5), 600, 0.45 * hbv, 0.15, 0.65, 0.6)
    muscle = Tissue(t2w * 0.2, 1000, 0.6 * hbv, 0.3, 0.4, 0.4)
    bone = Tissue(t2w * 0.6, 250, 0.3 * hbv, 0.25, 0.4, 0.5)
    paint(fat, ones)
    near_gland = Tissue(np.nan, 1300, 0.7 * hbv, np.nan, 0.35, 0.4)
    paint(near_gland, soft_step((1.15 - anatomy.gland_level) * ry / 2))
    veins = smooth_field(rng, anatomy.grid.axes, 4.0) - 0.6
    near = np.exp(-(((anatomy.gland_level - 1.25) / 0.2) ** 2))
    paint(Tissue(t2w * 1.3, 1600, 0.9 * hbv, 0.2, 0.3, 0.3), soft_step(veins) * near)
    paint(Tissue(t2w * 0.3, 900, 0.6 * hbv, 0.3, 0.3, 0.3), soft_step(-veins - 1.2) * near)
    side = rng.normal(0, 1.5)
    for sign in (-1, 1):
        paint(bone, ellipsoid(0, -12, side + sign * 58, (80, 34, 16)))
        paint(muscle, ellipsoid(5, 2 + side, side + sign * 41, (70, 33, 10)))
    paint(bone, ellipsoid(-20, cy - ry - 22, side, (34, 11, 14)))

    bladder = ellipsoid(cz + rz + 9, cy - 0.5 * ry - 4, cx + side, (17, 24, 30))
    paint(muscle, ellipsoid(cz + rz + 9, cy - 0.5 * ry - 4, cx + side, (20, 27, 33)))
    paint(Tissue(t2w * 1.6, 2500, 0.5 * hbv, 0.08, 0.3, 0.4), bladder)
    folds = soft_step(1.5 * smooth_field(rng, anatomy.grid.axes, 4.5) + 0.6)
    for sign in (-1, 1):
        vesicle = ellipsoid(cz + 0.95 * rz, cy + 0.8 * ry, cx + sign * 11, (9, 6, 13))
        paint(muscle, vesicle)
        paint(Tissue(t2w * 1.3, 1700, 0.8 * hbv, 0.2, 0.2, 0.3), vesicle * folds)

    radius = rng.uniform(10, 17)
    bend = 0.006 * (zz - cz) ** 2 - 0.12 * (zz - cz)
    y = cy + 0.82 * ry + radius + 1.5 + bend
    x = cx + rng.normal(0, 3)
    wobble = 1.2 * smooth_field(rng, anatomy.grid.axes, 14.0)
    rectum = np.sqrt(((yy - y) * rng.uniform(0.95, 1.2)) ** 2 + (xx - x) ** 2) + wobble
    sling = np.minimum(rectum - radius - 5, (anatomy.gland_level - 1) * rx - 6)
    paint(muscle, soft_step(1.3 - np.abs(sling)) * soft_step(np.abs(xx - cx) - 0.5 * rx))
    wall = soft_step(radius - rectum)
    paint(Tissue(t2w * 0.45, 1150, 1.0 * hbv, 0.3, 0.25, 0.35), wall)
    patches = soft_step(2 * smooth_field(rng, anatomy.grid.axes, 8.0))
    paint(Tissue(t2w * 0.45, 800, 2.8 * hbv, 0.3, 0.15, 0.25), wall * patches)  # mucosa
    lumen = soft_step(radius - rng.uniform(3, 4) - rectum)
    if rng.random() < 0.5:  # gas
        paint(Tissue(t2w * 0.04, 100, 0.15 * hbv, 0.5, 0.3, 0.6), lumen)
    else:
        paint(Tissue(t2w * rng.uniform(0.3, 0.8), 1300, 0.7 * hbv, 0.35, 0.5, 0.6), lumen)


# Images


def _t2w_image(
    rng: np.random.Generator, mean: np.ndarray, sd: np.ndarray, grid: Grid
) -> np.ndarray:
    texture = smooth_field(rng, grid.axes, 2.2)
    noise = rng.standard_normal(grid.shape, np.float32)
    image = mean + sd * (0.8 * texture + 0.6 * noise)
    image += 8 * noise[::-1]  # of the receiver: in the air as well; mirrored in depth (README.md)
    bias = np.exp(rng.uniform(0.05, 0.2) * smooth_field(rng, grid.axes, 70.0))
    scale = rng.lognormal(0, 0.3)
    return np.abs(image * bias * scale).astype(np.float32)


def _diffusion_images(
    rng: np.random.Generator,
    mean: np.ndarray,
    sd: np.ndarray,
    t2w_affine: np.ndarray,
    t2w_grid: Grid,
) -> Mapping[str, Volume]:
    """ADC and HBV on their own grid, the patient displaced by ``displacement_mm``."""
    grid_shift = np.array([0.0, *rng.uniform(-3, 3, 2)])
    axes = [
        ((np.arange(size) - (size - 1) / 2) * spacing + shift).astype(np.float32)
        for size, spacing, shift in zip(
            DIFFUSION_SHAPE, DIFFUSION_SPACING_MM, grid_shift, strict=True
        )
    ]
    tissue = [axis - shift for axis, shift in zip(axes, displacement_mm(rng), strict=True)]
    weights = [linear_weights(t, a) for t, a in zip(tissue, t2w_grid.axes, strict=True)]
    affine = affine_of(axes, DIFFUSION_SPACING_MM, t2w_affine, t2w_grid)
    volumes = {}
    for name, m, s in zip(("adc", "hbv"), mean, sd, strict=True):
        low_mean, low_sd = (
            np.einsum("ai,bj,ck,ijk->abc", *weights, part, optimize=True) for part in (m, s)
        )
        texture = smooth_field(rng, axes, 4.0)
        noise = rng.standard_normal(DIFFUSION_SHAPE, np.float32)
        image = low_mean + low_sd * (0.7 * texture + 0.7 * noise)
        image = np.maximum(image, 0) if name == "adc" else np.abs(image)
        volumes[name] = Volume(image.astype(np.float32), affine)
    return volumes


def affine_of(
    axes: Sequence[np.ndarray],
    spacing_mm: Sequence[float],
    t2w_affine: np.ndarray,
    t2w_grid: Grid,
) -> np.ndarray:
    """Affine of a grid along given coordinates, which are those of the T2W grid."""
    affine = t2w_affine.copy()
    affine[:3, :3] *= np.divide(spacing_mm, t2w_grid.spacing_mm)[::-1]
    first = [
        (a[0] - b[0]) / s for a, b, s in zip(axes, t2w_grid.axes, t2w_grid.spacing_mm, strict=True)
    ]
    affine[:3, 3] = (t2w_affine @ np.array([*first[::-1], 1.0]))[:3]
    return affine


def displacement_mm(rng: np.random.Generator) -> np.ndarray:
    """How far (``z y x``) tissue lies from its place on T2W in ADC and HBV: median 2.3, p90 4.8.

    Mostly forward: the rectum fills while the patient lies in the scanner.
    """
    direction = rng.normal((0.0, -1.2, 0.0), (0.3, 0.5, 0.5))
    length = min(rng.lognormal(np.log(2.3), 0.574), 7.0)
    return length * direction / np.linalg.norm(direction)


def linear_weights(points: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Matrix ``points axis`` that averages over one voxel of the coarser of the two grids."""
    width = max(points[1] - points[0], axis[1] - axis[0])
    clipped = np.clip(points, axis[0], axis[-1])
    weights = np.maximum(1 - np.abs(clipped[:, None] - axis) / width, 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def oblique_affine(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """Affine of a T2W grid: ``h`` towards posterior, ``w`` towards left, tilted by some degrees."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(rng, np.radians(4)) @ np.diag([-1.0, -1.0, 1.0])
    affine[:3, :3] *= grid.spacing_mm[::-1]
    middle = (np.array(grid.shape[::-1]) - 1) / 2
    affine[:3, 3] = rng.normal(0, (3, 15, 20)) - affine[:3, :3] @ middle
    return affine
