"""What one training step takes, and what each part of the method adds to it.

``python -m benchmarks.train_step`` times the small preset; ``--presets`` names others. The batch
is random and on the device already, so reading and preprocessing are not in these figures. Every
variant is the preset with one part taken away; they are timed in turn. The one without
augmentation is timed beside the same network and loss in PyTorch, from the same weights.
"""

import argparse
import dataclasses
import functools
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import pytorch, pytorch_network, timing
from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.modules.baselines import count_operations
from cmsad_jax.modules.fusion import FusionConfig
from cmsad_jax.modules.network import CMSAD
from cmsad_jax.training import init_state, train_step
from experiments.process.accelerator import select_accelerator
from experiments.settings.command_line import complete
from experiments.settings.config import Config, window
from experiments.settings.presets import PRESETS
from experiments.settings.systems import SYSTEMS


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    preset: str
    variant: str
    batch: int
    crop: str
    dtype: str
    parameters: int
    compile_s: float | None
    median_ms: float
    iqr_ms: float
    cpu_ms: float
    """Processor time of this process."""
    temporary_mb: float | None
    examples_per_s: float
    operations_g: float
    """Of the network, forward and twice as many backward."""
    rate_share: float
    """Time of a matrix product of as many operations over the median."""
    speedup_pytorch: float | None
    """Against the faster of PyTorch's memory layouts."""
    device: str
    versions: str


PEER = "no augmentation"
"""Variant that the PyTorch network does as well: modalities alone teach, not the label."""


def variants(config: Config) -> dict[str, Config]:
    """The preset, and the preset without one part of it at a time."""
    loss, network = config.loss, config.network
    no_distillation = dataclasses.replace(
        loss, cross_modal_weight=0.0, self_weight=0.0, label_weight=0.0
    )
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
        PEER: dataclasses.replace(
            config, train=still, loss=dataclasses.replace(loss, teachers=("all",))
        ),
        **{
            name: dataclasses.replace(complete(system(config)), loss=no_distillation)
            for name, system in SYSTEMS.items()
        },
    }


def random_batch(config: Config) -> dict[str, jax.Array]:
    """A batch in the layout of a train step: noise, and a cuboid of every class."""
    batch, space = config.train.batch_size, window(config)
    shape = (batch, *space, config.network.num_channels)
    middle = tuple(slice(n // 4, max(n // 2, 1)) for n in space)
    return {
        "image": jax.random.normal(jax.random.key(0), shape),
        "label": jnp.zeros((batch, *space), jnp.int32).at[:, *middle].set(1),
        "present": jnp.ones((batch, len(config.network.modalities)), bool),
        "key": jnp.arange(2 * batch, dtype=jnp.uint32).reshape(batch, 2),
    }


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A variant ready to be timed."""

    config: Config
    call: Callable[[], Any]
    parameters: int
    compile_s: float | None
    temporary_bytes: int | None


def prepare(name: str, config: Config) -> tuple[Prepared, Any, float]:
    """Compile the step of one variant; also its first weights, and its loss on the batch."""
    network = CMSAD(config.network)
    optimizer = config.train.optimizer.optimizer(config.train.steps)
    step = functools.partial(
        train_step,
        network=network,
        optimizer=optimizer,
        loss=dataclasses.replace(config.loss, warmup_steps=0),
        augmentation=config.train.augmentation,
        modality_dropout=config.train.modality_dropout,
        average_decay=config.train.average_decay,
        spacing_mm=config.data.preprocess.spacing_mm[-config.network.encoder.rank :],
    )
    batch = random_batch(config)
    state: Any = init_state(network, optimizer, batch["image"].shape, key=jax.random.key(0))
    params = jax.device_get(state.params)
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    started = time.perf_counter()
    program = (
        jax.jit(step, donate_argnums=0, compiler_options=options).lower(state, batch).compile()
    )
    compile_s = time.perf_counter() - started

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
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    found = Prepared(config, call, count, compile_s, timing.temporary_bytes(program))
    return found, params, loss


def peers(
    config: Config, params: Any, loss: float, *, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """The same step in PyTorch, once its loss from the same weights was found to be the same.

    What differs or does not run is left out, with a line that says so. Accelerators multiply
    float32 in fewer bits in both frameworks.
    """
    exact = config.network.dtype == "float32" and jax.default_backend() == "cpu"
    tolerance, found = 1e-3 if exact else 2e-2, {}
    modes: dict[str, dict[str, bool]] = {
        "eager, channels last": {"last": True},
        "eager, channels first": {"last": False},
    }
    if compiled:
        modes["compiled, channels last"] = {"last": True, "compiled": True}
    for name, options in modes.items():
        try:
            other, step = pytorch_network.loss_and_step(
                config, params, random_batch(config), **options
            )
            if not abs(other - loss) <= tolerance * abs(loss):
                raise ArithmeticError(f"its loss is {other}, not {loss}")
            step()
        except Exception as error:
            print(f"left out: {config.preset} by PyTorch {name}: {timing.first_line(error)}\n")
            continue
        found[f"{PEER}, PyTorch {name}"] = step
    return found


def reduced(config: Config) -> Config:
    """The same network in float32 on one crop of at most 64 x 64 in plane: for CPUs."""
    depth, *plane = config.train.crop
    crop = (depth, *(min(n, 64) for n in plane))
    return dataclasses.replace(
        config,
        network=dataclasses.replace(config.network, dtype="float32"),
        train=dataclasses.replace(config.train, batch_size=1, crop=crop),
    )


def operations_of(config: Config) -> float:
    """Of a step: a forward pass, and the two products of each for the gradients."""
    return 3 * config.train.batch_size * count_operations(config.network, window(config))


def time_steps(
    config: Config, *, names: Sequence[str] | None, effort: timing.Effort, compiled: bool
) -> list[Row]:
    """Compile the variants of a preset and time them in turn, PyTorch's step among them.

    ``compiled``: ``torch.compile`` as well.
    """
    prepared: dict[str, Prepared] = {}
    others: list[str] = []
    for name, variant in variants(config).items():
        if names is not None and name not in names:
            continue
        prepared[name], params, loss = prepare(name, variant)
        if name == PEER and pytorch.available():
            for other, call in peers(variant, params, loss, compiled=compiled).items():
                others.append(other)
                prepared[other] = dataclasses.replace(
                    prepared[name], call=call, compile_s=None, temporary_bytes=None
                )
    measured = timing.measure_in_turn(
        {name: one.call for name, one in prepared.items()}, effort=effort
    )
    best = min((measured[name].median_s for name in others), default=None)
    rate = timing.product_rate(config.network.dtype, effort=effort)
    operations = {name: operations_of(one.config) for name, one in prepared.items()}
    return [
        Row(
            preset=one.config.preset,
            variant=name,
            batch=one.config.train.batch_size,
            crop="x".join(map(str, window(one.config))),
            dtype=one.config.network.dtype,
            parameters=one.parameters,
            compile_s=one.compile_s,
            median_ms=1e3 * measured[name].median_s,
            iqr_ms=1e3 * measured[name].iqr_s,
            cpu_ms=1e3 * measured[name].cpu_s,
            temporary_mb=None if one.temporary_bytes is None else one.temporary_bytes / 1e6,
            examples_per_s=one.config.train.batch_size / measured[name].median_s,
            operations_g=operations[name] / 1e9,
            rate_share=operations[name] / measured[name].median_s / rate,
            speedup_pytorch=best / measured[name].median_s if best and name == PEER else None,
            device=timing.device(),
            versions=timing.versions(),
        )
        for name, one in prepared.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    header = (
        "preset", "variant", "batch", "crop", "dtype", "parameters", "compile s",
        "median ms", "IQR ms", "CPU ms", "temp MB", "examples/s", "GFLOP", "share of product",
        "vs PyTorch",
    )  # fmt: skip
    cells = [
        (
            row.preset,
            row.variant,
            str(row.batch),
            row.crop,
            row.dtype,
            f"{row.parameters:,}",
            timing.number(row.compile_s, ".1f"),
            f"{row.median_ms:.1f}",
            f"{row.iqr_ms:.1f}",
            f"{row.cpu_ms:.1f}",
            timing.number(row.temporary_mb, ".0f"),
            f"{row.examples_per_s:.2f}",
            f"{row.operations_g:.1f}",
            f"{row.rate_share:.0%}",
            timing.number(row.speedup_pytorch, ".2f"),
        )
        for row in rows
    ]
    return timing.markdown([header, *cells])


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every variant, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few calls; on a CPU one crop of 64 x 64 in float32, and no torch.compile",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["small"])
    parser.add_argument("--variants", nargs="+", help="which; all by default")
    options = parser.parse_args(arguments)
    select_accelerator("auto")
    effort = timing.QUICK if options.quick else timing.Effort()
    arguments = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.train_step {shlex.join(arguments)}".strip()

    print(f"{timing.device()}; {timing.versions()}\n`{command}`\n")
    on_cpu = jax.default_backend() == "cpu"
    without = ""
    if not pytorch.available():
        without = "PyTorch is not installed for this device: no peer."
    elif on_cpu and options.quick:
        without = "torch.compile is left out of --quick: it compiles for minutes on a CPU."
    elif on_cpu and shutil.which("g++") is None:
        without = "torch.compile is left out: it needs a C++ compiler, and there is no g++."
    rows = []
    for preset in options.presets:
        config = PRESETS[preset]
        rows += time_steps(
            reduced(config) if on_cpu and options.quick else config,
            names=options.variants,
            effort=effort,
            compiled=not without,
        )
    print(table(rows) + f"\n\n{without}".rstrip())
    if options.json:
        timing.save_json(options.json, rows, command=command)


if __name__ == "__main__":
    main()
