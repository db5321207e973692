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
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from data_pipelines import faults
from data_pipelines.building import beam, identity, staging
from data_pipelines.building.records import decode, encode, features, text_of
from data_pipelines.case import CaseInfo, RawCase
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError, raise_all
from data_pipelines.files import expanded, whole_file
from data_pipelines.preparing import examination
from data_pipelines.preparing.examination import Examination
from data_pipelines.preparing.labels import settled
from data_pipelines.preparing.preprocessing import check_preprocess
from data_pipelines.reading import case_files
from data_pipelines.reading.file_checks import files_of
from data_pipelines.reading.volume_io import read_volume

SPLIT = "train"
_INFO_FILE = "cases.json"
_HASHED_FIELDS = ("target", "modalities", "allow_missing", "preprocess")


class CaseBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builds and reads one data set; a subclass says which cases there are and reads one.

    A subclass is named ``Builder``, stands in ``<name>/<name>_dataset_builder.py`` beside a
    ``README.md`` and a ``CITATIONS.bib``, and defines ``find_cases`` and ``read_case``. It may
    also define ``files``, so that changed files are noticed, ``suspicions`` of its own, and add to
    ``hashed_fields``.
    """

    VERSION = tfds.core.Version("1.1.0")
    _beam = False
    hashed_fields: tuple[str, ...] = ()
    """Further fields of ``DataConfig`` on which the stored cases depend."""

    def __init__(self, config: DataConfig):
        check_preprocess(config)
        self.data_config = config
        with _storage_faults():
            self.entries = list(self.find_cases())
        with _quiet_tfds():
            super().__init__(
                data_dir=expanded(config.cache, "--data.cache"),
                config=tfds.core.BuilderConfig(name=self._config_name()),
                file_format="array_record",
            )

    def __reduce__(self):
        return type(self), (self.data_config,)

    def find_cases(self) -> Sequence[Any]:
        """List the cases, cheaply: one entry each, with at least ``case_id``.

        Raises:
            DataError: the folder is not there or holds no case.
        """
        raise NotImplementedError

    def read_case(self, entry: Any) -> RawCase:
        """Read one case; its faults are ``DataError``."""
        raise NotImplementedError

    def files(self, entry: Any) -> Mapping[str, Path]:
        """What ``read_case`` reads for ``entry``, by name; nothing if the case is computed."""
        return {}

    def find_problems(self, entry: Any) -> list[faults.Problem]:
        """What is wrong with a case as far as it shows without reading its files."""
        return []

    def check_list(self) -> list[faults.Problem]:
        """What is wrong with the list of cases; a subclass may add to it."""
        patients = {getattr(entry, "patient_id", entry.case_id) for entry in self.entries}
        return [*self.check_ids(), *case_files.check_patients(patients)]

    def check_ids(self) -> list[faults.Problem]:
        """Case ids that occur twice or cannot become file names."""
        return case_files.check_ids(entry.case_id for entry in self.entries)

    def read_available(self, entry: Any) -> tuple[RawCase | None, list[DataError]]:
        """What can be read of a case, and the faults of the rest."""
        try:
            return self.read_case(entry), []
        except DataError as error:
            return None, [error]

    def suspicions(self, entry: Any, raw: RawCase) -> list[faults.Problem]:
        """Problems that only this data set knows of."""
        return []

    def examine_entry(self, entry: Any) -> Examination:
        """Examine a case, or take what was kept of it; what is whole is kept."""
        path = self.staged_file(entry)
        kept = staging.load(path)
        if kept is not None:
            return kept
        found = self.examine_anew(entry)
        if found.case is not None and not found.faulty:
            staging.save(path, found)
        return found

    def examine_anew(self, entry: Any) -> Examination:
        """Examine a case, whatever was kept."""
        problems = self.find_problems(entry)
        raw, faults = self.read_available(entry)
        found = examination.examine(
            entry.case_id, raw, faults, self.files(entry), self.data_config, problems
        )
        if raw is None:
            return found
        return dataclasses.replace(found, problems=(*found.problems, *self.suspicions(entry, raw)))

    def examine_all(
        self,
        keep: Callable[[Examination], Any],
        *,
        num_workers: int | None = None,
        description: str = "Examining",
    ) -> list[Any]:
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

    @property
    def sorted_entries(self) -> list[Any]:
        """The entries in the order in which they are stored."""
        return sorted(self.entries, key=lambda entry: entry.case_id)

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

    def staged_file(self, entry: Any) -> Path:
        """Where the examined case is kept until the data set is written."""
        depends_on = {"name": self.name, "case": self._entry_state(entry), **self._dependencies}
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return self._staging_folder / f"{digest[:32]}.npz"

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
            CaseInfo(case["case_id"], case["patient_id"], case["positive"], case["metadata"])
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
                    "metadata": json.loads(text_of(record["metadata"])),
                }
            )
        content = {
            "sha256": hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest(),
            "preprocess": dataclasses.asdict(self.data_config.preprocess),
            "cases": stored,
        }
        with whole_file(Path(self.data_dir) / _INFO_FILE) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")

    @functools.cached_property
    def _dependencies(self) -> dict[str, Any]:
        """What every stored case depends on: settings and code."""
        config = dataclasses.asdict(self.data_config)
        return {
            "settings": {name: config[name] for name in (*_HASHED_FIELDS, *self.hashed_fields)},
            "code": identity.code_sha256(Path(inspect.getfile(type(self)))),
        }

    def _config_name(self) -> str:
        """Target and a hash of all that the stored cases depend on: settings, files, code."""
        cases = [self._entry_state(entry) for entry in self.entries]
        depends_on = {"cases": cases, **self._dependencies}
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return f"{self.data_config.target}_{digest[:16]}"

    def _entry_state(self, entry: Any) -> tuple[Any, ...]:
        """What is stored of a case before its files are read, and the state of these."""
        with _storage_faults():
            files = [
                (name, *self._file_state(file, label=name in ("label", "gland")))
                for name, path in self.files(entry).items()
                for file in files_of(path)
            ]
        metadata = sorted(getattr(entry, "metadata", {}).items())
        problems = getattr(entry, "problems", ())
        errors = [problem.text for problem in problems if problem.level == "error"]
        return entry.case_id, getattr(entry, "patient_id", ""), metadata, errors, sorted(files)

    def _file_state(self, path: Path, *, label: bool) -> tuple[str, int, int, str]:
        root = expanded(self.data_config.path or Path(), "--data.path")
        name = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        try:
            state = path.stat()
        except FileNotFoundError:
            return name, -1, -1, ""  # a link to nowhere, named with the other problems of its case
        return name, state.st_size, state.st_mtime_ns, identity.head_sha256(path, whole=label)

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


class FileCaseBuilder(CaseBuilder, skip_registration=True):
    """A data set of image files: ``find_cases`` lists ``case_files.CaseFiles``."""

    entries: list[case_files.CaseFiles]

    def root(self) -> Path:
        """The user's folder, ``config.path``."""
        path = self.data_config.path
        if path is None:
            raise DataError(f"the data set '{self.name}' needs a folder; pass --data.path FOLDER.")
        path = expanded(path, "--data.path")
        if not path.is_dir():
            raise MissingDataError(f"no folder at {path}. Check --data.path.")
        return path

    def check_list(self) -> list[faults.Problem]:
        """Also modalities that no case has."""
        absent = case_files.check_present(self.entries, self.data_config)
        return [*super().check_list(), *absent]

    def files(self, entry: case_files.CaseFiles) -> Mapping[str, Path]:
        """All files of a case, by modality and as ``label`` and ``gland``."""
        return entry.files

    def find_problems(self, entry: case_files.CaseFiles) -> list[faults.Problem]:
        """Files that are missing or too many."""
        return case_files.check_entry(entry, self.data_config)

    def read_available(self, entry: case_files.CaseFiles) -> tuple[RawCase | None, list[DataError]]:
        """Read what can be read of a case, and say of the rest why not."""
        faults: list[DataError] = []
        volumes = {}
        for name, path in self.files(entry).items():
            try:
                volumes[name] = read_volume(path, entry.channels.get(name))
            except DataError as error:
                faults.append(error)
        for name in {"label", "gland"} & volumes.keys():
            volumes[name] = settled(volumes[name])
        label = volumes.pop("label", None)
        if label is not None and entry.label_classes:
            array = label.array.copy()
            for value, meaning in entry.label_classes.items():
                array[label.array == value] = meaning
            label = dataclasses.replace(label, array=array)
        gland = volumes.pop("gland", None)
        raw = RawCase(
            case_id=entry.case_id,
            patient_id=entry.patient_id,
            images=volumes,
            label=label,
            metadata=entry.metadata,
            gland=gland,
        )
        return raw, faults

    def read_case(self, entry: case_files.CaseFiles) -> RawCase:
        """Read the volumes that are there; what is missing stays missing."""
        raw, faults = self.read_available(entry)
        raise_all(faults)
        assert raw is not None
        return raw


def _record(found: Examination) -> dict[str, Any]:
    """What is stored of an examined case."""
    if found.case is None or found.faulty:
        errors = [str(problem) for problem in found.problems if problem.level == "error"]
        raise DataError(_report(errors, 1))
    return {**encode(found.case), "metadata": json.dumps(dict(found.metadata))}


def _problems(found: Examination) -> tuple[faults.Problem, ...]:
    return found.problems


def _beam_example(
    builder: type[CaseBuilder], config: DataConfig, item: tuple[int, Any]
) -> tuple[int, dict[str, Any]]:
    """One example on a machine of its own, where only the entry's files are needed."""
    index, entry = item
    worker = builder.__new__(builder)  # without listing the cases again
    worker.data_config = config
    return index, _record(worker.examine_anew(entry))


@contextlib.contextmanager
def _storage_faults() -> Iterator[None]:
    """A fault of the storage while the user's files are listed is one of the data."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"files and folders of the data set must be readable; got: {error.strerror or error}, "
            f"for {error.filename}. Check the storage and the permissions of --data.path."
        ) from error


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
