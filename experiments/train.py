"""One fold: compiled programs, the training loop, checkpoints. ``cv`` runs it for every fold."""

import csv
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cmsad_jax import kernels, parallel
from cmsad_jax.inference import sliding_window
from cmsad_jax.modules.network import CMSAD, apply, probabilities
from cmsad_jax.training import TrainState, init_state, train_step
from cmsad_jax.types import Device
from data_pipelines import loading
from data_pipelines.case import STORED_UNIT, Case
from experiments.config import Config, to_json, window
from experiments.runtime import progress

LOG_POINTS = 100
"""Rows of ``history.csv`` that a run's training losses are averaged into."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled, once for all folds.

    Attributes:
        init: fresh state from a key.
        step: the train step with its placement over devices.
        predict: ``(params, windows, present) -> b *window k`` probabilities.
        attention: ``(params, windows, present) -> b *window a`` attention energy of each modality
            and, within it, of each encoder stage, resized to the window; none for early fusion.
    """

    init: Callable[[jax.Array], TrainState]
    step: parallel.ParallelStep
    predict: Callable[..., jax.Array]
    attention: Callable[..., jax.Array]


def compile_programs(config: Config, devices: Sequence[Device]) -> Programs:
    """The jitted functions of a run; XLA compiles each at its first call."""
    parallel.check_batch_size(config.train.batch_size, len(devices))
    network = CMSAD(config.network)
    optimizer = config.train.optimizer.optimizer(config.train.steps)
    step = partial(
        train_step,
        network=network,
        optimizer=optimizer,
        loss=config.loss,
        augmentation=config.train.augmentation,
        modality_dropout=config.train.modality_dropout,
        average_decay=config.train.average_decay,
    )
    space = window(config)
    image_shape = (1, *space, len(config.data.modalities))

    # On CPUs the full effort doubles the time to compile and gains no speed: the convolutions are
    # library calls.
    options = {"xla_backend_optimization_level": 1} if devices[0].platform == "cpu" else None

    @partial(jax.jit, compiler_options=options)
    def predict(params, windows, present):
        return probabilities(apply(network, params, windows, present).logits)

    @partial(jax.jit, compiler_options=options)
    def attention(params, windows, present):
        features = apply(network, params, windows, present).features
        maps = [
            kernels.attention_energy(
                feature, kind=config.loss.attention.kind, exponent=config.loss.attention.exponent
            )
            for name in config.data.modalities
            for feature in features[name]
        ]
        return jnp.stack([kernels.resize_map(q, space) for q in maps], -1)

    return Programs(
        init=lambda key: init_state(network, optimizer, image_shape, key=key),
        step=parallel.parallelize(
            step, mode=config.parallel, devices=devices, compiler_options=options
        ),
        predict=predict,
        attention=attention,
    )


def scaled_image(case: Case) -> np.ndarray:
    """Stored intensities of a case as float32."""
    return case.image.astype(np.float32) * STORED_UNIT


def predict_case(
    program: Callable[..., jax.Array], params: Any, case: Case, config: Config, num_outputs: int
) -> np.ndarray:
    """``d h w k`` output of ``Programs.predict`` or ``.attention`` on a whole reference grid."""
    space = window(config)
    return sliding_window(
        partial(program, params),
        scaled_image(case),
        case.present,
        window=space,
        num_classes=num_outputs,
        overlap=config.predict.overlap,
        batch_size=config.predict.batch_size,
        flip_axes=(len(space) - 1,) if config.predict.flip else (),
    )


def reference_dice(
    programs: Programs, params: Any, cases: Iterator[Case], config: Config
) -> float | None:
    """Mean Dice on the reference grid over the foreground classes of cases that have them.

    A quick look for choosing a checkpoint; results are computed in the original T2W frame.
    """
    scores = []
    for case in cases:
        if not case.label.any():
            continue
        probability = predict_case(
            programs.predict, params, case, config, config.network.num_classes
        )
        mask = to_mask(probability, config.predict.threshold)
        for index in range(1, len(config.data.classes) + 1):
            truth, found = case.label == index, mask == index
            if truth.any():
                scores.append(2 * (truth & found).sum() / (truth.sum() + found.sum()))
    return float(np.mean(scores)) if scores else None


def to_mask(probability: np.ndarray, threshold: float) -> np.ndarray:
    """uint8 classes of ``... k`` probabilities: above the threshold, or the largest of several."""
    if probability.shape[-1] == 1:
        return (probability[..., 0] > threshold).astype(np.uint8)
    return probability.argmax(-1).astype(np.uint8)


def train_fold(
    config: Config,
    programs: Programs,
    source: loading.CaseSource,
    *,
    fold: int,
    training: Sequence[str],
    validation: Sequence[str],
    directory: Path,
) -> tuple[Any, dict[str, Any]]:
    """Train one fold; returns the weights to evaluate and a summary for the log.

    Writes ``history.csv`` and the checkpoints ``last`` and ``best`` into ``directory``. The
    weights returned are the last ones (their moving average if configured), never ``best``.
    """
    train = config.train
    key = jax.random.fold_in(jax.random.key(config.seed), fold)
    state = programs.step.place_state(programs.init(key))
    share = train.foreground_share
    if share and not any(source.foreground(case_id).size for case_id in training):
        share = 0.0
        log(f"fold {fold + 1}: no training case holds the target; crops are drawn at random")
    batches = loading.train_batches(
        source,
        training,
        crop=train.crop,
        batch_size=train.batch_size,
        seed=config.seed * 1000 + fold,
        foreground_share=share,
        num_steps=train.steps,
        num_threads=train.read_threads,
    )
    schedule = train.optimizer.schedule(train.steps)
    log_every = max(1, train.steps // LOG_POINTS)
    check_at = {round(train.steps * (i + 1) / train.validations) for i in range(train.validations)}
    history: list[dict[str, float | None]] = []
    pending: list[dict[str, jax.Array]] = []
    best: dict[str, Any] = {"step": None, "validation_dice": None}
    checkpoints = Checkpoints(directory / "checkpoints", config)
    started = first_done = mark = time.perf_counter()
    bar = progress(
        batches, description=f"fold {fold + 1}/{config.num_folds} training", total=train.steps
    )
    for step, batch in enumerate(bar, 1):
        batch = {name: value for name, value in batch.items() if name != "case_index"}
        if config.network.encoder.rank == 2:
            batch |= {name: batch[name][:, 0] for name in ("image", "label")}
        state, metrics = programs.step.step(state, programs.step.place_batch(batch))
        pending.append(metrics)
        if step == 1:
            jax.block_until_ready(state)
            first_done = mark = time.perf_counter()
        if step % log_every == 0 or step == train.steps:
            row = {name: float(np.mean([float(m[name]) for m in pending])) for name in pending[0]}
            now = time.perf_counter()
            row |= {
                "step": step,
                "learning_rate": float(jnp.asarray(schedule(step - 1))),
                "examples_per_s": len(pending) * train.batch_size / max(now - mark, 1e-9),
                "validation_dice": None,
            }
            bar.set_postfix(
                loss=f"{row['loss']:.3f}", examples_per_s=f"{row['examples_per_s']:.1f}"
            )
            history.append(row)
            pending, mark = [], now
        if step in check_at:
            fetched = programs.step.fetch_state(state)
            score = reference_dice(
                programs, fetched.average, loading.eval_cases(source, validation), config
            )
            if history:
                history[-1]["validation_dice"] = score
            if score is not None and (best["step"] is None or score > best["validation_dice"]):
                best = {"step": step, "validation_dice": score}
                checkpoints.save("best", fetched)
            mark = time.perf_counter()
    finished = time.perf_counter()
    final = programs.step.fetch_state(state)
    checkpoints.save("last", final)
    checkpoints.close()
    write_history(directory / "history.csv", history)
    steady = (train.steps - 1) * train.batch_size / max(finished - first_done, 1e-9)
    return final.average, {
        "first_step_s": round(first_done - started, 2),
        "train_s": round(finished - started, 2),
        "examples_per_s": round(steady, 2),
        "loss": history[-1]["loss"],
        "best": best,
    }


def write_history(path: Path, history: Sequence[dict[str, float | None]]) -> None:
    """Training curves as CSV; empty cells where nothing was measured."""
    names = ["step", *(name for name in history[0] if name != "step")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)


class Checkpoints:
    """Orbax checkpoints ``last`` and ``best`` of a fold, each with the configuration beside it.

    The configuration holds the preprocessing, so that a checkpoint is enough to predict with.
    """

    def __init__(self, directory: Path, config: Config):
        self._config = to_json(config)
        self._managers = {
            name: ocp.CheckpointManager(
                (directory / name).absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1, enable_async_checkpointing=False
                ),
            )
            for name in ("last", "best")
        }

    def save(self, name: str, state: TrainState) -> None:
        """Write ``state``; the one of that name before is removed once this one is complete."""
        self._managers[name].save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self._config)
            ),
        )

    def restore(self, name: str, like: TrainState) -> TrainState:
        """The newest checkpoint of that name, with the structure and placement of ``like``."""
        manager = self._managers[name]
        return manager.restore(
            manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
        )["state"]

    def close(self) -> None:
        """Wait for everything that is being written."""
        for manager in self._managers.values():
            manager.close()


def log(message: str) -> None:
    """A line of the run's account on stdout, at once."""
    print(message, flush=True)
    sys.stdout.flush()
