"""One train step on one device or many: ``jit`` over a mesh, or ``pmap``.

Both split the batch over the devices and keep a copy of the state on each. Every device runs the
step on its own examples, and the step averages over the devices once: the gradients of all weights,
in float32 (XLA by itself would sum each where it arises, in the type of the network). Losses are
means over the batch and normalisation never crosses examples, so the result is that of one device
up to the order of float32 sums. ``jit`` spans the devices of several processes; each then places
its own share of the batch. ``parallelize_folds`` trains several folds at once, on parts of the
mesh.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cmsad_jax.types import ConfigError, Device

DATA_AXIS = "data"
FOLD_AXIS = "fold"


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
        place_batch: splits a batch of host arrays over the devices; with several processes, the
            share of this process: equal parts in the order of the processes.
        step: ``(state, batch) -> (state, metrics)``; consumes the state.
        fetch_state: the state as it is on one device, for evaluation and checkpoints; with several
            processes, as host arrays.
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
    stacked: bool = False,
    compiler_options: dict[str, Any] | None = None,
) -> ParallelStep:
    """Compile ``step(state, batch, axis_name=...)`` over ``devices`` (all by default).

    ``stacked``: the step is ``cmsad_jax.training.train_steps`` and takes several batches at
    once, stacked along a new first axis. ``compiler_options`` are XLA's, under ``jit``.

    Raises:
        ConfigError: for another ``mode``, or ``pmap`` with several processes; from
            ``place_batch``, if a batch does not divide by the number of devices.

    Examples:
        >>> step = parallelize(lambda state, batch: (state + batch["x"].sum(), {}))
        >>> state, batch = step.place_state(jnp.zeros(())), step.place_batch({"x": np.ones(8)})
        >>> state, _ = step.step(state, batch)
        >>> float(step.fetch_state(state))
        8.0
    """
    if mode not in ("jit", "pmap"):
        raise ConfigError(f"mode must be jit or pmap; got {mode!r}. Use mode='jit'.")
    devices = list(jax.devices() if devices is None else devices)

    def checked(batch):
        num_local = sum(device.process_index == jax.process_index() for device in devices)
        check_batch_size(jax.tree.leaves(batch)[0].shape[axis], num_local)
        return batch

    axis = 1 if stacked else 0
    if mode == "jit":
        mesh = data_mesh(devices)
        replicated = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))
        several = jax.process_count() > 1
        each = step
        if len(devices) > 1:
            each = jax.shard_map(
                partial(step, axis_name=DATA_AXIS),
                mesh=mesh,
                in_specs=(replicated.spec, split.spec),
                out_specs=(replicated.spec, replicated.spec),
                check_vma=False,  # the step itself averages its gradients over the data axis
            )
        return ParallelStep(
            place_state=lambda state: _place(state, replicated),
            place_batch=lambda batch: _place(checked(batch), split),
            step=jax.jit(
                each,
                in_shardings=(replicated, split),
                out_shardings=(replicated, replicated),
                donate_argnums=0,
                compiler_options=compiler_options,
            ),
            fetch_state=jax.device_get if several else lambda state: state,
        )
    if jax.process_count() > 1:
        raise ConfigError(
            "pmap serves the devices of one process; "
            f"got {jax.process_count()} processes. Use --parallel=jit."
        )

    def split_batch(batch):
        count = len(devices)

        def split(x):
            before, size = x.shape[:axis], x.shape[axis]
            parts = x.reshape(*before, count, size // count, *x.shape[axis + 1 :])
            return parts.swapaxes(0, axis)

        return jax.tree.map(split, checked(batch))

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


def _place(arrays: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays over the devices of ``sharding``; with several processes, from the parts of each."""
    if jax.process_count() == 1:
        return jax.device_put(arrays, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), arrays
    )


def fold_mesh(num_folds: int, devices: Sequence[Device]) -> Mesh:
    """Mesh with axes ``fold`` and ``data``: as many folds apart as divide folds and devices."""
    apart = math.gcd(num_folds, len(devices))
    return jax.make_mesh(
        (apart, len(devices) // apart),
        (FOLD_AXIS, DATA_AXIS),
        devices=devices,
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def parallelize_folds(
    step: Callable[..., tuple[PyTree, PyTree]],
    *,
    num_folds: int,
    devices: Sequence[Device] | None = None,
    stacked: bool = False,
    compiler_options: dict[str, Any] | None = None,
) -> ParallelStep:
    """Compile ``step`` for several folds trained side by side, each as if alone.

    The folds lie on slices of the mesh of ``fold_mesh``, and those that share a slice are
    stacked there by ``vmap``. On a CPU, whose convolutions with stacked weights are slow, train
    folds one after another instead. ``stacked`` and ``compiler_options`` as for
    ``parallelize``.

    Returns:
        As ``parallelize``, of all folds at once: ``place_state`` and ``place_batch`` take a
        list with one entry for each fold, ``fetch_state`` gives one, and the metrics of ``step``
        have a first axis of folds.

    Raises:
        ConfigError: from ``place_batch``, if a fold's batch does not divide by its devices.
    """
    mesh = fold_mesh(num_folds, list(jax.devices() if devices is None else devices))
    axis = 1 if stacked else 0
    states = NamedSharding(mesh, PartitionSpec(FOLD_AXIS))
    batches = NamedSharding(mesh, PartitionSpec(FOLD_AXIS, *[None] * axis, DATA_AXIS))

    def of_slice(state, batch):
        return jax.vmap(partial(step, axis_name=DATA_AXIS))(state, batch)

    sliced = jax.shard_map(
        of_slice,
        mesh=mesh,
        in_specs=(states.spec, batches.spec),
        out_specs=(states.spec, states.spec),
        check_vma=False,  # the step itself averages its gradients over the data axis
    )

    def place_batch(of_folds):
        size = jax.tree.leaves(of_folds[0])[0].shape[axis]
        check_batch_size(size, mesh.shape[DATA_AXIS])
        return jax.device_put(stack(of_folds), batches)

    def place_state(of_folds):
        return jax.device_put(stack(jax.device_get(of_folds)), states)

    def fetch_state(state):
        first = mesh.devices.flat[0]
        return [
            jax.tree.map(lambda x, i=i: jax.device_put(_entry(x, i), first), state)
            for i in range(num_folds)
        ]

    return ParallelStep(
        place_state=place_state,
        place_batch=place_batch,
        step=jax.jit(sliced, donate_argnums=0, compiler_options=compiler_options),
        fetch_state=fetch_state,
    )


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Equal trees of arrays as one, along a new first axis; on the device where they lie there."""
    return jax.tree.map(
        lambda *leaves: (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves), *trees
    )


def _entry(x: jax.Array, index: int) -> jax.Array:
    """``x[index]`` of an array that is split along its first axis, on one of its devices."""
    for shard in x.addressable_shards:
        start, stop, _ = shard.index[0].indices(x.shape[0])
        if start <= index < stop:
            return shard.data[index - start]
    raise AssertionError(f"no device of this process holds entry {index}")
