"""Two masks of one class of one case, and what a metric of them is."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np


@dataclasses.dataclass(frozen=True)
class Masks:
    """What is predicted and what is true of one class of one case.

    Attributes:
        prediction: bool ``d h w``, cut to the box that holds all foreground.
        truth: likewise, in the same box.
        spacing_mm: voxel size, ``d h w``.
        shape: of the whole volume.
        num_ignored: voxels of it that do not count; they are in neither mask.
    """

    prediction: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, ...]
    shape: Sequence[int]
    num_ignored: int = 0

    @cached_property
    def num_truth(self) -> int:
        """Voxels of the truth."""
        return int(self.truth.sum())

    @cached_property
    def num_predicted(self) -> int:
        """Voxels of the prediction."""
        return int(self.prediction.sum())

    @cached_property
    def num_both(self) -> int:
        """Voxels of both."""
        return int((self.truth & self.prediction).sum())

    @property
    def num_background(self) -> int:
        """Voxels of the whole volume that count, outside the truth."""
        return math.prod(self.shape) - self.num_ignored - self.num_truth

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return math.prod(self.spacing_mm) / 1000.0

    @property
    def diagonal_mm(self) -> float:
        """Diagonal of the whole volume: the largest distance there can be."""
        sides = np.multiply(self.shape, self.spacing_mm).tolist()
        return math.dist((0.0,) * len(sides), sides)

    @cached_property
    def surface_distances(self) -> dict[str, np.ndarray]:
        """Distances of the surfaces of two masks that are not empty.

        The convention is that of DeepMind's ``surface-distance``: surfaces run through the voxel
        corners and each surface element is weighted by its area. MONAI and MedPy measure between
        voxel centres without areas and give other numbers for the same masks. Mirroring the grid
        or permuting its axes with the spacing changes nothing beyond rounding.
        """
        import surface_distance  # slow to load, and not needed for --help

        return surface_distance.compute_surface_distances(
            self.truth, self.prediction, self.spacing_mm
        )


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of one class of one case: all that tables, files and pages need to know of it.

    Attributes:
        name: in files; ends with the unit, if there is one.
        label: in words, without the unit.
        measure: its value for two masks; None where it is undefined.
        meaning: how it is computed; ``T`` is the truth, ``P`` the prediction, ``N`` all voxels.
        undefined: where it is.
        short_label: for columns; the label by default.
        unit: of the value.
        decimals: that are worth showing.
        per_fold: whether it is shown fold by fold, and on the card of an exported model.
        headline: whether its mean stands at the top of the report.
    """

    name: str
    label: str
    measure: Callable[[Masks], float | None]
    meaning: str
    undefined: str
    short_label: str = ""
    unit: str = ""
    decimals: int = 3
    per_fold: bool = False
    headline: bool = False

    @property
    def title(self) -> str:
        """Label with unit."""
        return self._with_unit(self.label)

    @property
    def column(self) -> str:
        """Short label with unit."""
        return self._with_unit(self.short_label or self.label)

    def _with_unit(self, label: str) -> str:
        return f"{label} ({self.unit})" if self.unit else label

    def text(self, value: float) -> str:
        """A value with the decimals that are worth showing."""
        return f"{value:.{self.decimals}f}"
