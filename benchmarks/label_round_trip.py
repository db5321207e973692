"""What a lesion's outline loses on its way to the stored grid and back.

``python -m benchmarks.label_round_trip FILE`` takes lesion shapes from an npz file (``vol``: uint8
``n d h w`` at 3 x 1 x 1 mm, lesion where ``vol >> 4``), draws each smoothly on a T2W grid of
3 x 0.4 x 0.4 mm with a random sub-voxel shift, resamples it to a stored grid of 3 x 0.5 x 0.5 mm,
takes it back by ``to_original``, and measures the Dice with what was drawn.

In plane, the stored grid is that of ``reference_grid``, whose slices are the T2W slices. Beside it,
the same grid shifted between the slices by up to half of one, and tilted against them.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from benchmarks import timing
from data_pipelines.case import Case, Volume
from data_pipelines.config import PreprocessConfig
from data_pipelines.preparing.geometry import resample_label
from data_pipelines.preparing.preprocessing import reference_grid, to_original

T2W_MM = 0.4
STORED_MM = 0.5
SLICE_MM = 3.0
SMOOTHING_MM = 1.0
MARGIN_MM = 12

Sampling = Literal["linear", "nearest"]


def draw(lesion: np.ndarray, rng: np.random.Generator) -> Volume:
    """A mask at 3 x 1 x 1 mm, drawn smoothly at 3 x 0.4 x 0.4 mm and of equal volume."""
    (box,) = ndimage.find_objects(lesion.astype(np.uint8))
    part = np.pad(lesion[box].astype(np.float64), ((2, 2), (MARGIN_MM,) * 2, (MARGIN_MM,) * 2))
    soft = ndimage.gaussian_filter(part, (0, SMOOTHING_MM, SMOOTHING_MM))
    size = (part.shape[0], *(int((n - 1) / T2W_MM) for n in part.shape[1:]))
    shift: Any = [0.0, *rng.uniform(0, T2W_MM, 2)]
    fine = ndimage.affine_transform(soft, (1, T2W_MM, T2W_MM), shift, output_shape=size, order=3)
    wanted = round(part.sum() / T2W_MM**2)
    threshold = np.partition(fine.ravel(), -wanted)[-wanted]
    affine = np.diag([T2W_MM, T2W_MM, SLICE_MM, 1.0])
    return Volume((fine >= threshold).astype(np.uint8), affine)


def stored_grid(t2w: Volume, rng: np.random.Generator, kind: str):
    """Shape and affine of the stored grid, where it should be or moved against the slices."""
    size = tuple(
        int(np.ceil(n * mm / s)) + margin
        for n, mm, s, margin in zip(
            t2w.shape, t2w.spacing_mm, (SLICE_MM, STORED_MM, STORED_MM), (6, 8, 8), strict=True
        )
    )
    d, h, w = size
    spacing = (SLICE_MM, STORED_MM, STORED_MM)
    shape, affine = reference_grid(t2w, PreprocessConfig(spacing_mm=spacing, size=(d, h, w)))
    motion = np.eye(4)
    if kind == "through plane":
        motion[2, 3] = rng.uniform(-0.5, 0.5)
    elif kind != "in plane":
        degrees = float(kind.split()[1])
        centre = (np.array(shape[::-1]) - 1) / 2
        scale = np.diag(np.array(spacing[::-1]))
        angle = rng.uniform(0, 2 * np.pi)
        axis = np.array([np.cos(angle), np.sin(angle), 0])
        turn = Rotation.from_rotvec(np.deg2rad(degrees) * axis).as_matrix()
        motion[:3, :3] = np.linalg.inv(scale) @ turn @ scale
        motion[:3, 3] = centre - motion[:3, :3] @ centre
    return shape, affine @ motion


def round_trip(label: Volume, shape, affine: np.ndarray, sampling: Sampling) -> float:
    """Dice of a label with itself, after the way to the stored grid and back."""
    stored = resample_label(label, shape, affine, sampling=sampling)
    nothing = np.zeros((0, 0, 0), np.uint8)
    case = Case(
        case_id="",
        patient_id="",
        image=np.zeros((*shape, 0), np.int16),
        label=stored,
        present=np.zeros(0, bool),
        affine=affine,
        original_shape=label.shape,
        original_affine=label.affine,
        truth=nothing,
        truth_offset=(0, 0, 0),
    )
    back = to_original(stored.astype(np.float32), case) > 0.5
    truth = label.array > 0
    return float(2 * (back & truth).sum() / (back.sum() + truth.sum()))


KINDS = ("in plane", "through plane", "tilt 5 degrees", "tilt 10 degrees", "tilt 20 degrees")


def measure(shapes: Sequence[np.ndarray], seed: int) -> list[tuple[str, ...]]:
    """Rows of the table: where the stored grid lies, sampling, and the Dice over all shapes."""
    dice: dict[tuple[str, Sampling], list[float]] = {}
    for number, lesion in enumerate(shapes):
        rng = np.random.default_rng((seed, number))
        label = draw(lesion, rng)
        for kind in KINDS:
            shape, affine = stored_grid(label, rng, kind)
            for sampling in ("linear", "nearest"):
                result = round_trip(label, shape, affine, sampling)
                dice.setdefault((kind, sampling), []).append(result)
    return [
        (
            kind,
            sampling,
            str(len(values)),
            f"{np.mean(values):.4f}",
            f"{np.percentile(values, 5):.4f}",
            f"{min(values):.4f}",
        )
        for (kind, sampling), values in dice.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.label_round_trip", description=__doc__
    )
    parser.add_argument("file", type=Path, help="npz with the shapes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    with np.load(options.file) as content:
        lesions = content["vol"] >> 4 > 0
    shapes = [lesion for lesion in lesions if lesion.any()]
    print(f"`python -m benchmarks.label_round_trip {shlex.join(given)}`\n")
    header = ("stored grid", "label sampling", "shapes", "mean Dice", "5th percentile", "least")
    print(timing.markdown([header, *measure(shapes, options.seed)]))


if __name__ == "__main__":
    main()
