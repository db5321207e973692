"""The anatomy of phantom patients: gland, zones, lesions and what resembles them, on the T2W grid.

Arrays are ``d h w``; ``h`` grows towards posterior and ``w`` towards the patient's left, as in
most real files. Coordinates are millimetres from the image centre, ``z y x``. Figures come from
README.md of this folder.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

SHAPE = (22, 128, 128)
"""Voxels of the T2W volume."""
SPACING_MM = (3.0, 0.75, 0.75)
"""Voxel size of the T2W volume."""
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
Box = tuple[slice, slice, slice]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Voxels of a volume and their coordinates, millimetres from its centre.

    Attributes:
        shape: number of voxels, ``d h w``.
        spacing_mm: voxel size, ``d h w``.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @functools.cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates along each axis, float32."""
        z, y, x = (
            ((np.arange(size) - (size - 1) / 2) * spacing).astype(np.float32)
            for size, spacing in zip(self.shape, self.spacing_mm, strict=True)
        )
        return z, y, x

    @property
    def mesh(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, to be broadcast over the volume."""
        z, y, x = self.axes
        return z[:, None, None], y[None, :, None], x[None, None, :]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return float(np.prod(self.spacing_mm)) / 1000


GRID = Grid(SHAPE, SPACING_MM)
"""Of every T2W volume of this data set."""


@dataclasses.dataclass(frozen=True)
class Focus:
    """A blob of tissue of its own: a lesion, or what may be taken for one.

    Attributes:
        kind: what it is.
        zone: zone code in which it arose.
        box: where ``soft`` and ``mask`` lie in the volume.
        soft: share of each voxel that belongs to it, float32.
        mask: its voxels.
        voxel_ml: volume of one of them.
    """

    kind: str
    zone: int
    box: Box
    soft: np.ndarray
    mask: np.ndarray
    voxel_ml: float

    @property
    def volume_ml(self) -> float:
        """Volume of the voxels."""
        return float(self.mask.sum()) * self.voxel_ml


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
        grid: of the T2W volume.
    """

    zones: np.ndarray
    gland_level: np.ndarray
    zone_level: np.ndarray
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    foci: tuple[Focus, ...]
    grid: Grid = GRID

    @property
    def lesions(self) -> tuple[Focus, ...]:
        """Foci that are cancer."""
        return tuple(focus for focus in self.foci if focus.kind == "lesion")

    @property
    def lesion_mask(self) -> np.ndarray:
        """uint8 ``d h w``: 1 in all lesions."""
        mask = np.zeros(self.grid.shape, np.uint8)
        for lesion in self.lesions:
            mask[lesion.box] |= lesion.mask
        return mask

    @property
    def gland_ml(self) -> float:
        """Volume of all zones."""
        return float((self.zones > 0).sum()) * self.grid.voxel_ml


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
    anatomy = make_gland(gland_rng)
    placer = FocusPlacer(rng, anatomy)
    if is_positive(index, seed=seed):
        place_lesions(placer, np.abs(GRID.mesh[0]) < 24)
    _place_mimics(placer)
    return dataclasses.replace(anatomy, foci=tuple(placer.foci))


def make_gland(rng: np.random.Generator, grid: Grid = GRID, *, spread: float = 1.0) -> Anatomy:
    """A deformed superellipsoid; the transition zone is a second one, further up and forward.

    ``spread`` stretches the distribution of the gland's place in the image.
    """
    zz, yy, xx = grid.mesh
    volume_ml = float(np.clip(rng.lognormal(np.log(52), 0.48), 15, 140))
    place = np.clip(rng.normal((0, -2, 0), (1.5, 2.5, 2)), (-4, -7, -5), (4, 3, 5))
    centre = _triple(spread * place)
    radii = volume_ml ** (1 / 3) * np.array([6.1, 5.8, 6.9]) * rng.lognormal(0, 0.07, 3)
    radii = _triple(np.minimum(radii, (30, 40, 40)))
    warp = [0.09 * smooth_field(rng, grid.axes, 18.0) for _ in range(3)]
    w = (zz - centre[0]) / radii[0] + warp[0]
    v = (yy - centre[1]) / radii[1] + warp[1]
    u = (xx - centre[2]) / radii[2] + warp[2]
    apex = 1 - 0.18 * np.clip(-w, 0, 1.5)  # narrower towards the apex
    midline = rng.uniform(0.05, 0.25) * np.exp(-((u / 0.45) ** 2))  # the rectum's impression
    behind = np.where(v > 0, (v * 1.12 + midline) / apex, v / apex)
    power = rng.uniform(2.1, 2.6)
    level = sum(np.abs(axis) ** power for axis in (u / apex, behind, w)) ** (1 / power)
    level /= _level_of_volume(level, volume_ml, grid.voxel_ml)
    gland = level < 1

    pz_share = 0.33 - 0.19 * np.log(volume_ml / 51) + rng.normal(0, 0.08)
    pz_share = float(np.clip(pz_share, 0.12, 0.58))
    zone_level = np.sqrt(
        (u / 0.8) ** 2
        + ((v + rng.uniform(0.22, 0.4)) / 0.85) ** 2
        + ((w - rng.uniform(0.1, 0.3)) / 0.95) ** 2
    )
    zone_level *= np.exp(0.08 * smooth_field(rng, grid.axes, 8.0))
    zone_level /= np.quantile(zone_level[gland], 1 - pz_share)
    zones = np.where(gland, np.where(zone_level < 1, TZ, PZ), OUTSIDE).astype(np.uint8)
    depth_mm = (1 - level) * radii[1]
    stroma = (np.abs(u) < 0.4) & (v < -0.3) & (depth_mm < rng.uniform(2, 5)) & gland
    zones[stroma] = AFMS
    return Anatomy(zones, level, zone_level, centre, radii, (), grid)


class FocusPlacer:
    """Puts foci into a gland, none into another."""

    def __init__(self, rng: np.random.Generator, anatomy: Anatomy):
        self.rng = rng
        self.anatomy = anatomy
        self.free = np.ones(anatomy.grid.shape, bool)
        self.foci: list[Focus] = []

    def place(
        self,
        kind: str,
        zone: int,
        volume_ml: float,
        *,
        where: np.ndarray,
        costs: Sequence[float],
        bumps: float = 0.17,
        aspect: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Add a focus of a volume around a random voxel of ``where``, if any is free there.

        Args:
            kind: what it is.
            zone: zone code in which it arises.
            volume_ml: its volume; less where it does not find the room.
            where: mask of the possible centres.
            costs: for each zone code, how much less far the focus reaches there, in radii.
            bumps: how far its surface departs from an ellipsoid, in radii.
            aspect: how its semi-axes, which lie anyhow, relate to each other in the mean.
        """
        candidates = np.flatnonzero(where & self.free)
        if not candidates.size:
            return
        rng = self.rng
        grid = self.anatomy.grid
        middle = np.unravel_index(rng.choice(candidates), grid.shape)
        centre = [float(axis[i]) for axis, i in zip(grid.axes, middle, strict=True)]
        radius = float(np.cbrt(volume_ml * 1000 * 3 / (4 * np.pi)))
        longest = max(aspect) / np.cbrt(np.prod(aspect))
        box, axes = _box_around(grid, centre, 2.2 * radius * longest + 3)
        offset = np.stack(
            np.meshgrid(*(a - c for a, c in zip(axes, centre, strict=True)), indexing="ij"), -1
        )
        scale = rng.lognormal(0, 0.2, 3) * aspect
        scale /= np.cbrt(scale.prod())
        local = offset @ (rotation(rng, 1.0) / (scale * radius)).astype(np.float32)
        level = np.linalg.norm(local, axis=-1)
        level += bumps * smooth_field(rng, axes, max(0.7 * radius, 2.0))
        level += np.asarray(costs, np.float32)[self.anatomy.zones[box]]
        level[~self.free[box]] = np.inf
        limit = _level_of_volume(level, volume_ml, grid.voxel_ml)
        mask = _largest_part(level < limit)
        soft = soft_step((limit - level) * radius / 0.8)
        soft[(level < limit) & ~mask] = 0
        self.free[box] &= ~mask
        self.foci.append(Focus(kind, zone, box, soft, mask, grid.voxel_ml))


EVERYWHERE = (0.0, 0.0, 0.0, 0.0)
WITHIN_PZ = (0.4, 0.0, 0.5, 0.5)
WITHIN_TZ = (0.4, 0.4, 0.0, 0.0)
WITHIN_GLAND = (0.4, 0.0, 0.0, 0.0)
BESIDE_GLAND = (0.0, 0.8, 0.8, 0.8)


def place_lesions(placer: FocusPlacer, within: np.ndarray) -> None:
    """Add the lesions of a positive case, their centres within a mask.

    With the mask within the default reference grid, every lesion reaches into it.
    """
    rng, zones = placer.rng, placer.anatomy.zones
    level, gland_ml = placer.anatomy.gland_level, placer.anatomy.gland_ml
    count = 1 + int(rng.choice(3, p=LESION_COUNT_SHARES))
    for _ in range(count):
        volume_ml = float(np.clip(rng.lognormal(0.317, 1.182), 0.08, 0.4 * gland_ml))
        zone = str(rng.choice(list(LESION_ZONE_SHARES), p=list(LESION_ZONE_SHARES.values())))
        if zone == "pz":
            where, code, costs = zones == PZ, PZ, WITHIN_PZ
        elif zone == "tz":
            where, code, costs = zones >= TZ, TZ, WITHIN_TZ
        else:
            where, code, costs = (level > 1.02) & (level < 1.12), OUTSIDE, BESIDE_GLAND
        placer.place("lesion", code, volume_ml, where=where & within, costs=costs)


def _place_mimics(placer: FocusPlacer) -> None:
    """What looks like a lesion in some modalities, alike in positive and negative cases."""
    rng, zones, level = placer.rng, placer.anatomy.zones, placer.anatomy.gland_level
    pz, tz, gland = zones == PZ, zones == TZ, zones > OUTSIDE
    rectal = rectal_border(placer.anatomy)

    def volume() -> float:
        return float(np.clip(rng.lognormal(0.1, 0.9), 0.2, 4.0))

    def place(kind: str, zone: int, count: int, where: np.ndarray, costs: Sequence[float]) -> None:
        for _ in range(count):
            placer.place(kind, zone, volume(), where=where, costs=costs)

    place("stromal", TZ, 1 + rng.poisson(1.2), tz, WITHIN_TZ)
    place("glandular", TZ, rng.poisson(2.0), tz, WITHIN_TZ)
    place("haemorrhage", PZ, rng.poisson(1.0), pz, WITHIN_PZ)
    place("shine", PZ, rng.poisson(1.4), gland, WITHIN_GLAND)
    place("hot", OUTSIDE, rng.poisson(0.7), rectal, EVERYWHERE)
    place("dim", PZ, rng.poisson(1.2), gland, WITHIN_GLAND)
    place("node", OUTSIDE, 2 + rng.poisson(2), level > 1.6, EVERYWHERE)


def rectal_border(anatomy: Anatomy) -> np.ndarray:
    """Mask of the gland's border towards the rectum."""
    _, yy, xx = anatomy.grid.mesh
    border = (np.abs(anatomy.gland_level - 1) < 0.1) & (anatomy.centre[1] < yy)
    return border & (np.abs(xx - anatomy.centre[2]) < 0.6 * anatomy.radii[2])


def _level_of_volume(level: np.ndarray, volume_ml: float, voxel_ml: float) -> float:
    """Value below which ``level`` holds a volume."""
    count = min(max(round(volume_ml / voxel_ml), 1), level.size - 1)
    return float(np.partition(level, count, axis=None)[count])


def bounding_box(mask: np.ndarray) -> Box:
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


def _box_around(
    grid: Grid, centre: Sequence[float], reach_mm: float
) -> tuple[Box, list[np.ndarray]]:
    """Part of the volume within a distance of a point along each axis, and its coordinates."""
    slices = []
    for axis, middle in zip(grid.axes, centre, strict=True):
        start, stop = np.searchsorted(axis, (middle - reach_mm, middle + reach_mm))
        slices.append(slice(int(start), int(stop)))
    box = (slices[0], slices[1], slices[2])
    return box, [axis[part] for axis, part in zip(grid.axes, box, strict=True)]


def smooth_field(
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


def soft_step(level_mm: np.ndarray) -> np.ndarray:
    """0 to 1 where the argument passes 0, over about two units."""
    return np.clip(0.5 + 0.5 * level_mm, 0, 1).astype(np.float32)


def rotation(rng: np.random.Generator, angle_sd: float) -> np.ndarray:
    """Rotation matrix by normally distributed angles about the three axes."""
    a, b, c = rng.normal(0, angle_sd, 3)
    about_z = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    about_x = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
