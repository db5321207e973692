"""What one training step takes, and what each part of the method adds to it.

``python -m benchmarks.train_step`` times the small preset; ``--presets`` names others. The batch
is random and on the device already, so reading and preprocessing are not in these figures. Every
variant is the preset with one part taken away.
"""

import argparse
import dataclasses
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.modules.fusion import FusionConfig
from cmsad_jax.modules.network import CMSAD
from cmsad_jax.training import init_state, train_step
from experiments.config import PRESETS, Config, window


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    preset: str
    variant: str
    batch: int
    crop: str
    dtype: str
    parameters: int
    median_ms: float
    iqr_ms: float
    temporary_mb: float | None
    examples_per_s: float
    device: str
    versions: str


def variants(config: Config) -> dict[str, Config]:
    """The preset, and the preset without one part of it at a time."""
    loss, network = config.loss, config.network
    no_distillation = dataclasses.replace(loss, cross_modal_weight=0.0, self_weight=0.0)
    concat = dataclasses.replace(network, fusion=FusionConfig(kind="concat"))
    probabilities: dict[str, Any] = {
        field.name: 0.0
        for field in dataclasses.fields(AugmentationConfig)
        if field.name.endswith("_probability")
    }
    still = dataclasses.replace(config.train, augmentation=AugmentationConfig(**probabilities))
    return {
        "full": config,
        "no distillation": dataclasses.replace(config, loss=no_distillation),
        "concat for scff": dataclasses.replace(config, network=concat),
        "concat, no distillation": dataclasses.replace(
            config, network=concat, loss=no_distillation
        ),
        "no augmentation": dataclasses.replace(config, train=still),
    }


def random_batch(config: Config) -> dict[str, jax.Array]:
    """A batch in the layout of a train step: noise, and a cuboid of every class."""
    batch, space = config.train.batch_size, window(config)
    shape = (batch, *space, len(config.network.modalities))
    middle = tuple(slice(n // 4, max(n // 2, 1)) for n in space)
    return {
        "image": jax.random.normal(jax.random.key(0), shape),
        "label": jnp.zeros((batch, *space), jnp.int32).at[:, *middle].set(1),
        "present": jnp.ones((batch, shape[-1]), bool),
        "key": jnp.arange(2 * batch, dtype=jnp.uint32).reshape(batch, 2),
    }


def time_step(name: str, config: Config, *, effort: timing.Effort) -> Row:
    """Compile the step of one variant and time it, the state handed from step to step."""
    network = CMSAD(config.network)
    optimizer = config.train.optimizer.optimizer(config.train.steps)
    step = functools.partial(
        train_step,
        network=network,
        optimizer=optimizer,
        loss=config.loss,
        augmentation=config.train.augmentation,
        modality_dropout=config.train.modality_dropout,
        average_decay=config.train.average_decay,
    )
    batch = random_batch(config)
    state: Any = init_state(network, optimizer, batch["image"].shape, key=jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    memory = program.memory_analysis()

    def call():
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, batch))
        return metrics

    loss = float(call()["loss"])
    if not jnp.isfinite(loss):
        raise ArithmeticError(
            f"the loss must be finite before a step is timed; got {loss} for {name}. "
            "Check the preset's losses."
        )
    result = timing.measure_calls(
        call,
        effort=effort,
        temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
    )
    return Row(
        preset=config.preset,
        variant=name,
        batch=config.train.batch_size,
        crop="x".join(map(str, window(config))),
        dtype=config.network.dtype,
        parameters=parameters,
        median_ms=1e3 * result.median_s,
        iqr_ms=1e3 * result.iqr_s,
        temporary_mb=None if result.temporary_bytes is None else result.temporary_bytes / 1e6,
        examples_per_s=config.train.batch_size / result.median_s,
        device=timing.device(),
        versions=timing.versions(),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    header = (
        "preset", "variant", "batch", "crop", "dtype", "parameters", "median ms", "IQR ms",
        "temp MB", "examples/s",
    )  # fmt: skip
    cells = [
        (
            row.preset,
            row.variant,
            str(row.batch),
            row.crop,
            row.dtype,
            f"{row.parameters:,}",
            f"{row.median_ms:.1f}",
            f"{row.iqr_ms:.1f}",
            timing.number(row.temporary_mb, ".0f"),
            f"{row.examples_per_s:.2f}",
        )
        for row in rows
    ]
    return timing.markdown([header, *cells])


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every variant, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few calls")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["small"])
    options = parser.parse_args(arguments)
    effort = timing.QUICK if options.quick else timing.Effort()
    arguments = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.train_step {shlex.join(arguments)}".strip()

    print(f"{timing.device()}; {timing.versions()}\n`{command}`\n")
    rows = [
        time_step(name, config, effort=effort)
        for preset in options.presets
        for name, config in variants(PRESETS[preset]).items()
    ]
    print(table(rows))
    if options.json:
        timing.save_json(options.json, rows, command=command)


if __name__ == "__main__":
    main()
