"""Stored cases in, training batches and validation cases out, through Grain.

Reading happens in threads of this process: decoding is a copy, for which worker processes cost
more than they give. Decoded training arrays stay in memory up to a stated bound.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipelines.building.builders import open_builder
from data_pipelines.building.records import decode
from data_pipelines.case import STORED_UNIT, Case, CaseInfo
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.serving.sampling import Sampling, SamplingPlan
from data_pipelines.targets import foreground

if TYPE_CHECKING:
    from data_pipelines.building.case_builder import CaseBuilder

Batch = dict[str, np.ndarray]
"""``image``: float32 ``b d h w m``; ``label``: int32 ``b d h w``; ``present``: bool ``b m``;
``key``: uint32 ``b 2``, the data of a threefry key; ``case_index``: int32 ``b``, into the list of
cases that was given."""


class Arrays(NamedTuple):
    """What training needs of a case; see ``Case``."""

    image: np.ndarray
    label: np.ndarray
    present: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays hold."""
        return sum(array.nbytes for array in self)


class CaseSource:
    """Random access to the stored cases of one data set, from any thread.

    The arrays that training needs are kept decoded as they are read, until ``memory_bytes`` are
    held; what does not fit is read again whenever it is needed. Batches are the same either way.
    ``folder``, where the records lie, is named when they cannot be read.

    Attributes:
        info: facts of each case, in stored order.
        fingerprint: sha256 of everything stored.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        info: Sequence[CaseInfo],
        fingerprint: str,
        *,
        folder: Path | None = None,
        memory_bytes: int = 2**30,
    ):
        self.info = tuple(info)
        self.fingerprint = fingerprint
        self._folder = folder
        self._records = records
        self._position = {case.case_id: i for i, case in enumerate(self.info)}
        self._memory_bytes = memory_bytes
        self._kept: dict[str, Arrays] = {}
        self._kept_bytes = 0
        self._foreground: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        self._change: Callable[[Case], Case] | None = None

    def changed(self, change: Callable[[Case], Case], fingerprint: str) -> "CaseSource":
        """The same cases, each of them changed as it is read; what they are is ``fingerprint``."""
        other = CaseSource(
            self._records,
            self.info,
            fingerprint,
            folder=self._folder,
            memory_bytes=self._memory_bytes,
        )
        other._change = change
        return other

    def __len__(self) -> int:
        return len(self.info)

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Ids in stored order."""
        return tuple(self._position)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size of the reference grid, ``d h w``, which all cases share."""
        d, h, w = self.arrays(self.case_ids[0]).label.shape
        return d, h, w

    def __getitem__(self, case_id: str) -> Case:
        """Read one case; its arrays are read-only.

        Raises:
            DataError: the data set has no such case, or its file is damaged or gone.
        """
        if case_id not in self._position:
            raise DataError(
                f"cases must be of the data set; got {case_id!r}, which is not among its "
                f"{len(self)} cases. Use the fold file that was made for it."
            )
        with _whole(self._folder, f"case {case_id}"):
            case = decode(self._records[self._position[case_id]])
        return case if self._change is None else self._change(case)

    def arrays(self, case_id: str) -> Arrays:
        """What training needs of a case, from memory where it is kept."""
        kept = self._kept.get(case_id)
        if kept is not None:
            return kept
        case = self[case_id]
        arrays = Arrays(case.image, case.label, case.present)
        with self._lock:
            fits = self._kept_bytes + arrays.num_bytes <= self._memory_bytes
            if fits and case_id not in self._kept:
                self._kept[case_id] = arrays
                self._kept_bytes += arrays.num_bytes
        return arrays

    def foreground(self, case_id: str) -> np.ndarray:
        """Flat int32 indices of the foreground voxels on the reference grid.

        Kept once found: 4 bytes a voxel, so about 100 MB for the glands of 1,500 patients and 1 MB
        for their lesions.
        """
        if case_id not in self._foreground:
            label = self.arrays(case_id).label
            self._foreground[case_id] = np.flatnonzero(foreground(label)).astype(np.int32)
        return self._foreground[case_id]


def build(config: DataConfig, *, num_workers: int | None = None) -> CaseSource:
    """Open a data set, building it first where it has not been.

    Args:
        config: which data, and how they are stored.
        num_workers: processes that build; None is one for a small data set, else one a CPU.

    Raises:
        DataError: no builder has that name, the data have faults, or what was built before is
            damaged.
    """
    return open_source(open_builder(config), num_workers=num_workers)


def open_source(builder: "CaseBuilder", *, num_workers: int | None = None) -> CaseSource:
    """``build`` with a builder that has listed its cases already."""
    builder.prepare(num_workers=num_workers)
    folder = Path(builder.data_dir)
    with _whole(folder, "its files"):
        records, info, fingerprint = builder.source(), builder.infos, builder.fingerprint
    return CaseSource(records, info, fingerprint, folder=folder)


@contextlib.contextmanager
def _whole(folder: Path | None, what: str) -> Iterator[None]:
    """Turn the errors of TFDS and ArrayRecord, which are of any kind, into a ``DataError``."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(
            "a built data set must stay as it was written; "
            f"cannot read {what} in {folder or 'memory'}: {reason} "
            "Restore the folder from a copy, or remove it to have it built anew, and run the same "
            "command again: what was finished before is intact."
        ) from error


def sampling_plan(source: CaseSource, case_ids: Sequence[str], sampling: Sampling) -> SamplingPlan:
    """The plan by which crops of these cases are drawn; reads every case once.

    Of those that are ``unlabelled`` no foreground is known.

    Raises:
        DataError: a case is unknown; or see ``SamplingPlan``.
    """
    with ThreadPoolExecutor(max(1, sampling.num_threads)) as threads:
        foreground = list(threads.map(source.foreground, case_ids))
    nothing = np.empty(0, np.int32)
    foreground = [
        nothing if case_id in sampling.unlabelled else voxels
        for case_id, voxels in zip(case_ids, foreground, strict=True)
    ]
    return SamplingPlan(foreground, source.shape, sampling)


def train_batches(
    source: CaseSource, case_ids: Sequence[str], sampling: Sampling
) -> Iterator[Batch]:
    """Batches of crops for the steps that are left.

    Example ``i`` of batch ``s`` is crop ``s * batch_size + i`` of the plan: the same whatever the
    number of threads and wherever a run is resumed, and another batch size cuts the same sequence
    elsewhere. A few batches are read ahead.

    Args:
        source: where the cases lie.
        case_ids: those to train on; their order is part of what is drawn.
        sampling: what is drawn of them.

    Raises:
        DataError: at once, not at the first batch: an unknown case; or see ``SamplingPlan``.
    """
    size = len(sampling.rows)
    plan = sampling_plan(source, case_ids, sampling)

    def example(number: int) -> dict[str, Any]:
        step, row = divmod(number, size)
        drawn = plan[sampling.crops(step)[row]]
        arrays = source.arrays(case_ids[drawn.case_index])
        window = tuple(
            slice(start, start + length)
            for start, length in zip(drawn.offset, sampling.crop, strict=True)
        )
        found = {
            "image": arrays.image[window].astype(np.float32) * np.float32(STORED_UNIT),
            "label": arrays.label[window].astype(np.int32),
            "present": arrays.present,
            "key": drawn.key,
            "case_index": np.int32(drawn.case_index),
        }
        if sampling.unlabelled:
            found["labelled"] = np.bool_(case_ids[drawn.case_index] not in sampling.unlabelled)
        return found

    numbers = range(sampling.start_step * size, sampling.num_steps * size)
    return _read_ahead(example, numbers, num_threads=sampling.num_threads, batch_size=size)


def train_plans(source: CaseSource, case_ids: Sequence[str], sampling: Sampling) -> Iterator[Batch]:
    """Where the crops of ``train_batches`` lie, instead of the crops: for cases on the device.

    ``case_index``: int32 ``b``; ``offset``: int32 ``b 3``; others as in a batch. Arguments and
    errors are those of ``train_batches``.
    """
    plan = sampling_plan(source, case_ids, sampling)

    def batches():
        for step in range(sampling.start_step, sampling.num_steps):
            drawn = [plan[number] for number in sampling.crops(step)]
            found = {
                "case_index": np.array([one.case_index for one in drawn], np.int32),
                "offset": np.array([one.offset for one in drawn], np.int32),
                "key": np.stack([one.key for one in drawn]),
            }
            if sampling.unlabelled:
                labelled = [case_ids[one.case_index] not in sampling.unlabelled for one in drawn]
                found["labelled"] = np.array(labelled)
            yield found

    return batches()


def resident_arrays(source: CaseSource, case_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """What training needs of all cases, as stored: ``image``, ``label``, ``present``, stacked."""
    first = source.arrays(case_ids[0])
    stacked = {
        name: np.empty((len(case_ids), *array.shape), array.dtype)
        for name, array in first._asdict().items()
    }
    for i, case_id in enumerate(case_ids):
        for name, array in source.arrays(case_id)._asdict().items():
            stacked[name][i] = array
    return stacked


def resident_bytes(source: CaseSource, case_ids: Sequence[str]) -> int:
    """Memory that ``resident_arrays`` will take: all cases share one grid."""
    return len(case_ids) * source.arrays(case_ids[0]).num_bytes


def eval_cases(
    source: CaseSource, case_ids: Sequence[str], *, num_threads: int = 1
) -> Iterator[Case]:
    """Whole cases in the given order, the next ones being read meanwhile."""
    return _read_ahead(source.__getitem__, list(case_ids), num_threads=num_threads)


def _read_ahead(
    read: Callable[[Any], Any], items: Sequence[Any], *, num_threads: int, batch_size: int = 0
) -> Iterator[Any]:
    """``read`` of each item in order, made in threads, and stacked to batches if asked for.

    Twice as many elements are made ahead as there are threads: more would only hold memory.
    """
    import grain  # slow to load, and not needed for --help

    dataset = grain.MapDataset.source(items).map(read)
    if batch_size:
        dataset = dataset.batch(batch_size)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset.to_iter_dataset(options))
