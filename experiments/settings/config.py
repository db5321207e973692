"""What a run is asked to be: frozen dataclasses, composed of those of the library and the data."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.modules.network import NetworkConfig
from cmsad_jax.training import LossConfig, OptimizerConfig
from cmsad_jax.types import ConfigError
from data_pipelines.config import DataConfig

Accelerator = Literal["auto", "cpu", "gpu", "tpu"]
FoldsAsked = tuple[int, ...] | Literal["all"] | None
"""Numbers of folds, counted from 0; all: the one network of all cases; None: each fold."""

ALL = 999
"""In the place of a fold's number: that network, which validates no case."""


def folds_asked(folds: FoldsAsked, num_folds: int) -> list[int]:
    """The numbers of the folds that are asked for."""
    if folds == "all":
        return [ALL]
    return list(range(num_folds) if folds is None else folds)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    steps: int = 250
    """Updates for each fold."""
    batch_size: int = 2
    """Examples for each update, over all devices."""
    crop: tuple[int, int, int] = (12, 48, 48)
    """Voxels d h w of a training crop and of the sliding window; depth 1 for networks of slices."""
    foreground_share: float = 1 / 3
    """Share of the crops that hold foreground, balanced over the positive cases."""
    unlabelled: float = 0.0
    """Share of a fold's training patients whose label is hidden: they are distilled alone."""
    optimizer: OptimizerConfig = OptimizerConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    modality_dropout: float = 0.0
    """Probability of withholding each modality from an example (0.2 prepares for its lack)."""
    average_decay: float = 0.98
    """Decay a step of the moving average of the weights that is evaluated; 0 evaluates the last."""
    validations: int = 2
    """How often the validation fold is looked at, at even distances, to choose 'best'."""
    read_threads: int = 2
    """Threads that read cases; does not change the batches."""
    checkpoint_every: int = 100
    """Steps between checkpoints, which a killed run continues from with the same result."""
    max_skipped: int = 10
    """Updates in a row that may be skipped because loss or gradient is not finite."""
    steps_per_call: int | None = None
    """Steps in a call of the device; losses stay the same. By default 1 on CPUs, else up to 10."""
    accumulation: int = 1
    """Parts of a batch that go through the network one after another, to save memory."""


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes in one run, each with its own devices and its part of every batch."""

    launcher: Literal["auto", "detect", "none"] = "auto"
    """Who says how many processes; auto: Slurm or Open MPI; detect: JAX; none: there is one."""
    coordinator: str | None = None
    """Address host:port of process 0, where processes are started by hand."""
    num_processes: int | None = None
    """How many are started by hand."""
    process_id: int | None = None
    """Which of them this is, from 0; process 0 writes the run folder."""


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """How whole volumes are predicted and turned into masks; fixed before anything is trained."""

    overlap: float = 0.5
    """Least share of a window that its neighbour sees as well."""
    batch_size: int = 1
    """Windows for each call; changes speed and memory alone."""
    flip: bool = True
    """Average over the left-right mirror image."""
    threshold: float = 0.5
    """Probability above which a voxel belongs to the target."""
    mask_from: Literal["probability", "distance"] = "probability"
    """The learnt probability, or one made of the distance that --network.distance-clip-mm has."""
    distance_width_mm: float = 1.0
    """Of a distance: width of the rim in which its probability is neither 0 nor 1."""
    draws: int = 8
    """Draws of attention across slices, where it is drawn, for its uncertainty."""
    figures: int = 4
    """Cases of each fold that are kept for the report's pictures."""


@dataclasses.dataclass(frozen=True)
class CascadeConfig:
    """Two networks one after the other: the first says where the second is to look."""

    target: str = ""
    """What the first network finds, as gland; by default there is none, and no cascade."""
    coarser: tuple[int, int, int] = (1, 2, 2)
    """How many times as large as the second's the voxels of the first's grid are, d h w."""
    steps: int | None = None
    """Updates of the first for each fold; by default three times as many as of the second."""
    box_mm: tuple[float, float, float] = (60.0, 72.0, 72.0)
    """Size of the box around what was found, d h w, beyond which the second sees nothing."""
    margin_mm: float | None = 6.0
    """Within the box, how far from what was found something may be called; None: anywhere."""

    def __post_init__(self):
        if any(n < 1 for n in self.coarser):
            raise ConfigError(
                f"the voxels of a first network are 1 or more times as large; got {self.coarser}. "
                "Use --cascade.coarser 1 2 2."
            )
        if not all(0 < size < math.inf for size in self.box_mm):
            raise ConfigError(
                f"the box of a cascade must be above 0 mm; got {self.box_mm}. "
                "Use --cascade.box-mm 60 72 72."
            )
        if self.margin_mm is not None and not 0 <= self.margin_mm < math.inf:
            raise ConfigError(
                f"the margin of a cascade must be at least 0 mm; got {self.margin_mm}. "
                "Use --cascade.margin-mm=6, or None for the whole box."
            )
        if self.steps is not None and self.steps < 1:
            raise ConfigError(
                f"cascade.steps must be at least 1; got {self.steps}. Use --cascade.steps=250."
            )


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """The page that is written in the end."""

    max_mb: float = 20.0
    """Size of the page: slices are thinned, and cases left out, to keep to it; the page says so."""

    def __post_init__(self):
        if not 0 < self.max_mb < math.inf:
            raise ConfigError(
                f"the size of a page must be above 0 MB; got {self.max_mb:g}. "
                "Use --report.max-mb=20."
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """One cross-validation run."""

    preset: Literal["auto", "small", "light", "volume3d", "slice2d"] = "small"
    """Defaults for CPUs, volumes or slices on accelerators; auto, taken for files, plans."""
    plan: Path | None = None
    """Plan to follow, as python -m experiments.plan wrote it, edited or not."""
    accelerator: Accelerator = "auto"
    """Where to compute; auto takes the best there is."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How a step is spread over the devices."""
    distributed: DistributedConfig = DistributedConfig()
    deterministic: bool = False
    """On GPUs, give the same bits again on devices of one kind, at some cost; CPUs always do."""
    output: Path | None = None
    """Run folder; by default named after preset, data, target and modalities under runs/."""
    num_folds: int = 5
    """Folds over patients, stratified by presence of the target."""
    folds: FoldsAsked = None
    """Folds to run now, the rest later; all: one network of all cases, which nothing measures."""
    folds_at_once: Literal["auto"] | int = "auto"
    """How many folds train side by side; auto: one on each equal part of several accelerators."""
    folds_file: Path | None = None
    """Folds, or one split, to use instead of drawing them: JSON list of train and val case ids."""
    init: Path | None = None
    """Run folder or artifact whose weights each fold starts from, as far as they fit."""
    group_by: str | None = None
    """Fact of cases (PI-CAI: center; own folder: group) of which each fold leaves out one value."""
    profile: Path | None = None
    """Folder for a trace of the first fold's training (Perfetto, TensorBoard); train few steps."""
    compilation_cache: bool = True
    """Keep compiled programs beside the built data sets, so that the next run starts sooner."""
    seed: int = 0
    """Seed of folds, weights, sampling and augmentation."""
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    cascade: CascadeConfig = CascadeConfig()
    predict: PredictConfig = PredictConfig()
    report: ReportConfig = ReportConfig()


def refuse_all(config: Config, what: str) -> None:
    """Raise ``ConfigError`` where ``what`` measures, and the network of all cases is asked for."""
    if config.folds == "all":
        raise ConfigError(
            f"{what} measures cases that were held out; got --folds all, which holds out none. "
            "Name folds by their numbers, or leave out --folds."
        )


def window(config: Config) -> tuple[int, ...]:
    """Spatial shape that the network sees: the crop, without depth for a network of slices."""
    return config.train.crop[-config.network.encoder.rank :]


def box_of(config: Config) -> tuple[int, ...]:
    """Voxels ``d h w`` that the network sees of a case: the grid, or the box of a cascade."""
    grid = config.data.preprocess
    if not config.cascade.target:
        return grid.size
    sizes = zip(config.cascade.box_mm, grid.spacing_mm, grid.size, strict=True)
    return tuple(min(limit, max(1, round(mm / spacing))) for mm, spacing, limit in sizes)
