"""What is asked of the data: the data set, its target and modalities, and the reference grid."""

import dataclasses
from pathlib import Path
from typing import Literal

from data_pipelines.modalities import standard_names
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.phantom2.options import Phantom2Options
from data_pipelines.prostate158.options import Prostate158Options
from data_pipelines.targets import Target, target_of

MODALITIES = ("t2w", "adc", "hbv")
"""The field's set: T2-weighted, apparent diffusion coefficient, high-b-value diffusion."""


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """The reference grid and the intensity scaling. Saved with the data set and each checkpoint."""

    spacing_mm: tuple[float, float, float] = (3.0, 2.0, 2.0)
    """Voxel size of the reference grid in mm, d h w."""
    size: tuple[int, int, int] = (20, 48, 48)
    """Voxels of the reference grid, d h w."""
    centre: Literal["image", "gland"] = "image"
    """Centre of the reference grid: the T2W image's, or a gland mask's (needed to predict too)."""
    label_sampling: Literal["linear", "nearest"] = "linear"
    """How labels go between grids: the class of the largest linear weight, or the nearest voxel."""
    clip_percentiles: tuple[float, float] = (0.5, 99.5)
    """Intensities are clipped to these percentiles of the crop before they are scaled."""
    scales: tuple[str, ...] = ()
    """Modalities that keep their unit, as adc=1200/500 (centre/width); others: mean 0, sd 1."""


MOVED = {
    "num_cases": ("phantom", "num_cases"),
    "seed": ("phantom", "seed"),
    "reader": ("prostate158", "reader"),
}
"""Fields that ``DataConfig`` once had, and those of which data set's options they have become."""


AUTO = "auto"
"""Stands for the data set that the files at ``DataConfig.path`` are, or for the phantom."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data are read, and how they are stored.

    Options of one data set alone are a field of its name.
    """

    name: str = AUTO
    """Builder: auto, phantom, phantom2, picai, prostate158, msd_prostate or nifti_folder."""
    path: Path | None = None
    """Where the user's files lie. With auto, they say which builder; without, the phantom."""
    files: tuple[str, ...] = ()
    """Names of own files, as t2w='*T2*' adc='*ADC*' lesion='*ROI*'; {case} may name the case."""
    target: str = "lesion"
    """What is segmented: lesion, gland or zones, or a name for classes of one's own."""
    labels: tuple[str, ...] = ()
    """Own classes, name=value or name=1+2 (region), ignore=value; by default of dataset.json."""
    lesions: tuple[str, ...] = ()
    """Which of one's own classes is a lesion, whose candidates are detected."""
    modalities: tuple[str, ...] = MODALITIES
    """Contrasts to use, in channel order; T2W or dwi stand for t2w and hbv."""
    allow_missing: bool = False
    """Accept cases that lack a modality (they are marked absent) instead of refusing them."""
    cache: Path = Path("~/.cache/cmsad_jax")
    """Where built data sets are kept; one folder per configuration."""
    preprocess: PreprocessConfig = PreprocessConfig()
    residency: Literal["auto", "device", "host"] = "auto"
    """Where training cases lie; auto: on an accelerator of which they fill less than a quarter."""
    phantom: PhantomOptions = PhantomOptions()
    phantom2: Phantom2Options = Phantom2Options()
    prostate158: Prostate158Options = Prostate158Options()

    def __post_init__(self):
        object.__setattr__(self, "modalities", standard_names(self.modalities))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes."""
        return self.definition.classes

    @property
    def definition(self) -> Target:
        """Classes, the label values that make them, and what is ignored.

        Raises:
            DataError: a target of no known classes.
        """
        return target_of(self.target, self.labels, self.lesions)

    @property
    def num_classes(self) -> int:
        """Network outputs ``k``: 1 (sigmoid) for one part, else the parts and background."""
        parts = self.definition.num_parts
        return 1 if parts == 1 else parts + 1


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a data set is, in words for pages and model cards.

    Attributes:
        text: its name, whether it shows patients, and where it comes from.
        synthetic: whether it is drawn rather than measured; None where nobody knows.
    """

    text: str
    synthetic: bool | None


ORIGINS = {
    "phantom": Origin("phantom, synthetic: drawn by this project's code, no patient", True),
    "phantom2": Origin("phantom2, synthetic: drawn by this project's code, no patient", True),
    "picai": Origin(
        "picai, patients: the PI-CAI challenge's public set (zenodo.org/record/6517398, "
        "CC BY-NC 4.0), three Dutch centres",
        False,
    ),
    "prostate158": Origin(
        "prostate158, patients: Charité Berlin (doi.org/10.5281/zenodo.6481141)", False
    ),
    "msd_prostate": Origin(
        "msd_prostate, patients: Task05 of the Medical Segmentation Decathlon, Radboud University "
        "(CC BY-SA 4.0)",
        False,
    ),
    "nifti_folder": Origin(
        "nifti_folder, the user's own files; whether of patients is not recorded", None
    ),
}
"""Of the data sets that have a builder here."""


def origin_of(name: str) -> Origin:
    """What a data set is; of one that ``ORIGINS`` lacks, its name alone."""
    return ORIGINS.get(name, Origin(f"{name}, of unrecorded origin", None))
