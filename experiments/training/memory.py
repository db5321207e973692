"""Device memory: what a train step needs, by XLA's account, and what to do where it lacks."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.stages import Compiled

from cmsad_jax.types import Device
from experiments.process.console import RunError, log
from experiments.settings.config import Config

GIB = 2**30


class Estimate(NamedTuple):
    """Memory of one device for a step, by XLA's account.

    Attributes:
        kept_bytes: arguments and results; what they share, being donated, counts once.
        temporary_bytes: everything between, which grows with the voxels that are worked on at once.
    """

    kept_bytes: int
    temporary_bytes: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.kept_bytes + self.temporary_bytes


def estimate(step: Callable[..., object], state: object, batch: object) -> Estimate | None:
    """Memory for a call of ``step``; None where XLA cannot tell. Compiles, or takes what is."""
    lower = getattr(step, "lower", None)  # the pmap adapter is a plain function
    return of_compiled(lower(state, batch).compile()) if lower else None


def of_compiled(compiled: Compiled) -> Estimate | None:
    """Memory that a compiled program takes; None where XLA cannot tell."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return Estimate(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
    )


def limit_bytes(device: Device) -> int | None:
    """Memory that JAX may use on a device; None where it has no limit of its own, as on CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


def check(
    config: Config,
    step: Callable[..., object],
    state: object,
    batch: object,
    *,
    resident_bytes: int = 0,
) -> Estimate | None:
    """Say before the first step what it will need, and refuse what cannot fit; None on CPUs.

    ``resident_bytes``: of the cases that lie on the device.

    Raises:
        RunError: the estimate exceeds what a device has beside them.
    """
    limit = limit_bytes(next(iter(jax.tree.leaves(state)[0].sharding.addressable_devices)))
    needed = None if limit is None else estimate(step, state, batch)
    if limit is None or needed is None:
        return None
    said = f"a step needs about {needed.bytes / GIB:.2f} of {limit / GIB:.2f} GiB on each device"
    if resident_bytes:
        said += f", beside {resident_bytes / GIB:.2f} GiB of cases"
    if needed.bytes + resident_bytes > limit:
        share = (limit - resident_bytes - needed.kept_bytes) / max(needed.temporary_bytes, 1)
        remedy = _remedy(config, share)
        if resident_bytes and needed.bytes <= limit:
            remedy = "Use --data.residency=host."
        raise RunError(f"a step must fit into memory; {said}, {_asked(config)}. {remedy}")
    log(said)
    return needed


@contextlib.contextmanager
def explained(config: Config, needed: Estimate | None = None) -> Iterator[None]:
    """Say what was estimated, what was asked and what would fit, if a device runs out of memory.

    Raises:
        RunError: instead of XLA's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        known = "" if needed is None else f", estimated at {needed.bytes / GIB:.2f} GiB"
        raise RunError(
            f"a step must fit into memory; the device has too little for it{known}, "
            f"{_asked(config)}; XLA says: {str(error).splitlines()[0]} {_remedy(config)}"
        ) from error


def _asked(config: Config) -> str:
    train = config.train
    folds = f"{config.folds_at_once} folds at once, " if _asks_for_folds(config) else ""
    return (
        f"asked for: {folds}batches of {train.batch_size} crops {train.crop}, "
        f"{len(config.data.modalities)} modalities, channels {config.network.encoder.channels}, "
        f"{config.network.dtype}"
    )


def _asks_for_folds(config: Config) -> bool:
    """Whether several folds were to be trained side by side, whatever the devices."""
    return config.folds_at_once not in ("auto", 1)


def _remedy(config: Config, share: float = 0.5) -> str:
    """Two options that leave about ``share`` of the temporary arrays, the harmless ones first."""
    train, network = config.train, config.network
    examples = train.batch_size // math.gcd(train.batch_size, len(jax.devices()))
    channels = " ".join(str(max(c // 2, 1)) for c in network.encoder.channels)
    if share <= 0:
        options = ["a device with more memory", f"--network.encoder.channels {channels}{_NEW}"]
        return f"Use {' or '.join(options)}."
    options = ["--folds-at-once=1"] if _asks_for_folds(config) else []
    options += [
        f"--train.accumulation={parts}"
        for parts in range(train.accumulation + 1, examples + 1)
        if examples % parts == 0 and train.accumulation / parts <= share
    ][:1]
    if not network.rematerialize and share >= 0.5:
        options.append("--network.rematerialize=True")
    factors = np.prod([stride[-2:] for stride in network.encoder.strides], axis=0)
    sides = [
        max(int(side * math.sqrt(share)) // factor, 1) * factor
        for side, factor in zip(train.crop[1:], factors, strict=True)
    ]
    options.append(f"--train.crop {train.crop[0]} {sides[0]} {sides[1]}{_NEW}")
    options.append(f"--network.encoder.channels {channels}{_NEW}")
    return f"Use {' or '.join(options[:2])}."


_NEW = " with a new --output"
"""To be said of options that make another run; the others continue the one that is there."""
