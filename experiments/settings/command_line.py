"""The configuration of a run from the command line: preset first, then each option; checked."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from cmsad_jax.modules.encoder import EncoderConfig
from cmsad_jax.types import ConfigError
from data_pipelines.command_line import current_names
from data_pipelines.config import AUTO, DataConfig
from data_pipelines.short_help import CROSS_VALIDATION, full
from data_pipelines.targets import IGNORED
from experiments.settings.config import ALL, CascadeConfig, Config, PredictConfig, box_of, window
from experiments.settings.options import REGISTRY
from experiments.settings.presets import PRESETS

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
            "num_folds",
            "predict.draws",
        ),
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        ("seed", "train.optimizer.weight_decay", "train.read_threads", "predict.figures"),
    ),
    (
        "above 0",
        lambda value: 0 < value < math.inf,
        (
            *("train.optimizer.learning_rate", "train.optimizer.clip_norm"),
            "predict.distance_width_mm",
        ),
    ),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        ("train.foreground_share", "train.optimizer.warmup_fraction"),
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        ("train.unlabelled", "train.modality_dropout", "train.average_decay", "predict.overlap"),
    ),
    ("between 0 and 1", lambda value: 0 < value < 1, ("predict.threshold",)),
)
"""What fields of a run must be, where no other part of the configuration has a say."""


def parse(
    arguments: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str = CROSS_VALIDATION,
) -> Config:
    """Configuration from command-line arguments: preset first, then each option.

    ``prog`` and ``description`` are what ``--help`` says of the program.
    """
    config = read(arguments, prog=prog, description=description)
    if config.preset == "auto" or config.plan is not None:
        raise ConfigError(
            "this command plans nothing and follows no plan; got "
            f"{'--plan' if config.plan is not None else '--preset=auto'}. Use --preset=small, or "
            "run python -m experiments.cv."
        )
    return complete(config)


def read(
    arguments: Sequence[str] | None = None,
    *,
    default: Config | None = None,
    prog: str | None = None,
    description: str = CROSS_VALIDATION,
) -> Config:
    """What was typed, over a preset or another configuration, neither completed nor checked.

    Raises:
        ConfigError: no such preset.
    """
    arguments = current_names(full(sys.argv[1:] if arguments is None else arguments))
    name = typed(arguments, "preset") or "small"
    if name not in PRESETS:
        raise ConfigError(
            f"preset must be one of {', '.join(PRESETS)}; got {name!r}. Use --preset=small."
        )
    config = tyro.cli(
        Config,
        prog=prog,
        description=description,
        args=arguments,
        default=PRESETS[name] if default is None else default,
        config=(tyro.conf.FlagConversionOff,),
        registry=REGISTRY,
    )
    from data_pipelines.reading import layout  # slow to load, and not needed for --help

    return dataclasses.replace(config, data=layout.resolved(config.data, layout.say_once))


def typed(arguments: Sequence[str], option: str) -> str | None:
    """The word that follows an option, if it is there."""
    found = None
    for i, argument in enumerate(arguments):
        if argument == f"--{option}" and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif argument.startswith(f"--{option}="):
            found = argument.removeprefix(f"--{option}=")
    return found


def typed_fields(arguments: Sequence[str]) -> frozenset[str]:
    """Names of the fields whose options were typed; of a stage's, also that of all stages."""
    names = {
        argument.removeprefix("--").partition("=")[0].replace("-", "_")
        for argument in current_names(arguments)
        if argument.startswith("--")
    }
    return frozenset(names | {name.rpartition(".")[0] for name in names})


def complete(config: Config) -> Config:
    """The configuration with what follows from the data filled in, and checked.

    The network's inputs and outputs are the data's modalities and classes.
    """
    if config.data.name == AUTO:
        from data_pipelines.reading import layout  # slow to load, and not needed for --help

        config = dataclasses.replace(config, data=layout.resolved(config.data))
    from data_pipelines.reading.own_classes import with_own_classes  # reads files, --help does not

    config = dataclasses.replace(config, data=with_own_classes(config.data))
    data, train = config.data, config.train
    network = dataclasses.replace(
        config.network,
        modalities=data.modalities,
        num_classes=data.num_classes,
        prior=bool(config.cascade.target),
    )
    ignore = None if data.definition.ignore is None else IGNORED
    config = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, ignored_label=ignore)
    )
    _check_ranges(config)
    if config.cascade.target:
        crop = tuple(min(n, most) for n, most in zip(train.crop, box_of(config), strict=True))
        config = dataclasses.replace(config, train=dataclasses.replace(train, crop=crop))
    _check_crop(config.train.crop, data.preprocess.size, network.encoder)
    try:
        network.encoder.stage_shapes(window(config))
    except ConfigError as error:
        if config.train.crop == train.crop:
            raise
        raise ConfigError(
            f"the box of a cascade must be large enough for the network; got {config.train.crop} "
            f"voxels: {error} Use a larger box: --cascade.box-mm 60 72 72."
        ) from error
    config.loss.check(network)
    if config.loss.taught_by_average and not train.modality_dropout:
        raise ConfigError(
            "the averaged network teaches what is withheld from the student; got "
            "--loss.teachers with average and --train.modality-dropout=0.0. "
            "Use --train.modality-dropout=0.3, or other teachers."
        )
    if config.predict.mask_from == "distance" and network.distance_clip_mm is None:
        raise ConfigError(
            "a mask is made of a distance that the network learns; got "
            "--predict.mask-from=distance and no distance. Use --network.distance-clip-mm=15, or "
            "--predict.mask-from=probability."
        )
    _check_execution(config)
    config = dataclasses.replace(config, network=network)
    if config.output is None:
        config = dataclasses.replace(config, output=usual_output(config))
    return config


def without_effect(config: Config) -> list[str]:
    """One sentence for each setting that was changed and that this run does not use."""
    predict, usual = config.predict, PredictConfig()
    said = config.loss.without_effect(config.network)
    if predict.mask_from != "distance" and predict.distance_width_mm != usual.distance_width_mm:
        said.append("predict.distance_width_mm has no effect, as predict.mask_from is probability.")
    if not config.cascade.target:
        said += [
            f"cascade.{field.name} has no effect, as cascade.target names nothing to find first."
            for field in dataclasses.fields(CascadeConfig)
            if getattr(config.cascade, field.name) != field.default
        ]
    if not config.network.encoder.draws and predict.draws != usual.draws:
        said.append("predict.draws has no effect, as no attention across slices is drawn.")
    if config.data.num_classes > 1 and predict.threshold != usual.threshold:
        said.append(
            "predict.threshold has no effect, as there are several classes, of which the most "
            "probable is taken."
        )
    return said


def usual_output(config: Config) -> Path:
    """The run folder where none is named: after preset, data, target and modalities."""
    data = config.data
    parts = [config.preset, data.name, data.target]
    if data.modalities != DataConfig().modalities:
        parts.append("+".join(data.modalities))
    return Path("runs") / "-".join(parts)


def _check_ranges(config: Config) -> None:
    """Whether each number is one that its setting can have."""
    for rule, holds, fields in _RULES:
        for field in fields:
            value, usual = (value_of(tree, field) for tree in (config, Config()))
            if not holds(value):
                option = field.replace("_", "-")
                raise ConfigError(
                    f"{option} must be {rule}; got {value}. Use --{option}={usual:g}, the default."
                )
    steps_per_call = config.train.steps_per_call
    if steps_per_call is not None and steps_per_call < 1:
        raise ConfigError(
            f"train.steps-per-call must be at least 1; got {steps_per_call}. "
            "Use --train.steps-per-call=1."
        )


def _check_crop(crop: tuple[int, ...], size: tuple[int, ...], encoder: EncoderConfig) -> None:
    """Whether a crop fits into the volume, and is as many slices as the network takes."""
    if any(n > limit for n, limit in zip(crop, size, strict=True)):
        raise ConfigError(
            f"the crop must fit into the volume; got crop {crop} and volume {size}. "
            f"Use --train.crop {' '.join(map(str, size))} or less, "
            "or a larger --data.preprocess.size."
        )
    if encoder.slices != "none" and crop[0] == 1:
        raise ConfigError(
            "attention across slices needs crops of more than one slice; "
            f"got {crop} and network.encoder.slices {encoder.slices}. "
            f"Use --train.crop {size[0]} {crop[1]} {crop[2]}, or --network.encoder.slices=none."
        )
    if encoder.rank == 2 and crop[0] != 1:
        raise ConfigError(
            f"a network of slices takes crops of depth 1; got {crop}. "
            f"Use --train.crop 1 {crop[1]} {crop[2]}."
        )


def _check_execution(config: Config) -> None:
    """Whether the folds exist, and can be computed the way that is asked for."""
    if config.deterministic and config.parallel == "pmap":
        raise ConfigError(
            "a deterministic run needs compiler options, which pmap does not take; "
            "got --deterministic=True and --parallel=pmap. Use --parallel=jit."
        )
    if config.num_folds < 2 and config.folds_file is None:
        raise ConfigError(
            f"cross-validation needs at least 2 folds; got {config.num_folds} and no file of one "
            "split. Use --num-folds=5, or name the split with --folds-file."
        )
    if config.num_folds >= ALL:
        raise ConfigError(
            f"cross-validation takes fewer than {ALL} folds; got {config.num_folds}. "
            "Use --num-folds=5."
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
    if isinstance(folds, tuple) and any(not 0 <= fold < config.num_folds for fold in folds):
        raise ConfigError(
            f"folds must be among 0 to {config.num_folds - 1}; got {folds}. "
            "Name existing folds after --folds."
        )


def value_of(config: Config, name: str) -> Any:
    """Value of a field by its name, as on the command line."""
    return functools.reduce(getattr, name.split("."), config)
