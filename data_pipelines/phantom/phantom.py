"""Prostate MRI drawn from statistics of real patients: no file is read, any number of cases.

A case has two halves. `make_anatomy` builds, analytically on the T2W grid, the gland with its
zones, the organs around it, the lesions, and foci that look like a lesion in one or two
modalities but not in all three. `make_case` gives every tissue a mean and a standard deviation in
each modality, adds texture, noise and a coil bias field, and samples ADC and HBV on a coarser
grid of their own, on which the patient has moved. Figures come from README.md of this folder.

Arrays are ``d h w``; ``h`` grows towards posterior and ``w`` towards the patient's left, as in
most real files. Coordinates are millimetres from the image centre, ``z y x``.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

from data_pipelines.case import RawCase, Volume

SHAPE = (22, 128, 128)
"""Voxels of the T2W volume."""
SPACING_MM = (3.0, 0.75, 0.75)
"""Voxel size of the T2W volume."""
DIFFUSION_SHAPE = (22, 52, 52)
"""Voxels of ADC and HBV."""
DIFFUSION_SPACING_MM = (3.0, 2.0, 2.0)
"""Voxel size of ADC and HBV."""

POSITIVE_SHARE = 0.283
"""Share of cases with a lesion."""
LESION_COUNT_SHARES = (0.93, 0.06, 0.01)
"""Of positive cases, the shares with 1, 2 and 3 lesions."""
LESION_ZONE_SHARES = {"pz": 0.49, "tz": 0.465, "outside": 0.045}
"""Where lesions arise."""
TWO_STUDIES_EVERY = 20
"""One case in so many is a second study of the patient before it."""

OUTSIDE, PZ, TZ, AFMS = range(4)
"""Codes of `Anatomy.zones`: outside the gland, peripheral and transition zone, and the anterior
fibromuscular stroma."""

_GOLDEN = (5**0.5 - 1) / 2
_VOXEL_ML = float(np.prod(SPACING_MM)) / 1000
_Z, _Y, _X = (
    ((np.arange(size) - (size - 1) / 2) * spacing).astype(np.float32)
    for size, spacing in zip(SHAPE, SPACING_MM, strict=True)
)
_ZZ, _YY, _XX = _Z[:, None, None], _Y[None, :, None], _X[None, None, :]

Box = tuple[slice, slice, slice]
FocusKind = Literal["lesion", "stromal", "glandular", "haemorrhage", "shine", "hot", "dim", "node"]


class Tissue(NamedTuple):
    """Mean of each modality, and standard deviation as a share of it (of 1000 for ADC)."""

    t2w: float
    adc: float
    hbv: float
    t2w_sd: float
    adc_sd: float
    hbv_sd: float


@dataclasses.dataclass(frozen=True)
class Focus:
    """A blob of tissue of its own: a lesion, or what may be taken for one.

    Attributes:
        kind: what it is.
        zone: zone code in which it arose.
        box: where ``soft`` and ``mask`` lie in the volume.
        soft: share of each voxel that belongs to it, float32.
        mask: its voxels.
    """

    kind: FocusKind
    zone: int
    box: Box
    soft: np.ndarray
    mask: np.ndarray

    @property
    def volume_ml(self) -> float:
        """Volume of the voxels."""
        return float(self.mask.sum()) * _VOXEL_ML


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """One patient at one time, before any image is taken.

    Attributes:
        zones: uint8 ``d h w`` zone codes.
        gland_level, zone_level: float32 level functions, below 1 within gland and within the
            transition zone.
        centre: of the gland, ``z y x`` mm.
        radii: semi-axes of the gland, ``z y x`` mm.
        foci: lesions and their mimics, disjoint.
    """

    zones: np.ndarray
    gland_level: np.ndarray
    zone_level: np.ndarray
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    foci: tuple[Focus, ...]

    @property
    def lesions(self) -> tuple[Focus, ...]:
        """Foci that are cancer."""
        return tuple(focus for focus in self.foci if focus.kind == "lesion")

    @property
    def lesion_mask(self) -> np.ndarray:
        """uint8 ``d h w``: 1 in all lesions."""
        mask = np.zeros(SHAPE, np.uint8)
        for lesion in self.lesions:
            mask[lesion.box] |= lesion.mask
        return mask

    @property
    def gland_ml(self) -> float:
        """Volume of all zones."""
        return float((self.zones > 0).sum()) * _VOXEL_ML


def patient_of(index: int) -> tuple[int, int]:
    """Number of the patient of a case, and which study of that patient it is, from 0."""
    second = index % TWO_STUDIES_EVERY == TWO_STUDIES_EVERY - 1
    return index - second, int(second)


def case_id_of(index: int) -> str:
    """Name of a case."""
    patient, study = patient_of(index)
    return f"p{patient:05d}_{study}"


def is_positive(index: int, *, seed: int) -> bool:
    """Whether the case has a lesion: a golden-ratio sequence, so every prefix holds the share."""
    start = np.random.default_rng(seed).random()
    return (start + index * _GOLDEN) % 1 < POSITIVE_SHARE


def make_anatomy(index: int, *, seed: int = 0) -> Anatomy:
    """Gland, zones, lesions and mimics of a case; both studies of a patient share the gland."""
    patient, _ = patient_of(index)
    gland_rng = np.random.default_rng((seed, patient, 0))
    rng = np.random.default_rng((seed, index, 1))
    anatomy = _make_gland(gland_rng)
    placer = _FocusPlacer(rng, anatomy)
    if is_positive(index, seed=seed):
        _place_lesions(placer, anatomy.gland_ml)
    _place_mimics(placer)
    return dataclasses.replace(anatomy, foci=tuple(placer.foci))


def make_case(
    index: int, *, seed: int = 0, target: Literal["lesion", "gland", "zones"] = "lesion"
) -> RawCase:
    """Images and label of a case, a function of its arguments alone.

    T2W is in arbitrary units, ADC in 1e-6 mm2/s, HBV in arbitrary units. The label lies on the
    T2W grid.
    """
    anatomy = make_anatomy(index, seed=seed)
    rng = np.random.default_rng((seed, index, 2))
    affine = _oblique_affine(rng)
    mean, sd = _paint(rng, anatomy)
    patient, _ = patient_of(index)
    return RawCase(
        case_id=case_id_of(index),
        patient_id=f"p{patient:05d}",
        images={
            "t2w": Volume(_t2w_image(rng, mean[0], sd[0]), affine),
            **_diffusion_images(rng, mean[1:], sd[1:], affine),
        },
        label=Volume(_label(anatomy, target), affine),
        metadata={
            "lesion_ml": " ".join(f"{lesion.volume_ml:.2f}" for lesion in anatomy.lesions),
            "gland_ml": f"{anatomy.gland_ml:.1f}",
        },
    )


def _label(anatomy: Anatomy, target: str) -> np.ndarray:
    if target == "lesion":
        return anatomy.lesion_mask
    if target == "gland":
        return (anatomy.zones > OUTSIDE).astype(np.uint8)
    return np.minimum(anatomy.zones, TZ)


# Shapes


def _make_gland(rng: np.random.Generator) -> Anatomy:
    """A deformed superellipsoid; the transition zone is a second one, further up and forward."""
    volume_ml = float(np.clip(rng.lognormal(np.log(52), 0.48), 15, 140))
    centre = _triple(np.clip(rng.normal((0, -2, 0), (1.5, 2.5, 2)), (-4, -7, -5), (4, 3, 5)))
    radii = volume_ml ** (1 / 3) * np.array([6.1, 5.8, 6.9]) * rng.lognormal(0, 0.07, 3)
    radii = _triple(np.minimum(radii, (30, 40, 40)))
    warp = [0.09 * _smooth_field(rng, (_Z, _Y, _X), 18.0) for _ in range(3)]
    w = (_ZZ - centre[0]) / radii[0] + warp[0]
    v = (_YY - centre[1]) / radii[1] + warp[1]
    u = (_XX - centre[2]) / radii[2] + warp[2]
    apex = 1 - 0.18 * np.clip(-w, 0, 1.5)  # narrower towards the apex
    midline = rng.uniform(0.05, 0.25) * np.exp(-((u / 0.45) ** 2))  # the rectum's impression
    behind = np.where(v > 0, (v * 1.12 + midline) / apex, v / apex)
    power = rng.uniform(2.1, 2.6)
    level = sum(np.abs(axis) ** power for axis in (u / apex, behind, w)) ** (1 / power)
    level /= _level_of_volume(level, volume_ml)
    gland = level < 1

    pz_share = 0.33 - 0.19 * np.log(volume_ml / 51) + rng.normal(0, 0.08)
    pz_share = float(np.clip(pz_share, 0.12, 0.58))
    zone_level = np.sqrt(
        (u / 0.8) ** 2
        + ((v + rng.uniform(0.22, 0.4)) / 0.85) ** 2
        + ((w - rng.uniform(0.1, 0.3)) / 0.95) ** 2
    )
    zone_level *= np.exp(0.08 * _smooth_field(rng, (_Z, _Y, _X), 8.0))
    zone_level /= np.quantile(zone_level[gland], 1 - pz_share)
    zones = np.where(gland, np.where(zone_level < 1, TZ, PZ), OUTSIDE).astype(np.uint8)
    depth_mm = (1 - level) * radii[1]
    stroma = (np.abs(u) < 0.4) & (v < -0.3) & (depth_mm < rng.uniform(2, 5)) & gland
    zones[stroma] = AFMS
    return Anatomy(zones, level, zone_level, centre, radii, ())


class _FocusPlacer:
    """Puts foci into a gland, none into another."""

    def __init__(self, rng: np.random.Generator, anatomy: Anatomy):
        self.rng = rng
        self.anatomy = anatomy
        self.free = np.ones(SHAPE, bool)
        self.foci: list[Focus] = []

    def place(
        self,
        kind: FocusKind,
        zone: int,
        volume_ml: float,
        *,
        where: np.ndarray,
        costs: Sequence[float],
        bumps: float = 0.17,
    ) -> None:
        """Add a focus of a volume around a random voxel of ``where``, if any is free there.

        Args:
            kind: what it is.
            zone: zone code in which it arises.
            volume_ml: its volume; less where it does not find the room.
            where: mask of the possible centres.
            costs: for each zone code, how much less far the focus reaches there, in radii.
            bumps: how far its surface departs from an ellipsoid, in radii.
        """
        candidates = np.flatnonzero(where & self.free)
        if not candidates.size:
            return
        rng = self.rng
        middle = np.unravel_index(rng.choice(candidates), SHAPE)
        centre = [float(axis[i]) for axis, i in zip((_Z, _Y, _X), middle, strict=True)]
        radius = float(np.cbrt(volume_ml * 1000 * 3 / (4 * np.pi)))
        reach = 2.2 * radius + 3
        box, axes = _box_around(centre, reach)
        offset = np.stack(
            np.meshgrid(*(a - c for a, c in zip(axes, centre, strict=True)), indexing="ij"), -1
        )
        scale = rng.lognormal(0, 0.2, 3)
        scale /= np.cbrt(scale.prod())
        local = offset @ (_rotation(rng, 1.0) / (scale * radius)).astype(np.float32)
        level = np.linalg.norm(local, axis=-1)
        level += bumps * _smooth_field(rng, axes, max(0.7 * radius, 2.0))
        level += np.asarray(costs, np.float32)[self.anatomy.zones[box]]
        level[~self.free[box]] = np.inf
        limit = _level_of_volume(level, volume_ml)
        mask = _largest_part(level < limit)
        soft = _soft_step((limit - level) * radius / 0.8)
        soft[(level < limit) & ~mask] = 0
        self.free[box] &= ~mask
        self.foci.append(Focus(kind, zone, box, soft, mask))


_EVERYWHERE = (0.0, 0.0, 0.0, 0.0)
_WITHIN_PZ = (0.4, 0.0, 0.5, 0.5)
_WITHIN_TZ = (0.4, 0.4, 0.0, 0.0)
_WITHIN_GLAND = (0.4, 0.0, 0.0, 0.0)
_BESIDE_GLAND = (0.0, 0.8, 0.8, 0.8)


def _place_lesions(placer: _FocusPlacer, gland_ml: float) -> None:
    rng, zones = placer.rng, placer.anatomy.zones
    level = placer.anatomy.gland_level
    central = np.abs(_ZZ) < 24  # every lesion reaches into the default reference grid
    count = 1 + int(rng.choice(3, p=LESION_COUNT_SHARES))
    for _ in range(count):
        volume_ml = float(np.clip(rng.lognormal(0.317, 1.182), 0.08, 0.4 * gland_ml))
        zone = str(rng.choice(list(LESION_ZONE_SHARES), p=list(LESION_ZONE_SHARES.values())))
        if zone == "pz":
            where, code, costs = zones == PZ, PZ, _WITHIN_PZ
        elif zone == "tz":
            where, code, costs = zones >= TZ, TZ, _WITHIN_TZ
        else:
            where, code, costs = (level > 1.02) & (level < 1.12), OUTSIDE, _BESIDE_GLAND
        placer.place("lesion", code, volume_ml, where=where & central, costs=costs)


def _place_mimics(placer: _FocusPlacer) -> None:
    """What looks like a lesion in some modalities, alike in positive and negative cases."""
    rng, zones, level = placer.rng, placer.anatomy.zones, placer.anatomy.gland_level
    pz, tz, gland = zones == PZ, zones == TZ, zones > OUTSIDE
    rectal = (np.abs(level - 1) < 0.1) & (placer.anatomy.centre[1] < _YY)
    rectal &= np.abs(_XX - placer.anatomy.centre[2]) < 0.6 * placer.anatomy.radii[2]

    def volume() -> float:
        return float(np.clip(rng.lognormal(0.1, 0.9), 0.2, 4.0))

    def place(
        kind: FocusKind, zone: int, count: int, where: np.ndarray, costs: Sequence[float]
    ) -> None:
        for _ in range(count):
            placer.place(kind, zone, volume(), where=where, costs=costs)

    place("stromal", TZ, 1 + rng.poisson(1.2), tz, _WITHIN_TZ)
    place("glandular", TZ, rng.poisson(2.0), tz, _WITHIN_TZ)
    place("haemorrhage", PZ, rng.poisson(1.0), pz, _WITHIN_PZ)
    place("shine", PZ, rng.poisson(1.4), gland, _WITHIN_GLAND)
    place("hot", OUTSIDE, rng.poisson(0.7), rectal, _EVERYWHERE)
    place("dim", PZ, rng.poisson(1.2), gland, _WITHIN_GLAND)
    place("node", OUTSIDE, 2 + rng.poisson(2), level > 1.6, _EVERYWHERE)


def _level_of_volume(level: np.ndarray, volume_ml: float) -> float:
    """Value below which ``level`` holds a volume."""
    count = min(max(round(volume_ml / _VOXEL_ML), 1), level.size - 1)
    return float(np.partition(level, count, axis=None)[count])


def _bounding_box(mask: np.ndarray) -> Box:
    """Smallest box that holds a mask; empty if the mask is."""
    occupied = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    d, h, w = (slice(int(i[0]), int(i[-1]) + 1) if i.size else slice(0) for i in occupied)
    return d, h, w


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest of the connected parts of a mask."""
    parts = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=parts)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return mask & (parts == sizes.argmax())


def _box_around(centre: Sequence[float], reach_mm: float) -> tuple[Box, list[np.ndarray]]:
    """Part of the volume within a distance of a point along each axis, and its coordinates."""
    slices = []
    for axis, middle in zip((_Z, _Y, _X), centre, strict=True):
        start, stop = np.searchsorted(axis, (middle - reach_mm, middle + reach_mm))
        slices.append(slice(int(start), int(stop)))
    box = (slices[0], slices[1], slices[2])
    return box, [axis[part] for axis, part in zip((_Z, _Y, _X), box, strict=True)]


def _smooth_field(
    rng: np.random.Generator, axes: Sequence[np.ndarray], length_mm: float
) -> np.ndarray:
    """Gaussian random field of mean 0 and sd 1: bells of sd ``length_mm / 2`` on a lattice."""
    bases = []
    for axis in axes:
        knots = np.arange(axis[0] - length_mm, axis[-1] + 1.5 * length_mm, 0.75 * length_mm)
        basis = np.exp(-2 * ((axis[:, None] - knots) / length_mm) ** 2)
        bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases], np.float32)
    for basis in bases:  # each pass moves the first axis, now interpolated, to the end
        field = np.tensordot(field, basis, axes=(0, 1))
    return field


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    a, b, c = (float(v) for v in values)  # Python floats leave float32 arrays float32
    return a, b, c


def _soft_step(level_mm: np.ndarray) -> np.ndarray:
    """0 to 1 where the argument passes 0, over about two units."""
    return np.clip(0.5 + 0.5 * level_mm, 0, 1).astype(np.float32)


def _rotation(rng: np.random.Generator, angle_sd: float) -> np.ndarray:
    """Rotation matrix by normally distributed angles about the three axes."""
    a, b, c = rng.normal(0, angle_sd, 3)
    about_z = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    about_x = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


# Contrasts


def _paint(rng: np.random.Generator, anatomy: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of t2w, adc, hbv (``m d h w`` each) on the T2W grid."""
    t2w = rng.lognormal(np.log(295), 0.15)  # of PZ
    hbv = rng.lognormal(np.log(16), 0.45)
    pz_adc = rng.uniform(1300, 1780)
    tz_adc = pz_adc * rng.uniform(0.75, 0.9)
    tz_t2w = t2w * rng.uniform(0.5, 0.7)
    pz = Tissue(t2w, pz_adc, hbv, 0.27, 0.19, 0.25)
    tz = Tissue(tz_t2w, tz_adc, hbv * rng.uniform(1.0, 1.35), 0.24, 0.13, 0.2)
    canvas = np.zeros((6, *SHAPE), np.float32)
    paint = functools.partial(_paint_tissue, canvas)
    _paint_surroundings(rng, anatomy, paint, t2w, hbv)
    inside = _soft_step((1 - anatomy.gland_level) * anatomy.radii[1] / 0.8)
    zone_mm = (1 - anatomy.zone_level) * anatomy.radii[1]
    paint(pz, inside)
    paint(tz, inside * _soft_step(zone_mm / 0.8))
    septa = _smooth_field(rng, (_Z, _Y, _X), 9.0)
    dark = Tissue(0.6 * tz_t2w, 0.93 * tz_adc, np.nan, 0.25, 0.13, np.nan)
    paint(dark, inside * _soft_step(zone_mm / 0.8) * _soft_step(2 - 9 * np.abs(septa)))
    rim = Tissue(0.35 * t2w, np.nan, np.nan, 0.3, np.nan, np.nan)
    paint(rim, 0.5 * inside * _soft_step(1.2 - np.abs(zone_mm)))  # the surgical capsule
    stroma = Tissue(0.3 * t2w, 0.85 * tz_adc, 0.8 * hbv, 0.27, 0.19, 0.25)
    paint(
        stroma, ndimage.uniform_filter((anatomy.zones == AFMS).astype(np.float32), 3, axes=(1, 2))
    )
    for focus in anatomy.foci:
        paint(_focus_tissue(rng, focus, pz, tz), focus.soft, focus.box)
    return canvas[:3], canvas[3:]


def _paint_tissue(
    canvas: np.ndarray, tissue: Tissue, share: np.ndarray, box: Box | None = None
) -> None:
    """Blend a tissue into means and standard deviations, within ``box`` if one is given."""
    if box is None:
        box = _bounding_box(share > 0)
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
        case "dim":
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
    ones = np.ones(SHAPE, np.float32)

    def ellipsoid(z: float, y: float, x: float, radii: tuple[float, float, float]) -> np.ndarray:
        a, b, c = radii
        level = np.sqrt(((_ZZ - z) / a) ** 2 + ((_YY - y) / b) ** 2 + ((_XX - x) / c) ** 2)
        return _soft_step((1 - level) * min(b, c))

    fat = Tissue(t2w * rng.uniform(0.75, 1.5), 600, 0.45 * hbv, 0.15, 0.65, 0.6)
    muscle = Tissue(t2w * 0.2, 1000, 0.6 * hbv, 0.3, 0.4, 0.4)
    bone = Tissue(t2w * 0.6, 250, 0.3 * hbv, 0.25, 0.4, 0.5)
    paint(fat, ones)
    near_gland = Tissue(np.nan, 1300, 0.7 * hbv, np.nan, 0.35, 0.4)
    paint(near_gland, _soft_step((1.15 - anatomy.gland_level) * ry / 2))
    veins = _smooth_field(rng, (_Z, _Y, _X), 4.0) - 0.6
    near = np.exp(-(((anatomy.gland_level - 1.25) / 0.2) ** 2))
    paint(Tissue(t2w * 1.3, 1600, 0.9 * hbv, 0.2, 0.3, 0.3), _soft_step(veins) * near)
    paint(Tissue(t2w * 0.3, 900, 0.6 * hbv, 0.3, 0.3, 0.3), _soft_step(-veins - 1.2) * near)
    side = rng.normal(0, 1.5)
    for sign in (-1, 1):
        paint(bone, ellipsoid(0, -12, side + sign * 58, (80, 34, 16)))
        paint(muscle, ellipsoid(5, 2 + side, side + sign * 41, (70, 33, 10)))
    paint(bone, ellipsoid(-20, cy - ry - 22, side, (34, 11, 14)))

    bladder = ellipsoid(cz + rz + 9, cy - 0.5 * ry - 4, cx + side, (17, 24, 30))
    paint(muscle, ellipsoid(cz + rz + 9, cy - 0.5 * ry - 4, cx + side, (20, 27, 33)))
    paint(Tissue(t2w * 1.6, 2500, 0.5 * hbv, 0.08, 0.3, 0.4), bladder)
    folds = _soft_step(1.5 * _smooth_field(rng, (_Z, _Y, _X), 4.5) + 0.6)
    for sign in (-1, 1):
        vesicle = ellipsoid(cz + 0.95 * rz, cy + 0.8 * ry, cx + sign * 11, (9, 6, 13))
        paint(muscle, vesicle)
        paint(Tissue(t2w * 1.3, 1700, 0.8 * hbv, 0.2, 0.2, 0.3), vesicle * folds)

    radius = rng.uniform(10, 17)
    bend = 0.006 * (_ZZ - cz) ** 2 - 0.12 * (_ZZ - cz)
    y = cy + 0.82 * ry + radius + 1.5 + bend
    x = cx + rng.normal(0, 3)
    wobble = 1.2 * _smooth_field(rng, (_Z, _Y, _X), 14.0)
    rectum = np.sqrt(((_YY - y) * rng.uniform(0.95, 1.2)) ** 2 + (_XX - x) ** 2) + wobble
    sling = np.minimum(rectum - radius - 5, (anatomy.gland_level - 1) * rx - 6)
    paint(muscle, _soft_step(1.3 - np.abs(sling)) * _soft_step(np.abs(_XX - cx) - 0.5 * rx))
    wall = _soft_step(radius - rectum)
    paint(Tissue(t2w * 0.45, 1150, 1.0 * hbv, 0.3, 0.25, 0.35), wall)
    patches = _soft_step(2 * _smooth_field(rng, (_Z, _Y, _X), 8.0))
    paint(Tissue(t2w * 0.45, 800, 2.8 * hbv, 0.3, 0.15, 0.25), wall * patches)  # mucosa
    lumen = _soft_step(radius - rng.uniform(3, 4) - rectum)
    if rng.random() < 0.5:  # gas
        paint(Tissue(t2w * 0.04, 100, 0.15 * hbv, 0.5, 0.3, 0.6), lumen)
    else:
        paint(Tissue(t2w * rng.uniform(0.3, 0.8), 1300, 0.7 * hbv, 0.35, 0.5, 0.6), lumen)


# Images


def _t2w_image(rng: np.random.Generator, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    texture = _smooth_field(rng, (_Z, _Y, _X), 2.2)
    noise = rng.standard_normal(SHAPE, np.float32)
    image = mean + sd * (0.8 * texture + 0.6 * noise)
    image += 8 * noise[::-1]  # of the receiver: in the air as well
    bias = np.exp(rng.uniform(0.05, 0.2) * _smooth_field(rng, (_Z, _Y, _X), 70.0))
    scale = rng.lognormal(0, 0.3)
    return np.abs(image * bias * scale).astype(np.float32)


def _diffusion_images(
    rng: np.random.Generator, mean: np.ndarray, sd: np.ndarray, t2w_affine: np.ndarray
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
    weights = [_linear_weights(t, a) for t, a in zip(tissue, (_Z, _Y, _X), strict=True)]
    affine = t2w_affine.copy()
    affine[:3, :3] *= np.divide(DIFFUSION_SPACING_MM, SPACING_MM)[::-1]
    first = [(a[0] - b[0]) / s for a, b, s in zip(axes, (_Z, _Y, _X), SPACING_MM, strict=True)]
    affine[:3, 3] = (t2w_affine @ np.array([*first[::-1], 1.0]))[:3]
    volumes = {}
    for name, m, s in zip(("adc", "hbv"), mean, sd, strict=True):
        low_mean, low_sd = (
            np.einsum("ai,bj,ck,ijk->abc", *weights, part, optimize=True) for part in (m, s)
        )
        texture = _smooth_field(rng, axes, 4.0)
        noise = rng.standard_normal(DIFFUSION_SHAPE, np.float32)
        image = low_mean + low_sd * (0.7 * texture + 0.7 * noise)
        image = np.maximum(image, 0) if name == "adc" else np.abs(image)
        volumes[name] = Volume(image.astype(np.float32), affine)
    return volumes


def displacement_mm(rng: np.random.Generator) -> np.ndarray:
    """How far (``z y x``) tissue lies from its place on T2W in ADC and HBV: median 2.3, p90 4.8.

    Mostly forward: the rectum fills while the patient lies in the scanner.
    """
    direction = rng.normal((0.0, -1.2, 0.0), (0.3, 0.5, 0.5))
    length = min(rng.lognormal(np.log(2.3), 0.574), 7.0)
    return length * direction / np.linalg.norm(direction)


def _linear_weights(points: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Matrix ``points axis`` that averages over one voxel of the coarser of the two grids."""
    width = max(points[1] - points[0], axis[1] - axis[0])
    clipped = np.clip(points, axis[0], axis[-1])
    weights = np.maximum(1 - np.abs(clipped[:, None] - axis) / width, 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _oblique_affine(rng: np.random.Generator) -> np.ndarray:
    """Affine of a T2W grid: ``h`` towards posterior, ``w`` towards left, tilted by some degrees."""
    affine = np.eye(4)
    affine[:3, :3] = _rotation(rng, np.radians(4)) @ np.diag([-1.0, -1.0, 1.0])
    affine[:3, :3] *= SPACING_MM[::-1]
    middle = (np.array(SHAPE[::-1]) - 1) / 2
    affine[:3, 3] = rng.normal(0, (3, 15, 20)) - affine[:3, :3] @ middle
    return affine
