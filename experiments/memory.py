"""Device memory: what a train step needs, by XLA's account, and what to do where it lacks."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments.config import Config
from experiments.runtime import RunError, log

GIB = 2**30


def estimate_bytes(step: Callable[..., Any], state: Any, batch: Any) -> int | None:
    """Memory of one device for a call of ``step``; None where XLA cannot tell.

    Compiles, or takes what is compiled. Arguments, results and temporary arrays; what the results
    share with donated arguments counts once.
    """
    lower = getattr(step, "lower", None)  # the pmap adapter is a plain function
    analysis = lower(state, batch).compile().memory_analysis() if lower else None
    if analysis is None:
        return None
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def limit_bytes(device: Any) -> int | None:
    """Memory that JAX may use on a device; None where it has no limit of its own, as on CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


def check(config: Config, step: Callable[..., Any], state: Any, batch: Any) -> None:
    """Say before the first step what it will need, and refuse what cannot fit.

    Raises:
        RunError: the estimate exceeds what a device has.
    """
    limit = limit_bytes(next(iter(jax.tree.leaves(state)[0].sharding.addressable_devices)))
    needed = None if limit is None else estimate_bytes(step, state, batch)
    if limit is None or needed is None:
        return
    said = f"a step needs about {needed / GIB:.2f} of {limit / GIB:.2f} GiB on each device"
    if needed > limit:
        raise RunError(f"a step must fit into memory; {said}, {_asked(config)}. {_remedy(config)}")
    log(said)


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Say what was asked and what would fit, if a device runs out of memory inside.

    Raises:
        RunError: instead of XLA's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        raise RunError(
            f"a step must fit into memory; the device has too little for it, {_asked(config)}; "
            f"XLA says: {str(error).splitlines()[0]} {_remedy(config)}"
        ) from error


def _asked(config: Config) -> str:
    train = config.train
    return (
        f"asked for: batches of {train.batch_size} crops {train.crop}, "
        f"{len(config.data.modalities)} modalities, channels {config.network.encoder.channels}, "
        f"{config.network.dtype}"
    )


def _remedy(config: Config) -> str:
    """Two options that make a step smaller."""
    train = config.train
    factors = np.prod([stride[-2:] for stride in config.network.encoder.strides], axis=0)
    halves = [max(n // 2 // f, 1) * f for n, f in zip(train.crop[1:], factors, strict=True)]
    options = [f"--train.crop {train.crop[0]} {halves[0]} {halves[1]}"]
    if train.batch_size > 1:
        options.insert(0, f"--train.batch-size={train.batch_size // 2}")
    if config.network.dtype == "float32":
        options.append("--network.dtype=bfloat16")
    return f"Use {' or '.join(options[:2])}, and a new --output."
