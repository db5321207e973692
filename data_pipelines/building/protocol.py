"""What a data set says of itself: which cases there are, and what each one holds."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from data_pipelines import faults
from data_pipelines.case import RawCase
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError, raise_all
from data_pipelines.files import expanded
from data_pipelines.preparing import examination
from data_pipelines.preparing.examination import Examination
from data_pipelines.preparing.labels import settled
from data_pipelines.reading import case_files
from data_pipelines.reading.volume_io import read_volume


class Entry(Protocol):
    """What a data set lists of a case; its facts and faults too, where it knows any."""

    @property
    def case_id(self) -> str:
        """Unique name of the case."""
        ...


E = TypeVar("E", bound=Entry)


class DataSet(Generic[E]):
    """A data set as its author writes it: ``find_cases`` and ``read_case``.

    It may also define ``files``, so that changed files are noticed, ``suspicions`` of its own, and
    add to ``hashed_options``.

    Attributes:
        data_config: which data are asked for.
        entries: what ``find_cases`` found.
        own_classes: whether its labels may have classes of the user's own.
        hashed_options: of the options of this data set alone, those on which stored cases depend.
    """

    name: str
    data_config: DataConfig
    entries: list[E]
    own_classes: bool = True
    hashed_options: tuple[str, ...] = ()

    @property
    def sorted_entries(self) -> list[E]:
        """The entries in the order in which they are stored."""
        return sorted(self.entries, key=lambda entry: entry.case_id)

    def find_cases(self) -> Sequence[E]:
        """List the cases, cheaply: one entry each, with at least ``case_id``.

        Raises:
            DataError: the folder is not there or holds no case.
        """
        raise NotImplementedError

    def read_case(self, entry: E) -> RawCase:
        """Read one case; its faults are ``DataError``."""
        raise NotImplementedError

    def files(self, entry: E) -> Mapping[str, Path]:
        """What ``read_case`` reads for ``entry``, by name; nothing if the case is computed."""
        return {}

    def find_problems(self, entry: E) -> list[faults.Problem]:
        """What is wrong with a case as far as it shows without reading its files."""
        return []

    def check_list(self) -> list[faults.Problem]:
        """What is wrong with the list of cases; a subclass may add to it."""
        patients = {getattr(entry, "patient_id", entry.case_id) for entry in self.entries}
        return [*self.check_ids(), *case_files.check_patients(patients)]

    def check_ids(self) -> list[faults.Problem]:
        """Case ids that occur twice or cannot become file names."""
        return case_files.check_ids(entry.case_id for entry in self.entries)

    def read_available(self, entry: E) -> tuple[RawCase | None, list[DataError]]:
        """What can be read of a case, and the faults of the rest."""
        try:
            return self.read_case(entry), []
        except DataError as error:
            return None, [error]

    def suspicions(self, entry: E, raw: RawCase) -> list[faults.Problem]:
        """Problems that only this data set knows of."""
        return []

    def examine(self, entry: E) -> Examination:
        """Examine a case, whatever was kept."""
        problems = self.find_problems(entry)
        raw, faults = self.read_available(entry)
        found = examination.examine(
            entry.case_id, raw, faults, self.files(entry), self.data_config, problems
        )
        if raw is None:
            return found
        return dataclasses.replace(found, problems=(*found.problems, *self.suspicions(entry, raw)))


class FileDataSet(DataSet[case_files.CaseFiles]):
    """A data set of image files: ``find_cases`` lists ``CaseFiles``."""

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


@contextlib.contextmanager
def listing_files() -> Iterator[None]:
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
