"""What a train step is fed with: batches read by the host, or crops cut on the device."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np

from cmsad_jax.residency import take_crops
from cmsad_jax.types import ConfigError
from data_pipelines.case import STORED_UNIT
from data_pipelines.serving import loading
from data_pipelines.serving.sampling import Sampling
from experiments.settings.config import Config
from experiments.training import memory

DEVICE_SHARE = 0.25
"""Part of a device's memory that training cases may fill without being asked to."""


def choose_residency(requested: str, num_bytes: int, device_bytes: int | None) -> tuple[str, str]:
    """``device`` or ``host``, and why.

    Args:
        requested: ``auto``, ``device`` or ``host``.
        num_bytes: size of all cases.
        device_bytes: memory of an accelerator; None for a CPU, whose memory is the host's.

    Raises:
        ConfigError: if the device is asked for and cannot hold the cases.
    """
    size = f"{num_bytes / 1e9:.2f} GB of cases"
    if requested == "device" and device_bytes is not None and num_bytes > device_bytes:
        raise ConfigError(
            "resident cases must fit into the memory of one device; "
            f"got {size} and {device_bytes / 1e9:.2f} GB. Use --data.residency=host."
        )
    if requested != "auto":
        return requested, f"{size}, as asked for"
    if device_bytes is None:
        return "host", f"{size}; the device is the host"
    if num_bytes <= DEVICE_SHARE * device_bytes:
        return "device", f"{size} fit into {device_bytes / 1e9:.0f} GB"
    return "host", f"{size} exceed a quarter of {device_bytes / 1e9:.0f} GB"


def residency(config: Config, source: loading.CaseSource, *, num_folds: int = 1) -> tuple[str, str]:
    """``choose_residency`` for ``num_folds`` side by side, each with cases of its own.

    It goes by the size of all cases, a little more than those of a fold's training.
    """
    return choose_residency(
        config.data.residency,
        num_folds * loading.resident_bytes(source, source.case_ids),
        memory.limit_bytes(jax.local_devices()[0]),
    )


class Feed:
    """Batches as ``loading.train_batches`` gives them, on the host or on the device.

    Attributes:
        waited_s: time for which the caller has waited for batches.
        resident_bytes: memory of the device that its cases take.
    """

    def __init__(self, batches: Iterator[loading.Batch], resident_bytes: int = 0):
        self._batches = batches
        self.resident_bytes = resident_bytes
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[loading.Batch]:
        return self

    def __next__(self) -> loading.Batch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited_s += time.perf_counter() - started


def training_feed(
    source: loading.CaseSource,
    case_ids: Sequence[str],
    sampling: Sampling,
    *,
    where: str,
) -> Feed:
    """The batches of one fold for the steps that are left, the same from ``host`` and ``device``.

    Args:
        source: all cases.
        case_ids: those to train on.
        sampling: what is drawn of them.
        where: the cases lie; see ``choose_residency``.
    """
    if where == "host":
        return Feed(loading.train_batches(source, case_ids, sampling))
    plans = loading.train_plans(source, case_ids, sampling)
    cases = jax.device_put(loading.resident_arrays(source, case_ids), jax.local_devices()[0])
    cut = jax.jit(partial(take_crops, crop=sampling.crop, unit=STORED_UNIT))
    crops = (plan | cut(cases, plan["case_index"], plan.pop("offset")) for plan in plans)
    return Feed(crops, sum(array.nbytes for array in jax.tree.leaves(cases)))


def hidden_labels(
    source: loading.CaseSource, case_ids: Sequence[str], *, share: float, seed: int
) -> frozenset[str]:
    """The cases whose label training does not see: all those of a ``share`` of the patients.

    Of patients with the target and of others alike, and of each at least one keeps its label. A
    larger share hides those of a smaller one too.
    """
    positive: dict[str, bool] = {}
    chosen, owner = {*case_ids}, {}
    for info in source.info:
        if info.case_id in chosen:
            owner[info.case_id] = info.patient_id
            positive[info.patient_id] = positive.get(info.patient_id, False) or info.positive
    hidden: set[str] = set()
    for kind in (False, True):
        patients = sorted(patient for patient, holds in positive.items() if holds is kind)
        words = np.random.SeedSequence((seed, int(kind))).generate_state(len(patients))
        count = min(round(share * len(patients)), len(patients) - 1)
        hidden |= {patients[i] for i in np.argsort(words, kind="stable")[: max(count, 0)]}
    return frozenset(case_id for case_id in case_ids if owner[case_id] in hidden)
