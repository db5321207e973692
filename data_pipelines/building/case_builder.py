"""The TFDS builder that all data sets share: raw cases in, stored cases out, all or nothing.

A data set is built once for each configuration and state of the user's files, into
``<cache>/<name>/<target>_<hash>/<version>``, as one ArrayRecord split named ``train``. TensorFlow
is not needed. Cases are examined first, all of them (see ``examination``), and kept until the whole
is written (see ``staging``); or Apache Beam does both on many machines.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from data_pipelines import faults
from data_pipelines.building import beam, staging
from data_pipelines.building.identity import Identity
from data_pipelines.building.protocol import DataSet, E, FileDataSet, listing_files
from data_pipelines.building.records import decode, encode, features, text_of
from data_pipelines.case import CaseInfo
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.files import atomic_file, expanded
from data_pipelines.preparing.examination import Examination
from data_pipelines.preparing.preprocessing import check_preprocess
from data_pipelines.reading.case_files import CaseFiles

SPLIT = "train"
K = TypeVar("K")
_INFO_FILE = "cases.json"


class CaseBuilder(DataSet[E], tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builds and reads one data set; a subclass says what it holds, as ``DataSet`` asks.

    A subclass is named ``Builder`` and stands in ``<name>/<name>_dataset_builder.py`` beside a
    ``README.md`` and a ``CITATIONS.bib``.
    """

    VERSION = tfds.core.Version("1.1.0")
    _beam = False

    def __init__(self, config: DataConfig):
        check_preprocess(config)
        if config.definition.values and not self.own_classes:
            raise DataError(
                f"the data set '{config.name}' has labels of lesion, gland or zones alone; got the "
                f"target '{config.target}'. Use --data.name=nifti_folder for files of your own, or "
                "one of its targets."
            )
        self.data_config = config
        with listing_files():
            self.entries = list(self.find_cases())
        self._identity = Identity(self)
        name = f"{config.target}_{self._identity.of_all()[:16]}"
        with _quiet_tfds():
            super().__init__(
                data_dir=expanded(config.cache, "--data.cache"),
                config=tfds.core.BuilderConfig(name=name),
                file_format="array_record",
            )

    def __reduce__(self):
        return type(self), (self.data_config,)

    def examine_entry(self, entry: E) -> Examination:
        """Examine a case, or take what was kept of it; what is whole is kept."""
        path = self.staged_file(entry)
        kept = staging.load(path)
        if kept is not None:
            return kept
        found = self.examine(entry)
        if found.case is not None and not found.faulty:
            staging.save(path, found)
        return found

    def examine_all(
        self,
        keep: Callable[[Examination], K],
        *,
        num_workers: int | None = None,
        description: str = "Examining",
    ) -> list[K]:
        """Examine all cases; what ``keep`` makes of each, in order of their ids.

        Args:
            keep: a function of a module, as it may run in another process.
            num_workers: processes; None is one for a small data set, else one for each CPU.
            description: of the progress bar.
        """
        if num_workers is None:
            num_workers = staging.default_workers(len(self.entries))
        return staging.examine_all(
            self,
            self.sorted_entries,
            num_workers=num_workers,
            description=f"{description} {self.name}",
            keep=keep,
        )

    def must_be_storable(self) -> None:
        """Raise ``DataError`` where data sets cannot be stored, before hours of reading files."""
        if importlib.util.find_spec("array_record") is None:
            raise DataError(
                "data sets are stored by the package array_record; got a Python without it, which "
                "is how it is on Windows. Use Linux, macOS or WSL for what builds or trains; "
                "validate, predict, evaluate and export run here."
            )

    @property
    def state_sha256(self) -> str:
        """Hash of settings, files and code: what is known of the data holds while it is equal."""
        return self._identity.of_all()

    def is_prepared(self) -> bool:
        """Whether the data set is built: the information file is there only if all else is."""
        return (Path(self.data_dir) / _INFO_FILE).is_file()

    def prepare(
        self,
        *,
        num_workers: int | None = None,
        beam_runner: str | None = None,
        beam_options: Sequence[str] = (),
    ) -> None:
        """Build the data set unless it is there already.

        Args:
            num_workers: processes that work through the cases; see ``examine_all``.
            beam_runner: name of an Apache Beam runner that does it instead. It stops at the first
                fault, so run ``python -m data_pipelines.validate`` before.
            beam_options: of the runner, as on its command line.

        Raises:
            DataError: faults of the data, all cases' in one message. No data set is left behind;
                cases that are finished are kept for the next time.
        """
        if self.is_prepared():
            return
        self.must_be_storable()
        problems = self.check_list()
        if problems or beam_runner is None:
            found = self.examine_all(_problems, num_workers=num_workers, description="Building")
            problems += [problem for case in found for problem in case]
        errors = [str(problem) for problem in problems if problem.level == "error"]
        if errors:
            raise DataError(_report(errors, len(self.entries)))
        config = None
        if beam_runner is not None:
            config = beam.download_config(beam_runner, beam_options)
        self._beam = beam_runner is not None
        try:
            with _quiet_tfds():
                self.download_and_prepare(download_config=config)
        except OSError:
            if not Path(self.data_dir).is_dir():  # else another process was faster
                raise
        finally:
            self._remove_empty_folders()
        if not self.info.splits:
            self.info.read_from_directory(self.data_dir)
        if not self.is_prepared():
            self._write_info()
        for entry in self.entries:
            self.staged_file(entry).unlink(missing_ok=True)
        self._remove_empty_folders()

    def staged_file(self, entry: E) -> Path:
        """Where the examined case is kept until the data set is written."""
        return self._staging_folder / f"{self._identity.of_case(entry)[:32]}.npz"

    @property
    def _staging_folder(self) -> Path:
        return expanded(self.data_config.cache, "--data.cache") / self.name / ".staging"

    def source(self) -> Sequence[Mapping[str, Any]]:
        """Random-access records of the prepared data set; ``decode`` makes cases of them."""
        return self.as_data_source(SPLIT)  # pyright: ignore[reportCallIssue]

    @property
    def infos(self) -> tuple[CaseInfo, ...]:
        """Facts of the prepared cases, in stored order, without reading them."""
        return tuple(
            CaseInfo(
                case["case_id"],
                case["patient_id"],
                case["positive"],
                case["metadata"],
                {name: staging.image_facts_of(v) for name, v in case.get("images", {}).items()},
            )
            for case in self._stored_info()["cases"]
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of everything stored: equal data have equal fingerprints, wherever built."""
        return self._stored_info()["sha256"]

    def _stored_info(self) -> dict[str, Any]:
        return json.loads((Path(self.data_dir) / _INFO_FILE).read_text("utf-8"))

    def _info(self) -> tfds.core.DatasetInfo:
        info = self.dataset_info_from_configs(features=features(), disable_shuffling=True)
        info.initialize_from_bucket = lambda: None  # it would leave an empty folder in /tmp
        return info

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Nothing was downloaded."""

    def _split_generators(self, dl_manager):
        if self._beam:
            return {SPLIT: self._beam_examples()}
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Examined cases in order of their ids."""
        for index, entry in enumerate(self.sorted_entries):
            yield index, _record(self.examine_entry(entry))

    def _beam_examples(self):
        """The same over any number of machines, which must all see the files."""
        work = functools.partial(_beam_example, type(self), self.data_config)
        return beam.map_all(work, list(enumerate(self.sorted_entries)))

    def _write_info(self) -> None:
        """The file that marks the data set as complete: facts and hash of all that is stored."""
        stored, digests = [], {}
        for record in self.source():
            case = decode(record)
            digest = hashlib.sha256()
            for name, value in encode(case).items():
                digest.update(name.encode() + _bytes(value))
            digests[case.case_id] = digest.hexdigest()
            stored.append(
                {
                    "case_id": case.case_id,
                    "patient_id": case.patient_id,
                    "positive": case.positive,
                    **json.loads(text_of(record["metadata"])),
                }
            )
        content = {
            "sha256": hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest(),
            "preprocess": dataclasses.asdict(self.data_config.preprocess),
            "cases": stored,
        }
        with atomic_file(Path(self.data_dir) / _INFO_FILE) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _remove_empty_folders(self) -> None:
        """TFDS makes a folder for downloads; of a failed build it leaves the empty parents."""
        downloads = Path(self.data_dir_root) / "downloads"
        config_folder = Path(self.data_dir).parent
        for folder in (
            self._staging_folder,
            downloads / "extracted",
            downloads,
            config_folder,
            config_folder.parent,
        ):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


class FileCaseBuilder(FileDataSet, CaseBuilder[CaseFiles], skip_registration=True):
    """The builder of a data set of image files."""


def _record(found: Examination) -> dict[str, Any]:
    """What is stored of an examined case."""
    if found.case is None or found.faulty:
        errors = [str(problem) for problem in found.problems if problem.level == "error"]
        raise DataError(_report(errors, 1))
    images = {} if found.facts is None else found.facts.images
    facts = {
        "metadata": dict(found.metadata),
        "images": {name: dataclasses.asdict(image) for name, image in images.items()},
    }
    return {**encode(found.case), "metadata": json.dumps(facts)}


def _problems(found: Examination) -> tuple[faults.Problem, ...]:
    return found.problems


def _beam_example(
    builder: type[CaseBuilder], config: DataConfig, item: tuple[int, Any]
) -> tuple[int, dict[str, Any]]:
    """One example on a machine of its own, where only the entry's files are needed."""
    index, entry = item
    worker = builder.__new__(builder)  # without listing the cases again
    worker.data_config = config
    return index, _record(worker.examine(entry))


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Silence what TFDS says of downloads and of settings that are not its own."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.display_progress_bar(False)  # its three bars say less than our one
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def _report(faults: Sequence[str], num_cases: int) -> str:
    lines = "\n".join(f"- {fault}" for fault in faults)
    return f"the data set cannot be built; faults: {len(faults)}, cases: {num_cases}.\n{lines}"


def _bytes(value: str | np.ndarray) -> bytes:
    if isinstance(value, str):
        return value.encode()
    return str((value.shape, value.dtype.str)).encode() + value.tobytes()
