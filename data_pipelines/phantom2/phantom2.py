"""Images and labels of the second phantom: what ``anatomy`` says, drawn as its centre would.

Tissues outside the foci, and how a volume is sampled, are those of ``data_pipelines.phantom``.
Figures and reasons stand in README.md of this folder.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import ndimage

from data_pipelines.case import RawCase, Volume
from data_pipelines.phantom.anatomy import (
    TZ,
    Anatomy,
    Focus,
    Grid,
    case_id_of,
    patient_of,
    smooth_field,
    soft_step,
)
from data_pipelines.phantom.phantom import (
    Tissue,
    affine_of,
    displacement_mm,
    label_of,
    linear_weights,
    oblique_affine,
    paint_tissue,
    paint_tissues,
)
from data_pipelines.phantom2.anatomy import (
    Centre,
    Finding,
    Texture,
    centre_of,
    draw_findings,
    make_anatomy,
)

WAVELENGTH_MM = 7.0
"""Of the texture of lesions and their mimics."""
GRAIN = 0.15
"""Amplitude of the grain of lesions, in that of bands."""


def make_case(
    index: int,
    *,
    seed: int = 0,
    target: str = "lesion",
    reader: Literal[1, 2] = 1,
) -> RawCase:
    """Images and label of a case, a function of its arguments alone.

    T2W is in arbitrary units, ADC in 1e-6 mm2/s, HBV in arbitrary units. The label lies on the
    T2W grid; lesions are outlined by a reader.
    """
    centre = centre_of(index, seed=seed)
    anatomy = make_anatomy(index, seed=seed)
    findings = draw_findings(np.random.default_rng((seed, index, 12)), anatomy)
    rng = np.random.default_rng((seed, index, 13))
    affine = oblique_affine(rng, anatomy.grid)
    mean, sd = _paint(rng, anatomy, findings, centre)
    if target == "lesion":
        label = outline(
            np.random.default_rng((seed, index, 13 + reader)), anatomy, findings, reader
        )
    else:
        label = label_of(anatomy, target)
    patient, _ = patient_of(index)
    lesions = [finding for finding in findings if finding.focus.kind == "lesion"]
    return RawCase(
        case_id=case_id_of(index),
        patient_id=f"p{patient:05d}",
        images={
            "t2w": Volume(_t2w_image(rng, mean[0], sd[0], anatomy.grid, centre), affine),
            **_diffusion_images(rng, mean[1:], sd[1:], affine, anatomy.grid, centre),
        },
        label=Volume(label, affine),
        metadata={
            "center": centre.name,
            "lesion_ml": " ".join(f"{finding.focus.volume_ml:.2f}" for finding in lesions),
            "visibility": " ".join(
                "/".join(f"{value:.2f}" for value in finding.visibility) for finding in lesions
            ),
            "gland_ml": f"{anatomy.gland_ml:.1f}",
        },
    )


# Labels


def outline(
    rng: np.random.Generator, anatomy: Anatomy, findings: Sequence[Finding], reader: int
) -> np.ndarray:
    """What a reader draws: uint8 on the T2W grid.

    The border lies off the true one by a share of the lesion's radius that is drawn for the whole
    lesion and another that varies along it. Reader 2 draws wider and passes over half of the
    equivocal lesions.
    """
    mask = np.zeros(anatomy.grid.shape, np.uint8)
    for finding in findings:
        focus = finding.focus
        if focus.kind != "lesion":
            continue
        passed_over = rng.random() < 0.5
        if reader == 2 and finding.equivocal and passed_over:
            continue
        radius = np.cbrt(focus.volume_ml * 1000 * 3 / (4 * np.pi))
        axes = [axis[part] for axis, part in zip(anatomy.grid.axes, focus.box, strict=True)]
        shift = rng.normal(0.06 if reader == 2 else 0.0, 0.05)
        wobble = 0.08 * smooth_field(rng, axes, max(0.9 * radius, 3.0))
        drawn = _depth_mm(focus.mask, anatomy.grid) > -radius * (shift + wobble)
        mask[focus.box] |= drawn if drawn.any() else focus.mask
    return mask


def _depth_mm(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Distance to the surface of a mask, above 0 inside."""
    padded = np.pad(mask, 1)
    inside, outside = (
        np.asarray(ndimage.distance_transform_edt(part, sampling=grid.spacing_mm))
        for part in (padded, ~padded)
    )
    return (inside - outside)[1:-1, 1:-1, 1:-1]


# Contrasts


def _paint(
    rng: np.random.Generator, anatomy: Anatomy, findings: Sequence[Finding], centre: Centre
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of t2w, adc, hbv (``m d h w`` each) on the T2W grid."""
    canvas, pz, tz = paint_tissues(rng, anatomy)
    canvas[3:] *= 0.8
    canvas[4] *= np.where(anatomy.gland_level < 1.1, 0.9, 0.45)
    canvas[1] *= 1 + 0.13 * smooth_field(rng, anatomy.grid.axes, 12.0)  # glands are uneven
    for finding in findings:
        focus = finding.focus
        tissue = _tissue(rng, focus, pz, tz, centre)
        soft = focus.soft
        if finding.diffuse:
            sd = [2.5 / step for step in anatomy.grid.spacing_mm]
            soft = ndimage.gaussian_filter(soft, sd)
        before = canvas[(slice(None), *focus.box)].copy()
        paint_tissue(canvas, tissue, soft, focus.box)
        after = canvas[(slice(None), *focus.box)]
        pattern = texture(rng, finding.texture, anatomy.grid, focus)
        strength = (0.7 * tissue.t2w, 480.0, -0.7 * tissue.hbv)
        for channel, (visible, swing) in enumerate(zip(finding.visibility, strength, strict=True)):
            for part in (channel, channel + 3):
                after[part] = before[part] + visible * (after[part] - before[part])
            if finding.texture != "none":
                after[channel] += visible * swing * soft * pattern
        if finding.capsule:
            rim = soft_step(1.3 - np.abs(_depth_mm(focus.mask, anatomy.grid)))
            after[0] += rim * (0.25 * pz.t2w - after[0])
    canvas[1] *= centre.adc_factor
    return canvas[:3], canvas[3:]


def texture(rng: np.random.Generator, kind: Texture, grid: Grid, focus: Focus) -> np.ndarray:
    """Waves of one length across a focus: of one direction in ``bands``, of all in ``grain``.

    To a filter that is alike in all directions, such as a blur, both are the same but for their
    amplitude: it multiplies every wave of that length by the same factor.
    """
    z, y, x = (axis[part] for axis, part in zip(grid.axes, focus.box, strict=True))
    zz, yy, xx = z[:, None, None], y[None, :, None], x[None, None, :]
    pattern = np.zeros(focus.mask.shape, np.float32)
    if kind == "none":
        return pattern
    count = 1 if kind == "bands" else 9
    for angle in rng.uniform(0, np.pi) + np.pi * np.arange(count) / count:
        tilt = rng.normal(0, 0.25)
        along = np.cos(tilt) * (np.cos(angle) * yy + np.sin(angle) * xx) + np.sin(tilt) * zz
        pattern += np.sin(2 * np.pi * along / WAVELENGTH_MM + rng.uniform(0, 2 * np.pi))
    return pattern * (1 if kind == "bands" else GRAIN / np.sqrt(count))


def _tissue(
    rng: np.random.Generator, focus: Focus, pz: Tissue, tz: Tissue, centre: Centre
) -> Tissue:
    """Contrast of a focus; what is NaN stays as its surroundings are.

    Where a mimic resembles a lesion, it draws from the lesion's own distribution.
    """
    around = tz if focus.zone == TZ else pz
    gland_hbv = (pz.hbv + tz.hbv) / 2
    dark = pz.t2w * rng.uniform(0.4, 0.6) if focus.zone != TZ else tz.t2w * rng.uniform(0.55, 0.9)
    restricted = min(rng.uniform(450, 740), 0.56 * tz.adc)
    bright = gland_hbv * np.exp(centre.hbv_power * rng.uniform(np.log(2.5), np.log(4.8)))
    match focus.kind:
        case "lesion" | "node" | "band" | "nodule":
            return Tissue(dark, restricted, bright, 0.17, 0.08, 0.2)
        case "stromal":
            return Tissue(dark, restricted, gland_hbv * rng.uniform(0.7, 1.1), 0.17, 0.08, 0.2)
        case "haemorrhage":
            return Tissue(dark, restricted, gland_hbv * rng.uniform(0.4, 0.7), 0.17, 0.08, 0.2)
        case "glandular":
            return Tissue(pz.t2w * rng.uniform(0.8, 1.2), pz.adc * 1.05, around.hbv, 0.3, 0.2, 0.2)
        case "shine":
            factor = rng.uniform(1.0, 1.3)
            return Tissue(around.t2w * factor, around.adc * factor, bright, 0.3, 0.2, 0.2)
        case "hot":
            return Tissue(np.nan, np.nan, bright, np.nan, np.nan, 0.2)
        case _:  # dim
            return Tissue(np.nan, restricted, np.nan, np.nan, 0.08, np.nan)


# Images


def _t2w_image(
    rng: np.random.Generator, mean: np.ndarray, sd: np.ndarray, grid: Grid, centre: Centre
) -> np.ndarray:
    fine = smooth_field(rng, grid.axes, 2.2)
    noise = rng.standard_normal(grid.shape, np.float32)
    receiver = rng.standard_normal(grid.shape, np.float32)
    image = mean + centre.noise * (sd * (0.8 * fine + 0.6 * noise) + 8 * receiver)
    bias = np.exp(rng.uniform(0.05, 0.3) * smooth_field(rng, grid.axes, 70.0))
    image = np.abs(image * bias * rng.lognormal(0, 0.3)).astype(np.float32)
    if rng.random() < 0.15:
        _clear_borders(rng, image, grid.spacing_mm)
    return image


def _diffusion_images(
    rng: np.random.Generator,
    mean: np.ndarray,
    sd: np.ndarray,
    t2w_affine: np.ndarray,
    t2w_grid: Grid,
    centre: Centre,
) -> Mapping[str, Volume]:
    """ADC and HBV on their own grid, the patient displaced by ``displacement_mm``."""
    spacing_mm = centre.diffusion_mm
    depth_mm = t2w_grid.shape[0] * t2w_grid.spacing_mm[0]
    field_mm = rng.uniform(84, 112)
    slices, pixels = round(depth_mm / spacing_mm[0]), round(field_mm / spacing_mm[1])
    shift = np.array([rng.uniform(-1.5, 1.5), *rng.uniform(-5, 5, 2)])
    if rng.random() < 0.2:  # begins or ends too early
        lost = int(rng.integers(1, 4))
        slices -= lost
        shift[0] += rng.choice((-0.5, 0.5)) * lost * spacing_mm[0]
    grid = Grid((slices, pixels, pixels), spacing_mm)
    axes = [(axis + s).astype(np.float32) for axis, s in zip(grid.axes, shift, strict=True)]
    tissue = [axis - moved for axis, moved in zip(axes, displacement_mm(rng), strict=True)]
    weights = [linear_weights(t, a) for t, a in zip(tissue, t2w_grid.axes, strict=True)]
    affine = affine_of(axes, spacing_mm, t2w_affine, t2w_grid)
    borders = rng.random() < 0.25
    seed = int(rng.integers(2**31))
    volumes = {}
    for name, m, s in zip(("adc", "hbv"), mean, sd, strict=True):
        low_mean, low_sd = (
            np.einsum("ai,bj,ck,ijk->abc", *weights, part, optimize=True) for part in (m, s)
        )
        fine = smooth_field(rng, axes, 4.0)
        noise = rng.standard_normal(grid.shape, np.float32)
        image = low_mean + centre.noise * low_sd * (0.7 * fine + 0.7 * noise)
        image = (np.maximum(image, 0) if name == "adc" else np.abs(image)).astype(np.float32)
        if borders:  # the same of both
            _clear_borders(np.random.default_rng(seed), image, spacing_mm)
        volumes[name] = Volume(image, affine)
    return volumes


def _clear_borders(
    rng: np.random.Generator, image: np.ndarray, spacing_mm: Sequence[float]
) -> None:
    """Set 3 to 12 mm at one to three of the in-plane sides to 0, as registration leaves them."""
    for side in rng.choice(4, int(rng.integers(1, 4)), replace=False):
        axis = 1 + side // 2
        width = max(round(rng.uniform(3, 12) / spacing_mm[axis]), 1)
        edge = np.moveaxis(image, axis, 0)
        edge[slice(0, width) if side % 2 else slice(-width, None)] = 0
