"""Examined cases kept on disk until their data set is written, so that no case is done twice.

Each case has a file named by a hash of all that it depends on: settings, its files, the code. What
an interrupted build or a validation has finished is taken from there; a case whose files have
changed has another name and is done again. The folder begins with a dot, and the data set becomes
visible only when it is whole.
"""

import dataclasses
import json
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from data_pipelines.case import Case, ImageFacts
from data_pipelines.faults import DataError, Problem
from data_pipelines.files import atomic_file
from data_pipelines.preparing.examination import Examination, Facts
from data_pipelines.process import end_with_parent
from data_pipelines.progress import Bar, progress

_CASES_WORTH_A_POOL = 200
_MAX_DEFAULT_WORKERS = 8


E = TypeVar("E", contravariant=True)
F = TypeVar("F", covariant=True)
R = TypeVar("R")
K = TypeVar("K")


class Examiner(Protocol[E, F]):
    """What works through the cases; picklable."""

    def examine_entry(self, entry: E) -> F:
        """Examine one case, or take what was kept of it."""
        ...


def save(path: Path, examination: Examination) -> None:
    """Write an examination with its case, whole or not at all."""
    assert examination.case is not None
    case = dataclasses.asdict(examination.case)
    arrays = {name: value for name, value in case.items() if isinstance(value, np.ndarray)}
    content = {
        "case": {name: value for name, value in case.items() if name not in arrays},
        "facts": dataclasses.asdict(examination.facts) if examination.facts else None,
        "metadata": dict(examination.metadata),
        "problems": [
            {**dataclasses.asdict(problem), "file": str(problem.file) if problem.file else None}
            for problem in examination.problems
        ],
    }
    members: dict[str, Any] = {"content": np.array(json.dumps(content)), **arrays}
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **members)


def load(path: Path) -> Examination | None:
    """What ``save`` wrote; None if there is nothing, or nothing that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None
    content = json.loads(str(arrays.pop("content")))
    fields = content["case"]
    for name in ("original_shape", "truth_offset"):
        fields[name] = tuple(fields[name])
    problems = (
        Problem(**{**p, "file": Path(p["file"]) if p["file"] else None})
        for p in content["problems"]
    )
    return Examination(
        fields["case_id"],
        tuple(problems),
        Case(**fields, **arrays),
        _facts(content["facts"]) if content["facts"] else None,
        content["metadata"],
    )


def _facts(fields: Mapping[str, Any]) -> Facts:
    return Facts(
        fields["patient_id"],
        {name: tuple(value) for name, value in fields["spacing_mm"].items()},
        {name: tuple(value) for name, value in fields["size"].items()},
        fields["image_sha256"],
        tuple(fields["lesion_ml"]),
        fields["label_source"],
        {name: image_facts_of(values) for name, values in fields["images"].items()},
    )


def image_facts_of(values: Mapping[str, Any]) -> ImageFacts:
    """What an image is like, from its JSON values."""
    return ImageFacts(tuple(values["spacing_mm"]), tuple(values["intensity"]))


def default_workers(num_cases: int, *, worth_a_pool: int = _CASES_WORTH_A_POOL) -> int:
    """One process for a small data set, whose start would cost more than it gives."""
    if num_cases < worth_a_pool:
        return 1
    return min(os.cpu_count() or 1, _MAX_DEFAULT_WORKERS)


def examine_all(
    examiner: Examiner[E, R],
    entries: Sequence[E],
    *,
    num_workers: int,
    description: str,
    keep: Callable[[R], K],
) -> list[K]:
    """Examine all entries, in this process or in spawned ones, with a progress bar.

    Args:
        examiner: examines an entry; with several workers it is pickled to each of them once.
        entries: what to examine.
        num_workers: processes; 1 uses none but this.
        description: of the progress bar.
        keep: what to keep of an examination, applied where it was made.

    Returns:
        For each entry, in order, what ``keep`` made of it.

    Raises:
        DataError: a worker process was killed.
    """
    if num_workers < 1:
        raise DataError(
            f"there must be at least one worker; got {num_workers}. Use --num-workers=1."
        )
    bar = progress(description=description, total=len(entries))
    with bar:
        if num_workers == 1:
            return list(_serially(examiner, entries, keep, bar))
        return _in_pool(examiner, entries, min(num_workers, len(entries)), keep, bar)


def _serially(
    examiner: Examiner[E, R], entries: Sequence[E], keep: Callable[[R], K], bar: Bar
) -> Iterator[K]:
    for entry in entries:
        yield keep(examiner.examine_entry(entry))
        bar.update()


def _in_pool(
    examiner: Examiner[E, R],
    entries: Sequence[E],
    num_workers: int,
    keep: Callable[[R], K],
    bar: Bar,
) -> list[K]:
    context = multiprocessing.get_context("spawn")  # a fork after JAX has started can hang
    executor = ProcessPoolExecutor(
        num_workers, context, initializer=_start_worker, initargs=(examiner, keep)
    )
    try:
        futures = [executor.submit(_work, entry) for entry in entries]
        for future in as_completed(futures):
            future.result()  # a fault ends the work now, not when its turn comes
            bar.update()
    except BrokenProcessPool:
        raise DataError(
            f"every worker process must run to its end; got one of {num_workers} killed, usually "
            "for lack of memory. Run python -m data_pipelines.build --num-workers=1 with the data "
            "options of this run: finished cases are kept. A script of your own must start work "
            "under if __name__ == '__main__'."
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


_worker: tuple[Examiner, Callable[[Any], object]] | None = None


def _start_worker(examiner: Examiner, keep: Callable[[Any], object]) -> None:
    global _worker
    end_with_parent()  # each case is written whole or not at all
    _worker = examiner, keep


def _work(entry: object) -> Any:  # what keep makes, of this process's worker
    assert _worker is not None
    examiner, keep = _worker
    return keep(examiner.examine_entry(entry))
