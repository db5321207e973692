"""Data sets of other shapes than a prostate's, drawn: for comparing plans and presets on them.

Each is a folder in the layout of ``nifti_folder``, a folder per case, with structures whose
outlines no modality shows well alone, others that look like them in one, and noise.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from data_pipelines.reading.volume_io import write_nifti


@dataclasses.dataclass(frozen=True)
class MadeSet:
    """A data set that is drawn.

    Attributes:
        draw: from a generator, the modalities and the labels of a case.
        spacing_mm: of every volume, d h w.
        target: name of what is segmented.
        labels: its classes, as ``--data.labels`` takes them.
        modalities: names of the contrasts.
        num_cases: how many are drawn.
    """

    draw: Callable[[np.random.Generator], tuple[dict[str, np.ndarray], np.ndarray]]
    spacing_mm: tuple[float, float, float]
    target: str
    labels: tuple[str, ...]
    modalities: tuple[str, ...]
    num_cases: int

    def options(self, folder: Path) -> list[str]:
        """How ``experiments.cv`` is told to read it."""
        return [
            "--data.name=nifti_folder",
            f"--data.path={folder}",
            f"--data.target={self.target}",
            *("--data.labels", *self.labels),
            *("--data.modalities", *self.modalities),
        ]

    def write(self, folder: Path, seed: int) -> None:
        """Draw the cases, the same for the same seed; what is there already is left."""
        affine = np.diag([*self.spacing_mm[::-1], 1.0])
        for number in range(self.num_cases):
            images, label = self.draw(np.random.default_rng((seed, number)))
            case = folder / f"case_{number:03d}"
            for name, array in {**images, "label": label}.items():
                file = case / f"{name}.nii.gz"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_nifti(file, array, affine)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], width: float) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1; ``width`` in voxels."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), width)
    return noise / noise.std()


def _body(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    centre_mm: np.ndarray,
    radii_mm: tuple[float, ...],
    *,
    unevenness: float = 0.2,
) -> np.ndarray:
    """An ellipsoid with an uneven surface; ``centre_mm`` from the middle of the volume."""
    axes = [
        ((np.arange(n) - (n - 1) / 2) * mm - c) / r
        for n, mm, c, r in zip(shape, spacing_mm, centre_mm, radii_mm, strict=True)
    ]
    distance = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij", sparse=True)))
    width = max(1.0, 0.4 * min(radii_mm) / min(spacing_mm))
    return distance < 1 + unevenness * _noise(rng, shape, width)


def _brain(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A tumour in an isotropic head: a core that t1c shows, and what lies around it, by flair.

    Ventricles are as bright in t2w as the tumour, vessels as bright in t1c as its core.
    """
    shape, spacing = (64, 64, 64), (2.5, 2.5, 2.5)
    head = _body(rng, shape, spacing, np.zeros(3), (66.0, 72.0, 60.0), unevenness=0.03)
    place = rng.uniform((-30, -32, -30), (30, 32, 30))
    radius = rng.uniform(13, 24)
    whole = head & _body(rng, shape, spacing, place, (radius,) * 3)
    inner = place + rng.uniform(-3, 3, 3)
    core = whole & _body(rng, shape, spacing, inner, (0.55 * radius,) * 3)
    ventricles = head & (
        _body(rng, shape, spacing, np.array([5.0, 0.0, -9.0]), (10.0, 24.0, 6.0))
        | _body(rng, shape, spacing, np.array([5.0, 0.0, 9.0]), (10.0, 24.0, 6.0))
    )
    vessel = head & _body(rng, shape, spacing, rng.uniform(-35, 35, 3), (9.0, 9.0, 9.0))
    white = _noise(rng, shape, 3) > 0
    contrast = {  # of grey matter, and added by white matter, whole, core, ventricle, vessel
        "t1": (1.0, 0.3, -0.2, -0.2, -0.6, 0.0),
        "t1c": (1.0, 0.3, -0.2, 0.6, -0.6, 0.5),
        "t2w": (1.0, -0.2, 0.5, 0.1, 0.7, 0.0),
        "flair": (1.0, -0.1, 0.5, -0.1, -0.6, 0.0),
    }
    parts = (head, head & white, whole, core, ventricles & ~whole, vessel & ~whole)
    images = {
        name: _drawn(rng, parts, values, blur=0.6, noise=0.25) for name, values in contrast.items()
    }
    return images, (whole + core.astype(np.uint8)).astype(np.uint8)


def _heart(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A cavity and the wall around it, in thick slices of one modality.

    The other cavity and a vessel are as bright, and without such a wall.
    """
    shape, spacing = (12, 96, 96), (8.0, 1.8, 1.8)
    place = rng.uniform((-8, -18, -18), (8, 18, 18))
    radius, wall = rng.uniform(17, 26), rng.uniform(7, 11)
    length = rng.uniform(28, 38)
    outer = _body(
        rng, shape, spacing, place, (length, radius + wall, radius + wall), unevenness=0.08
    )
    cavity = outer & _body(
        rng, shape, spacing, place, (length - 6, radius, radius), unevenness=0.08
    )
    beside = place + np.array([0.0, rng.uniform(-8, 8), radius + wall + 12])
    other = _body(rng, shape, spacing, beside, (length, radius, 0.7 * radius)) & ~outer
    vessel = _body(rng, shape, spacing, rng.uniform(-60, 60, 3), (90.0, 10.0, 10.0)) & ~outer
    body = _body(rng, shape, spacing, np.zeros(3), (200.0, 80.0, 76.0), unevenness=0.03)
    image = _drawn(
        rng,
        (body, body & (_noise(rng, shape, 4) > 0.3), cavity, outer & ~cavity, other, vessel),
        (0.6, 0.5, 1.2, -0.1, 1.1, 1.2),
        blur=0.7,
        noise=0.3,
    )
    return {"cine": image}, (cavity + 2 * (outer & ~cavity)).astype(np.uint8)


def _slice(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One slice with some spots that are dark in one modality and bright in the other.

    As many others are dark in the one alone, or bright in the other alone.
    """
    shape, spacing = (1, 128, 128), (5.0, 1.0, 1.0)
    body = _body(rng, shape, spacing, np.zeros(3), (50.0, 56.0, 50.0), unevenness=0.04)
    kinds = [np.zeros(shape, bool) for _ in range(3)]
    for kind in (0, 0, 1, 2, *rng.integers(0, 3, 3)):
        radii = (50.0, *rng.uniform(5, 11, 2))
        place = np.array([0.0, *rng.uniform(-36, 36, 2)])
        spot = _body(rng, shape, spacing, place, radii) & body
        if not any((spot & other).any() for other in kinds):
            kinds[kind] |= spot
    spots, dark, bright = kinds
    texture = body & (_noise(rng, shape, 5) > 0)
    images = {
        "t2w": _drawn(rng, (body, texture, spots | dark), (1.0, 0.3, -0.5), blur=0.8, noise=0.25),
        "hbv": _drawn(rng, (body, texture, spots | bright), (0.5, 0.1, 0.5), blur=1.2, noise=0.25),
    }
    return images, spots.astype(np.uint8)


def _drawn(
    rng: np.random.Generator,
    parts: tuple[np.ndarray, ...],
    values: tuple[float, ...],
    *,
    blur: float,
    noise: float,
) -> np.ndarray:
    """The sum of parts by their values, blurred, with an uneven sensitivity and noise."""
    signal = sum(part * value for part, value in zip(parts, values, strict=True))
    signal = ndimage.gaussian_filter(signal, [blur if n > 1 else 0 for n in parts[0].shape])
    signal = signal * np.exp(0.15 * _noise(rng, parts[0].shape, 16))
    gain = rng.uniform(150, 400)
    return (gain * np.abs(signal + noise * rng.normal(size=signal.shape))).astype(np.float32)


SETS: dict[str, MadeSet] = {
    "brain": MadeSet(
        _brain,
        (2.5, 2.5, 2.5),
        "tumour",
        ("whole=1+2", "core=2"),
        ("t1", "t1c", "t2w", "flair"),
        24,
    ),
    "heart": MadeSet(_heart, (8.0, 1.8, 1.8), "heart", ("cavity=1", "wall=2"), ("cine",), 30),
    "slices": MadeSet(_slice, (5.0, 1.0, 1.0), "spots", ("spot=1",), ("t2w", "hbv"), 60),
}
"""By name: isotropic with four modalities and regions, thick slices of one modality with two
classes, single slices of two modalities."""
