"""The configuration of a run: what each package configures, composed; presets; the command line.

``python -m experiments.cv --help`` lists every field. A preset gives the defaults, an option
overrides one field, and the whole is written into the run folder.
"""

import dataclasses
import functools
import json
import math
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import tyro

from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.modules.encoder import EncoderConfig
from cmsad_jax.modules.network import NetworkConfig
from cmsad_jax.training import LossConfig, OptimizerConfig
from cmsad_jax.types import ConfigError
from data_pipelines.config import DataConfig, PreprocessConfig
from experiments.options import REGISTRY

T = TypeVar("T")

Accelerator = Literal["auto", "cpu", "gpu", "tpu"]


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
    figures: int = 4
    """Cases of each fold that are kept for the report's pictures."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One cross-validation run."""

    preset: Literal["small", "volume3d", "slice2d"] = "small"
    """Defaults to start from: a small network for CPUs, or volumes or slices for accelerators."""
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
    folds: tuple[int, ...] | None = None
    """Folds to run now; a later run completes the rest. All by default."""
    folds_at_once: Literal["auto"] | int = "auto"
    """How many folds train side by side; auto: one on each equal part of several accelerators."""
    folds_file: Path | None = None
    """Published folds to use (JSON list of train and val case ids) instead of drawing them."""
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
    predict: PredictConfig = PredictConfig()


_VOLUME_STAGES = EncoderConfig(
    channels=(32, 64, 128, 256, 320, 320),
    kernels=((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)),
    blocks=(1, 1, 2, 2, 2, 2),
)
_SLICE_STAGES = EncoderConfig(
    channels=(32, 64, 128, 256, 320, 320),
    kernels=((3, 3),) * 6,
    strides=((1, 1), (2, 2), (2, 2), (2, 2), (2, 2), (2, 2)),
    blocks=(1, 1, 2, 2, 2, 2),
)
_FINE_GRID = PreprocessConfig(spacing_mm=(3.0, 0.5, 0.5), size=(20, 256, 256))

PRESETS: dict[str, Config] = {
    "small": Config(preset="small"),
    "volume3d": Config(
        preset="volume3d",
        data=DataConfig(preprocess=_FINE_GRID),
        network=NetworkConfig(encoder=_VOLUME_STAGES, deep_supervision=3, dtype="bfloat16"),
        loss=LossConfig(warmup_steps=1000),
        train=TrainConfig(
            steps=20_000,
            batch_size=2,
            crop=(20, 160, 160),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            average_decay=0.999,
            validations=20,
            checkpoint_every=500,
        ),
    ),
    "slice2d": Config(
        preset="slice2d",
        data=DataConfig(preprocess=_FINE_GRID),
        network=NetworkConfig(encoder=_SLICE_STAGES, deep_supervision=3, dtype="bfloat16"),
        loss=LossConfig(warmup_steps=1000),
        train=TrainConfig(
            steps=20_000,
            batch_size=16,
            crop=(1, 192, 192),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            average_decay=0.999,
            validations=20,
            checkpoint_every=500,
        ),
        predict=PredictConfig(batch_size=8),
    ),
}
"""Named starting points: a small one for CPUs, and two for accelerators in the style of nnU-Net."""

# Fields that say where and how much of a run is done, not what it is.
_NOT_IDENTITY = (
    "accelerator",
    "deterministic",
    "output",
    "folds",
    "folds_at_once",
    "parallel",
    "profile",
    "compilation_cache",
    "data.cache",
    "data.residency",
    "train.read_threads",
    "train.steps_per_call",
    "distributed.launcher",
    "distributed.coordinator",
    "distributed.num_processes",
    "distributed.process_id",
    "train.accumulation",
    "network.rematerialize",
    "train.checkpoint_every",
    "train.max_skipped",
)


_RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        (
            "train.steps",
            "train.batch_size",
            "train.validations",
            "train.checkpoint_every",
            "train.max_skipped",
            "train.accumulation",
            "predict.batch_size",
        ),
    ),
    ("at least 2", lambda value: value >= 2, ("num_folds",)),
    (
        "at least 0",
        lambda value: value >= 0,
        ("seed", "train.optimizer.weight_decay", "train.read_threads", "predict.figures"),
    ),
    (
        "above 0",
        lambda value: 0 < value < math.inf,
        ("train.optimizer.learning_rate", "train.optimizer.clip_norm"),
    ),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        ("train.foreground_share", "train.optimizer.warmup_fraction"),
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        ("train.modality_dropout", "train.average_decay", "predict.overlap"),
    ),
    ("between 0 and 1", lambda value: 0 < value < 1, ("predict.threshold",)),
)
"""What fields of a run must be, where no other part of the configuration has a say."""


def parse(
    arguments: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str = "Cross-validation of CMSAD over patients, from files to a report. "
    "Sizes are in the order d h w: slices, rows, columns.",
) -> Config:
    """Configuration from command-line arguments: preset first, then each option.

    ``prog`` and ``description`` are what ``--help`` says of the program.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = "small"
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
    if name not in PRESETS:
        raise ConfigError(
            f"preset must be one of {', '.join(PRESETS)}; got {name!r}. Use --preset=small."
        )
    config = tyro.cli(
        Config,
        prog=prog,
        description=description,
        args=arguments,
        default=PRESETS[name],
        config=(tyro.conf.FlagConversionOff,),
        registry=REGISTRY,
    )
    return complete(config)


def complete(config: Config) -> Config:
    """The configuration with what follows from the data filled in, and checked.

    The network's inputs and outputs are the data's modalities and classes.
    """
    data, train = config.data, config.train
    network = dataclasses.replace(
        config.network, modalities=data.modalities, num_classes=data.num_classes
    )
    for rule, holds, fields in _RULES:
        for field in fields:
            value, usual = (_field(tree, field) for tree in (config, Config()))
            if not holds(value):
                option = field.replace("_", "-")
                raise ConfigError(
                    f"{option} must be {rule}; got {value}. Use --{option}={usual:g}, the default."
                )
    if train.steps_per_call is not None and train.steps_per_call < 1:
        raise ConfigError(
            f"train.steps-per-call must be at least 1; got {train.steps_per_call}. "
            "Use --train.steps-per-call=1."
        )
    size = data.preprocess.size
    if any(n > limit for n, limit in zip(train.crop, size, strict=True)):
        raise ConfigError(
            f"the crop must fit into the volume; got crop {train.crop} and volume {size}. "
            f"Use --train.crop {' '.join(map(str, size))} or less, "
            "or a larger --data.preprocess.size."
        )
    if network.encoder.rank == 2 and train.crop[0] != 1:
        raise ConfigError(
            f"a network of slices takes crops of depth 1; got {train.crop}. "
            f"Use --train.crop 1 {train.crop[1]} {train.crop[2]}."
        )
    network.encoder.stage_shapes(window(config))
    config.loss.distilled_stages(network.encoder.num_stages)
    if config.deterministic and config.parallel == "pmap":
        raise ConfigError(
            "a deterministic run needs compiler options, which pmap does not take; "
            "got --deterministic=True and --parallel=pmap. Use --parallel=jit."
        )
    at_once = config.folds_at_once
    if at_once != "auto" and at_once < 1:
        raise ConfigError(
            f"folds-at-once must be auto or at least 1; got {at_once}. Use --folds-at-once=auto."
        )
    if at_once != "auto" and at_once > 1 and config.parallel == "pmap":
        raise ConfigError(
            "folds side by side share a mesh, which pmap does not know; "
            f"got --folds-at-once={at_once} and --parallel=pmap. Use --parallel=jit."
        )
    folds = config.folds
    if folds is not None and any(not 0 <= fold < config.num_folds for fold in folds):
        raise ConfigError(
            f"folds must be among 0 to {config.num_folds - 1}; got {folds}. "
            "Name existing folds after --folds."
        )
    config = dataclasses.replace(config, network=network)
    if config.output is None:
        parts = [config.preset, data.name, data.target]
        if data.modalities != DataConfig().modalities:
            parts.append("+".join(data.modalities))
        config = dataclasses.replace(config, output=Path("runs") / "-".join(parts))
    return config


def _field(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def window(config: Config) -> tuple[int, ...]:
    """Spatial shape that the network sees: the crop, without depth for a network of slices."""
    return config.train.crop[-config.network.encoder.rank :]


def to_json(config: Any) -> Any:
    """A configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type[T], values: Any) -> T:
    """A configuration from its JSON values; a field that is not there has its default.

    Raises:
        ConfigError: for a field that ``kind`` does not have.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ConfigError(
            f"a stored configuration must have the fields of this version; got {unknown[0]!r} in "
            f"{kind.__name__}. Use the version of cmsad-jax that wrote it."
        )
    return kind(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(cast(type, hint), value)
    if isinstance(value, list):
        return tuple(_from_json(None, item) for item in value)
    if isinstance(value, str) and Path in (hint, *typing.get_args(hint)):
        return Path(value)
    return value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines ``field: old -> new`` for what makes two runs different (JSON configurations)."""
    before, after = flatten(old), flatten(new)
    return [
        f"{field}: {before.get(field)} -> {after.get(field)}"
        for field in sorted(before.keys() | after.keys())
        if field not in _NOT_IDENTITY and before.get(field) != after.get(field)
    ]
