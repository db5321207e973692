"""The compiled programs of a run, and how its folds share the devices."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax

from cmsad_jax import parallel
from cmsad_jax.modules.network import CMSAD
from cmsad_jax.training import TrainState, init_state, train_step, train_steps
from cmsad_jax.types import ConfigError, Device
from experiments.prediction.windows import attention_window, predict_window, weights_window
from experiments.process.accelerator import uncollected
from experiments.settings.config import Config, folds_asked, window
from experiments.training.fold import Fold

MOST_STEPS_PER_CALL = 10
"""On accelerators, without being asked; signals are heeded between calls."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled, once for all folds.

    Attributes:
        init: fresh state from a key.
        step: the train step with its placement over devices.
        several: ``steps_per_call`` train steps in one; None if that is 1.
        steps_per_call: see ``several``.
        predict: ``(params, windows, present) -> b *window k`` probabilities.
        attention: ``(params, windows, present) -> b *window a`` attention energy of each modality
            and, within it, of each encoder stage, resized to the window; none for early fusion.
        side_by_side: ``step`` and ``several`` of a number of folds above 1, of which they take
            lists.
        modality_weights: ``(params, windows, present) -> b *window m``, the same at every voxel of
            a window; None but for a fusion that weighs modalities.
        compiled_s: what it took to compile ``step``, and ``several``, by how many steps they make.
    """

    init: Callable[[jax.Array], TrainState]
    step: parallel.ParallelStep
    several: parallel.ParallelStep | None
    steps_per_call: int
    predict: Callable[..., jax.Array]
    attention: Callable[..., jax.Array]
    side_by_side: Callable[[int], tuple[parallel.ParallelStep, parallel.ParallelStep | None]]
    modality_weights: Callable[..., jax.Array] | None = None
    compiled_s: dict[int, float] = dataclasses.field(default_factory=dict)

    def of_folds(self, count: int) -> tuple[parallel.ParallelStep, parallel.ParallelStep | None]:
        """``step`` and ``several`` of so many folds, of which they take lists, also of one."""
        if count > 1:
            return self.side_by_side(count)
        return of_list(self.step), None if self.several is None else of_list(self.several)


def of_list(program: parallel.ParallelStep) -> parallel.ParallelStep:
    """The program of a fold, placing and fetching lists that hold this fold alone."""
    return dataclasses.replace(
        program,
        place_state=lambda states: program.place_state(*states),
        place_batch=lambda batches: program.place_batch(*batches),
        fetch_state=lambda state: [program.fetch_state(state)],
    )


def compile_programs(config: Config, devices: Sequence[Device]) -> Programs:
    """The jitted functions of a run; XLA compiles each at its first call.

    Raises:
        ConfigError: for folds side by side where they cannot be, or a batch that the devices of a
            fold cannot share.
    """
    slices = math.gcd(folds_at_once(config, devices), len(devices))
    parallel.check_batch_size(config.train.batch_size, len(devices) // slices)
    network, rank = CMSAD(config.network), config.network.encoder.rank
    optimizer = config.train.optimizer.optimizer(config.train.steps)
    step = partial(
        train_step,
        network=network,
        optimizer=optimizer,
        loss=config.loss,
        augmentation=config.train.augmentation,
        modality_dropout=config.train.modality_dropout,
        average_decay=config.train.average_decay,
        accumulation=config.train.accumulation,
        rolled=devices[0].platform != "cpu",
        spacing_mm=tuple(map(float, config.data.preprocess.spacing_mm[-rank:])),
    )
    image_shape = (1, *window(config), config.network.num_channels)

    options = compiler_options(devices[0].platform, deterministic=config.deterministic)
    stages = range(config.network.encoder.num_stages)
    per_call = steps_per_call(config, devices[0].platform)

    @cache
    def of_folds(count: int) -> tuple[parallel.ParallelStep, parallel.ParallelStep | None]:
        placed: Any = {
            "devices": devices_of(count, config.train.batch_size, devices),
            "compiler_options": options,
        }
        parallelize = partial(parallel.parallelize, mode=config.parallel)
        if count > 1:
            parallelize = partial(parallel.parallelize_folds, num_folds=count)
        several = partial(train_steps, step=step)
        return (
            parallelize(step, **placed),
            None if per_call == 1 else parallelize(several, stacked=True, **placed),
        )

    one, several = of_folds(1)
    return Programs(
        init=uncollected(lambda key: init_state(network, optimizer, image_shape, key=key)),
        step=one,
        several=several,
        steps_per_call=per_call,
        predict=jax.jit(predict_window(config), compiler_options=options),
        attention=jax.jit(attention_window(config, stages), compiler_options=options),
        side_by_side=of_folds,
        modality_weights=jax.jit(weights_window(config), compiler_options=options)
        if config.network.fusion.kind == "weighted"
        else None,
    )


def folds_at_once(config: Config, devices: Sequence[Device]) -> int:
    """As asked for; else one on each equal part of several accelerators, and otherwise 1.

    Raises:
        ConfigError: several are asked for in a run of several processes.
    """
    asked, processes = config.folds_at_once, jax.process_count()
    if config.cascade.target:
        return _in_turn(asked, processes)
    if asked == "auto":
        if processes > 1 or config.parallel == "pmap" or devices[0].platform == "cpu":
            return 1
        count = len(folds_asked(config.folds, config.num_folds))
        return max(1, math.gcd(count, len(devices)))
    if asked > 1 and processes > 1:
        raise ConfigError(
            "folds are trained side by side in one process; "
            f"got --folds-at-once={asked} and {processes} processes. Use --folds-at-once=1."
        )
    return asked


def _in_turn(asked: int | str, processes: int) -> int:
    """Of a cascade: each fold has cases of its own, cut around what its first network found."""
    if asked not in ("auto", 1) or processes > 1:
        raise ConfigError(
            "the folds of a cascade are trained one after another in one process; "
            f"got --folds-at-once={asked} and {processes} processes. Use --folds-at-once=1, "
            "and one process."
        )
    return 1


def devices_of(num_folds: int, batch_size: int, devices: Sequence[Device]) -> Sequence[Device]:
    """Those that folds of a run share: one equal part for each, as far as numbers allow.

    All of them, unless a batch does not divide by a part, which can come of the last folds of a
    run, fewer than the others before.
    """
    parts = math.gcd(num_folds, len(devices))
    return devices[: parts * math.gcd(batch_size, len(devices) // parts)]


def steps_per_call(config: Config, platform: str) -> int:
    """As asked for; else 1 on CPUs, and on accelerators what divides the steps between savings."""
    if config.train.steps_per_call is not None:
        return config.train.steps_per_call
    if platform == "cpu":
        return 1
    common = math.gcd(config.train.checkpoint_every, config.train.steps, *validation_steps(config))
    return max(n for n in range(1, MOST_STEPS_PER_CALL + 1) if common % n == 0)


def validation_steps(config: Config) -> set[int]:
    """Steps after which the validation fold is looked at."""
    steps, count = config.train.steps, config.train.validations
    return {round(steps * (i + 1) / count) for i in range(count)}


def compiler_options(platform: str, *, deterministic: bool) -> dict[str, Any] | None:
    """XLA's options for the programs of a run."""
    if platform == "cpu":
        # The full effort doubles the time to compile and gains no speed: the convolutions are
        # library calls.
        return {"xla_backend_optimization_level": 1}
    # Implies xla_gpu_exclude_nondeterministic_ops, and that none is chosen by timing it.
    return {"xla_gpu_deterministic_ops": True} if platform == "gpu" and deterministic else None


def groups(folds: Sequence[Fold], at_once: int) -> list[list[Fold]]:
    """Folds that are trained side by side, at most ``at_once``: such as stand at the same step."""
    if at_once == 1:
        return [[fold] for fold in folds]
    standing: dict[int, list[Fold]] = {}
    for fold in folds:
        standing.setdefault(fold.standing(), []).append(fold)
    return [
        same[i : i + at_once] for same in standing.values() for i in range(0, len(same), at_once)
    ]
