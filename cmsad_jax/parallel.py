"""One train step on one device or many: ``jit`` with shardings over a mesh, or ``pmap``.

Both split the batch over the devices and keep a copy of the state on each; losses are means over
the batch and normalisation never crosses examples, so the result is that of one device up to the
order of float32 sums.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cmsad_jax.types import ConfigError, Device

DATA_AXIS = "data"


def check_batch_size(batch_size: int, num_devices: int) -> None:
    """Raise ``ConfigError`` unless every device gets the same number of examples."""
    if batch_size % num_devices:
        raise ConfigError(
            "batch size must be divisible by the number of devices; "
            f"got {batch_size} and {num_devices}. "
            f"Use --train.batch-size={-(-batch_size // num_devices) * num_devices} "
            "or fewer devices."
        )


def data_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """One-dimensional mesh with the axis ``data``; all devices by default."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), devices=devices, axis_types=(AxisType.Auto,)
    )


@dataclasses.dataclass(frozen=True)
class ParallelStep:
    """A compiled train step with the placement that it expects.

    Attributes:
        place_state: puts a state from one device where the step wants it.
        place_batch: splits a batch of host arrays over the devices.
        step: ``(state, batch) -> (state, metrics)``; consumes the state.
        fetch_state: the state as it is on one device, for evaluation and checkpoints.
    """

    place_state: Callable[[PyTree], PyTree]
    place_batch: Callable[[PyTree], PyTree]
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    fetch_state: Callable[[PyTree], PyTree]


def parallelize(
    step: Callable[..., tuple[PyTree, PyTree]],
    *,
    mode: Literal["jit", "pmap"] = "jit",
    devices: Sequence[Device] | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> ParallelStep:
    """Compile ``step(state, batch, axis_name=...)`` over ``devices`` (all by default).

    ``compiler_options`` are XLA's, under ``jit``.

    Raises:
        ConfigError: from ``place_batch``, if a batch does not divide by the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)

    def checked(batch):
        check_batch_size(len(jax.tree.leaves(batch)[0]), len(devices))
        return batch

    if mode == "jit":
        mesh = data_mesh(devices)
        replicated = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
        return ParallelStep(
            place_state=lambda state: jax.device_put(state, replicated),
            place_batch=lambda batch: jax.device_put(checked(batch), split),
            step=jax.jit(
                step,
                in_shardings=(replicated, split),
                out_shardings=(replicated, replicated),
                donate_argnums=0,
                compiler_options=compiler_options,
            ),
            fetch_state=lambda state: state,
        )

    def split_batch(batch):
        count = len(devices)
        return jax.tree.map(
            lambda x: np.asarray(x).reshape(count, len(x) // count, *x.shape[1:]), checked(batch)
        )

    mapped = jax.pmap(
        partial(step, axis_name=DATA_AXIS), axis_name=DATA_AXIS, devices=devices, donate_argnums=0
    )

    def first(tree):
        return jax.tree.map(lambda x: x[0], tree)

    def mapped_step(state, batch):
        state, metrics = mapped(state, batch)
        return state, first(metrics)

    return ParallelStep(
        place_state=lambda state: jax.device_put(
            jax.tree.map(lambda x: np.stack([x] * len(devices)), state),
            NamedSharding(data_mesh(devices), PartitionSpec(DATA_AXIS)),
        ),
        place_batch=split_batch,
        step=mapped_step,
        fetch_state=first,
    )
